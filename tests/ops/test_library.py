"""What the decorator makes of a reference, with ops that are defined for one test."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4_compile import ops
from gemma4_compile.ops import library
from gemma4_compile.ops.library import expect, op


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ops of a test are gone after it."""
    with torch.library._scoped_library("gemma4", "FRAGMENT") as fragment:
        monkeypatch.setattr(library, "LIBRARY", fragment)
        monkeypatch.setattr(library, "_DEFINED", [])
        monkeypatch.setattr(library, "OPS", {})
        yield


def test_the_schema_is_the_signature() -> None:
    @op(launch=lambda *_: None, mutates=("pages",))
    def op_of_all_types(
        x: Tensor, pages: Tensor, mask: Tensor | None, count: int, eps: float, block: bool, name: str,
        last: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What it computes."""
        return x, x

    schema = str(torch.ops.gemma4.op_of_all_types.default._schema)
    assert schema == (
        "gemma4::op_of_all_types(Tensor x, Tensor(a1!) pages, Tensor? mask, int count, float eps, bool block, str name,"
        " Tensor? last=None) -> (Tensor, Tensor)"
    )
    assert library._DEFINED == ["op_of_all_types"] and not library.OPS, "it has no example"
    assert op_of_all_types.__doc__ == "What it computes." and [*inspect.signature(op_of_all_types).parameters][-1] == "last"


def test_a_check_is_given_what_it_names_and_runs_before_everything() -> None:
    seen: list[dict[str, Any]] = []

    def check(op: str, shift: float, x: Tensor, mask: Tensor | None = None, other: int = 7) -> None:
        seen.append({"op": op, "shift": shift, "mask": mask, "other": other})
        expect(op, "x must be [N]", x.dim(), 1, "flatten it")

    @op(launch=lambda x, shift, mask=None: x - shift, like="x", check=check, example=lambda d: ())
    def op_with_check(x: Tensor, shift: float, mask: Tensor | None = None) -> Tensor:
        return x + shift

    x = torch.ones(3)
    assert list(library.OPS.values()) == [op_with_check]
    assert op_with_check(x, 2.0).tolist() == [3.0] * 3 and op_with_check.launch(x, 2.0).tolist() == [-1.0] * 3
    assert seen == [{"op": "op_with_check", "shift": 2.0, "mask": None, "other": 7}] * 2
    op_with_check(x, shift=2.0, mask=x)
    assert seen[-1]["mask"] is not None
    for call in (op_with_check, op_with_check.reference, op_with_check.launch):
        with pytest.raises(ValueError, match=r"^op_with_check: x must be \[N\], got 2, wanted 1; flatten it$"):
            call(x[None], 2.0)
    with pytest.raises(ValueError, match="^op_with_check: x must be"):
        op_with_check(x[None].to("meta"), 2.0)


def test_a_check_of_others_is_given_all() -> None:
    def check(op: str, x: Tensor, **others: Tensor) -> None:
        assert list(others) == ["first", "second"]

    @op(launch=lambda *_: None, check=check)
    def op_of_others(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return x + first + second

    x = torch.ones(2)
    assert op_of_others(x, x, x).tolist() == [3.0, 3.0]


def test_fakes() -> None:
    @op(launch=lambda *_: None, like=("y", "x"))
    def op_like_two(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return y + 1, x + 1

    @op(launch=lambda *_: None)
    def op_like_reference(x: Tensor) -> Tensor:
        return x.sum(1).int()

    x, y = torch.empty(2, 3, device="meta").T, torch.empty(5, dtype=torch.bfloat16, device="meta")
    first, second = op_like_two(x, y)
    assert (first.shape, first.dtype, second.shape, second.dtype) == ((5,), torch.bfloat16, (3, 2), torch.float32)
    assert second.is_contiguous()
    assert (op_like_reference(x).shape, op_like_reference(x).dtype) == ((3,), torch.int32)


def test_dynamo_traces_a_call_as_the_op() -> None:
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x, weight = torch.randn(3, 8), torch.randn(8)
    compiled = torch.compile(lambda x: ops.rms_norm(x, weight, 1e-6), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), ops.rms_norm(x, weight, 1e-6))
    assert targets == [torch.ops.gemma4.rms_norm]
