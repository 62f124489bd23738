"""Pass tests of norm_linear: exact counts, numerics, near misses, dynamic shapes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.packed.inputs import Request
from gemma4_compile.passes import FUSIONS, SWITCHES
from tests.passes.harness import (
    assert_dynamic,
    assert_equal_alone,
    assert_missed,
    assert_same,
    at_yoco_boundary,
    compile_passes,
    forms,
    norm,
    rows,
)
from tests.passes.packed_step import PackedStep

FUSION = "norm_linear"
ON = ("feed_forward_tail", "linear")
PLE = (*ON, "ple_tail", "norm_ple")
OPS = torch.ops.gemma4
WEIGHT, NEXT, SCALAR = rows(16, seed=1), rows(16, seed=2), rows(1, seed=3)
POST, FINAL = norm(seed=9), norm(seed=10)
MATRICES = rows(8, 16, seed=4), rows(4, 16, seed=5), rows(4, 16, seed=6)


def test_exact_count() -> None:
    """Over each layer boundary, but where Hugging Face slices between layers that own keys and those that share them."""
    joined = at_yoco_boundary("joined", "apart")["joined"]  # tails with the norm behind them; the last one's is the head's
    assert forms("e", FUSION, PLE) == {"norm_linear_triple": 1, "norm_linear": joined - 2}
    assert forms("e", FUSION, PLE[:3]) == {}  # the tail is ple_tail's
    assert forms("dense", FUSION, ON) == {"norm_linear_pair": 1}
    assert forms("moe", FUSION, ON) == {}


@pytest.mark.parametrize(("kind", "dtype"), [("e", torch.bfloat16), ("dense", torch.float32)])
def test_equals_unfused(kind: str, dtype: torch.dtype) -> None:
    assert_equal_alone(kind, FUSION, dtype, (*PLE, "qkv_norm_rope", "post_attention_norms", "ple_inputs"))


def test_in_a_packed_step() -> None:
    """Beside all other fusions: each site of the three that put norms inside of products, by its layer."""
    batch = [Request([5, 6, 7, 8, 9]), Request([20] * 13, rows=[3, 12])]
    step = PackedStep("e", SWITCHES)
    (logits, pages), (expected, other) = step(batch), PackedStep("e", None)(batch)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # yoco's products have fewer rows
    assert pages.keys() == other.keys()
    for name, tensor in pages.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5)
    for name in ("norm_gate_up", "norm_ple", FUSION):
        sites = {site.path.removeprefix("model.") for site in step.run.records[0].matched(name)}
        assert sites == set(FUSIONS[name].sites(step.geometry)), name


def test_dynamic_shape() -> None:
    assert_dynamic("dense", FUSION, ON)


def normed(x: Tensor, residual: Tensor, scalar: Tensor | None = SCALAR) -> tuple[Tensor, Tensor]:
    return OPS.feed_forward_tail_norm(x, residual, WEIGHT, scalar, NEXT, 1e-6)


def alike(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    hidden, normal = normed(x, residual)
    return hidden * 2, *OPS.linear_triple(normal, *MATRICES)


def no_scalar(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    hidden, normal = normed(x, residual, None)
    return hidden * 2, *OPS.linear_pair(normal, *MATRICES[:2])


def read_twice(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    hidden, normal = normed(x, residual)
    return hidden * 2, *OPS.linear_triple(normal, *MATRICES), normal * 2


def of_the_sum(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    hidden, normal = normed(x, residual)
    return *OPS.linear_triple(hidden, *MATRICES), normal


def test_the_head_is_left_alone() -> None:
    """A vocabulary of rows, each program with a norm of its own: nothing else reads the last layer's sum."""

    def head(x: Tensor, residual: Tensor) -> Tensor:
        return F.linear(FINAL((residual + POST(x)) * SCALAR), MATRICES[0])

    done = compile_passes(head, {FUSION, *ON})
    with torch.no_grad():
        assert_same(done.call(*inputs()), head(*inputs()))
    assert done.ops == {"feed_forward_tail_norm": 1, "linear": 1}
    assert any("nothing reads the sum" in miss.reason for miss in done.records[0].misses if miss.fusion == FUSION)


def inputs() -> tuple[Tensor, Tensor]:
    return rows(2, 3, 16, seed=7), rows(2, 3, 16, seed=8)


@pytest.mark.parametrize(("function", "op"), [(alike, "norm_linear_triple"), (no_scalar, "norm_linear_pair")])
def test_what_the_near_misses_are_near_to(function: Callable, op: str) -> None:
    done = compile_passes(function, {FUSION})
    assert_same(done.call(*inputs()), function(*inputs()))
    assert done.ops == {op: 1}


@pytest.mark.parametrize(("function", "reason"), [(read_twice, "is also used by"), (of_the_sum, "no linear uses")])
def test_near_miss(function: Callable, reason: str) -> None:
    assert_missed(function, inputs(), FUSION, reason)
