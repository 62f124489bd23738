"""Pass tests of norm_gate_up: exact counts, numerics, near misses, dynamic shapes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.harness import assert_dynamic, assert_equal_alone, assert_missed, assert_same, compile_passes, forms, rows

FUSION = "norm_gate_up"
ON = ("post_attention_norms", "gate_up")
OPS = torch.ops.gemma4
WEIGHT, NEXT = rows(16, seed=1), rows(16, seed=2)
GATE, UP = rows(24, 16, seed=3), rows(24, 16, seed=4)
Pair = tuple[Tensor, Tensor]


def test_exact_count() -> None:
    assert forms("e", FUSION, ON) == {"norm_gate_up": 4}
    assert forms("dense", FUSION, ON) == {"norm_gate_up": 2}
    assert forms("moe", FUSION, ON) == {}  # three norms read the sum there
    assert forms("dense", FUSION, ON[:1]) == forms("dense", FUSION, ON[1:]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_unfused(dtype: torch.dtype) -> None:
    assert_equal_alone("dense", FUSION, dtype, (*ON, "qkv_norm_rope", "feed_forward_tail"))


def test_dynamic_shape() -> None:
    assert_dynamic("dense", FUSION, ON)


def normed(x: Tensor, residual: Tensor) -> Pair:
    return OPS.post_attention_norm(x, residual, WEIGHT, NEXT, 1e-6)


def alike(x: Tensor, residual: Tensor) -> Pair:
    hidden, normal = normed(x, residual)
    return hidden, OPS.gate_up(normal, GATE, UP)


def read_twice(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, normal = normed(x, residual)
    return hidden, OPS.gate_up(normal, GATE, UP), normal * 2


def of_the_sum(x: Tensor, residual: Tensor) -> Pair:
    hidden, normal = normed(x, residual)
    return OPS.gate_up(hidden, GATE, UP), normal


def one_product(x: Tensor, residual: Tensor) -> Pair:
    hidden, normal = normed(x, residual)
    return hidden, OPS.linear(normal, GATE)


def inputs() -> Pair:
    return rows(2, 3, 16, seed=5), rows(2, 3, 16, seed=6)


def test_what_the_near_misses_are_near_to() -> None:
    done = compile_passes(alike, {FUSION})
    assert_same(done.call(*inputs()), alike(*inputs()))
    assert done.ops == {FUSION: 1}


@pytest.mark.parametrize(
    ("function", "reason"),
    [(read_twice, "is also used by"), (of_the_sum, "no gate_up uses"), (one_product, "no gate_up uses")],
)
def test_near_miss(function: Callable, reason: str) -> None:
    assert_missed(function, inputs(), FUSION, reason)
