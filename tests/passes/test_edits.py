"""Graphs that somebody edited: writes in place amid a match, views of what is written, other shapes and dtypes, rows that mix.
A site that the op does not fit stays as it is; the result is eager's in any case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from gemma4_compile import OptimizeConfig, report
from gemma4_compile.passes import FUSIONS
from tests.models import prompt, tiny
from tests.passes.harness import compile_passes, passes_only

NORMS = [Gemma4RMSNorm(16).requires_grad_(False) for _ in range(2)]
for _norm in NORMS:
    _norm.weight.copy_(torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.5)
Edit = Callable[[Tensor], Any]


def linear_pair(x: Tensor, r: Tensor, a: Tensor, b: Tensor, edit: Edit) -> tuple[Tensor, ...]:
    first = F.linear(x, a)
    edit(x)
    return first, F.linear(x, b)


def gate_up(x: Tensor, r: Tensor, a: Tensor, b: Tensor, edit: Edit) -> tuple[Tensor, ...]:
    gate = F.linear(x, a)
    edit(x)
    return (F.gelu(gate, approximate="tanh") * F.linear(x, b),)


def tail(x: Tensor, r: Tensor, a: Tensor, b: Tensor, edit: Edit) -> tuple[Tensor, ...]:
    y = NORMS[0](x)
    edit(x)
    return r + y, x


def residual_of_a_tail(x: Tensor, r: Tensor, a: Tensor, b: Tensor, edit: Edit) -> tuple[Tensor, ...]:
    y = NORMS[0](x)
    edit(r)
    return (r + y,)


def post_attention(x: Tensor, r: Tensor, a: Tensor, b: Tensor, edit: Edit) -> tuple[Tensor, ...]:
    h = r + NORMS[0](x)
    edit(h)
    return h, NORMS[1](h)


def norm(x: Tensor, r: Tensor, a: Tensor, b: Tensor, edit: Edit) -> tuple[Tensor, ...]:
    y = x.float()
    squares = y.pow(2).mean(-1, keepdim=True) + 1e-6
    edit(x)
    return ((y * torch.pow(squares, -0.5) * NORMS[0].weight.float()).type_as(x),)


FUNCTIONS = (linear_pair, gate_up, tail, residual_of_a_tail, post_attention, norm)


def set_item(x: Tensor) -> None:
    x[:, 0] = 1.0


def through_a_view(x: Tensor) -> None:
    x.view(-1, 16)[1:].mul_(2.0)


def operators(x: Tensor) -> None:
    x *= 2.0
    x += 1.0


EDITS: dict[str, Edit] = {
    "nothing": lambda x: None, "method": lambda x: x.mul_(2.0).add_(1.0), "operators": operators, "item": set_item,
    "view": through_a_view, "out": lambda x: torch.add(x, 1.0, out=x), "copy": lambda x: x.copy_(x.flip(0)),
    "reading": lambda x: x.sum(),
}  # fmt: skip


def assert_eager(function: Callable[..., Any], *args: Tensor) -> Any:
    wanted = function(*(arg.clone() for arg in args))
    compiled = compile_passes(function, FUSIONS)
    with torch.no_grad():
        actual = compiled.call(*(arg.clone() for arg in args))
    for mine, right in zip(actual, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    return compiled


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(FUNCTIONS), st.sampled_from(sorted(EDITS)), st.booleans(), st.integers(1, 3))
def test_writes_amid_a_match(function: Any, edit: str, before: bool, rows: int) -> None:
    torch.manual_seed(0)

    def edited(x: Tensor, r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        x, r = x * 1.0, r * 1.0
        if before:
            EDITS[edit](x)
        return function(x, r, a, b, EDITS[edit])

    args = torch.randn(2, rows, 16), torch.randn(2, rows, 16), torch.randn(16, 16), torch.randn(16, 16)
    compiled = assert_eager(edited, *args)
    if edit in ("nothing", "reading"):
        assert any(record.sites for record in compiled.records), "what changes nothing is no reason to leave a site"


def viewed(x: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    h = x + r
    flat = h.reshape(-1, h.shape[-1])
    h *= s
    return (flat.sum(0),)


def one_row(x: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    h = x * r
    last = h[:, -1]
    h += s
    return (last * 2,)


def of_topk(x: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    weights, _ = torch.topk(x, 2, dim=-1)
    best = weights[..., 0]
    weights /= weights.sum(-1, keepdim=True)
    return (best,)


@pytest.mark.parametrize("function", [viewed, one_row, of_topk])
def test_views_of_what_is_written(function: Any) -> None:
    assert_eager(function, torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.full((1,), 0.5))


def test_a_scalar_of_many_dimensions() -> None:
    """The product has as many; the op's result has those of the states."""

    def scaled(x: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return (((r + NORMS[0](x)) * s).relu(),)

    states = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    assert_eager(scaled, *states, torch.full((1, 1, 1, 1), 0.7))
    compiled = assert_eager(scaled, *states, torch.full((1,), 0.7))
    assert any(site.fusion == "feed_forward_tail" for record in compiled.records for site in record.sites)


@pytest.mark.parametrize(("scale", "table"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("shape", [(2, 3, 2, 8), (1, 6, 2, 8)])
def test_per_layer_inputs_in_other_dtypes_and_shapes(scale: str, table: str, shape: tuple[int, ...]) -> None:
    dtype = getattr(torch, table)
    per_layer = Gemma4RMSNorm(8).requires_grad_(False).to(dtype)
    embed_scale = torch.tensor(24**0.5)

    def inputs(ids: Tensor, weights: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
        tokens = F.embedding(ids, weights, 0, None, 2.0, False, False) * embed_scale.to(getattr(torch, scale))
        return ((per_layer((projection * 0.25).reshape(*shape)) + tokens.reshape(*shape)) * 0.5,)

    args = torch.randint(11, (2, 3)), torch.randn(11, 16).to(dtype), torch.randn(2, 3, 16).to(dtype)
    wanted = inputs(*args)[0]
    compiled = compile_passes(inputs, FUSIONS)
    with torch.no_grad():
        (actual,) = compiled.call(*args)
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    fused = any(site.rewrite == "ple_inputs" for record in compiled.records for site in record.sites)
    assert fused == (scale == table and shape == (2, 3, 2, 8))


def in_pairs(mlp: Any) -> Callable[[Tensor], Tensor]:
    plain, wide = mlp.forward, Gemma4RMSNorm(128).requires_grad_(False)
    return lambda x: plain(wide(x.view(x.shape[0], -1, 128)).view(x.shape))


def with_each_other(mlp: Any) -> Callable[[Tensor], Tensor]:
    plain = mlp.forward
    return lambda x: (y := plain(x)) + y.transpose(0, 1)


@pytest.mark.parametrize("change", [in_pairs, with_each_other])
@pytest.mark.filterwarnings("ignore:gemma4_compile runs this call")
@torch.no_grad()
def test_rows_that_mix_behind_the_boundary(change: Any) -> None:
    def edited() -> Any:
        model = tiny("e").requires_grad_(False)
        mlp: Any = model.model.layers[3].mlp
        mlp.forward = change(mlp)
        return model

    rows = torch.tensor([1, 4, 6, 9])
    options: dict[str, Any] = {"logits_to_keep": rows, "use_cache": False}
    plain, model = edited(), passes_only(edited(), OptimizeConfig(packed=False))
    torch.testing.assert_close(
        model(prompt(1, 10), **options).logits, plain(prompt(1, 10), **options).logits, rtol=2e-5, atol=2e-5
    )
    (miss,) = report(model).fusions["yoco"].unmatched
    assert "is not known to treat rows one by one" in miss.reason
