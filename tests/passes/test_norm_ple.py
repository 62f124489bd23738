"""Pass tests of norm_ple: exact counts, numerics, near misses, dynamic shapes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.harness import (
    assert_dynamic,
    assert_equal_alone,
    assert_missed,
    assert_same,
    at_yoco_boundary,
    compile_passes,
    forms,
    rows,
)

FUSION = "norm_ple"
ON = ("ple_tail", "feed_forward_tail")
OPS = torch.ops.gemma4
WEIGHT, POST, NEXT, SCALAR = rows(16, seed=1), rows(16, seed=2), rows(16, seed=3), rows(1, seed=4)
GATE, PROJECTION = rows(8, 16, seed=5), rows(16, 8, seed=6)
Pair = tuple[Tensor, Tensor]


def test_exact_count() -> None:
    assert forms("e", FUSION, ON) == at_yoco_boundary("norm_ple_norm", "norm_ple")
    assert forms("dense", FUSION, ON) == forms("moe", FUSION, ON) == forms("e", FUSION, ON[:1]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_unfused(dtype: torch.dtype) -> None:
    assert_equal_alone("e", FUSION, dtype, (*ON, "qkv_norm_rope", "post_attention_norms", "ple_inputs"))


def test_dynamic_shape() -> None:
    assert_dynamic("e", FUSION, ON)


def tail(hidden: Tensor, ple: Tensor) -> Pair:
    return OPS.ple_tail_norm(hidden, ple, GATE, PROJECTION, POST, SCALAR, NEXT, 1e-6)


def alike(x: Tensor, residual: Tensor, ple: Tensor) -> Pair:
    return tail(OPS.feed_forward_tail(x, residual, WEIGHT, None, 1e-6), ple)


def scaled(x: Tensor, residual: Tensor, ple: Tensor) -> Pair:
    return tail(OPS.feed_forward_tail(x, residual, WEIGHT, SCALAR, 1e-6), ple)


def read_twice(x: Tensor, residual: Tensor, ple: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden = OPS.feed_forward_tail(x, residual, WEIGHT, None, 1e-6)
    return *tail(hidden, ple), hidden * 2


def other_eps(x: Tensor, residual: Tensor, ple: Tensor) -> Pair:
    return tail(OPS.feed_forward_tail(x, residual, WEIGHT, None, 1e-5), ple)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return rows(2, 3, 16, seed=7), rows(2, 3, 16, seed=8), rows(2, 3, 8, seed=9)


def test_what_the_near_misses_are_near_to() -> None:
    done = compile_passes(alike, {FUSION})
    assert_same(done.call(*inputs()), alike(*inputs()))
    assert done.ops == {FUSION: 1, "feed_forward_tail_norm": 1}


@pytest.mark.parametrize(
    ("function", "reason"),
    [(scaled, "expected None"), (read_twice, "is also used by"), (other_eps, "both must be the same")],
)
def test_near_miss(function: Callable, reason: str) -> None:
    assert_missed(function, inputs(), FUSION, reason)
