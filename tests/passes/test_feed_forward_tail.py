"""Pass tests of feed_forward_tail: exact counts, numerics, near misses, dynamic shapes."""

import pytest
import torch
from torch import Tensor

from tests.models import DEVICE
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

FUSION = "feed_forward_tail"
POST, NEXT = norm(seed=1), norm(seed=2)
VECTOR = torch.linspace(0.5, 1.5, 16).to(DEVICE)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # without ple_tail, the PLE tail is one more norm + residual + scalar + next norm
        ("e", {"feed_forward_tail": 4} | at_yoco_boundary("feed_forward_tail_norm", "feed_forward_tail_scalar")),
        ("moe", {"moe_feed_forward_tail_norm": 3}),
        ("dense", {"feed_forward_tail_norm": 2}),
    ],
)
def test_exact_count(kind: str, expected: dict[str, int]) -> None:
    assert forms(kind, FUSION) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["e", "moe", "dense"])
def test_equals_unfused(kind: str, dtype: torch.dtype) -> None:
    assert_equal_alone(kind, FUSION, dtype)


@pytest.mark.parametrize("kind", ["e", "moe", "dense"])
def test_dynamic_shape(kind: str) -> None:
    assert_dynamic(kind, FUSION)


def post_attention(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + POST(x)
    return hidden, NEXT(hidden)


def vector_scalar(x: Tensor, residual: Tensor) -> Tensor:
    return (residual + POST(x)) * VECTOR


def sum_read_twice(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + POST(x)
    return hidden * torch.ones(1, device=DEVICE), hidden.mean()


def test_vector_scalar_stays_outside() -> None:
    """Norm and residual still fuse; a vector in the place of the layer scalar does not join them."""
    x, residual = rows(2, 3, 16), rows(2, 3, 16, seed=6)
    done = compile_passes(vector_scalar, {FUSION})
    assert_same(done.call(x, residual), vector_scalar(x, residual))
    assert done.ops == {"feed_forward_tail": 1}


def test_sum_read_twice_keeps_its_scalar_outside() -> None:
    """The sum before the scalar is needed elsewhere, so only norm + residual fuse."""
    x, residual = rows(2, 3, 16), rows(2, 3, 16, seed=6)
    done = compile_passes(sum_read_twice, {FUSION})
    for actual, expected in zip(done.call(x, residual), sum_read_twice(x, residual), strict=True):
        assert_same(actual, expected)
    assert done.ops == {"feed_forward_tail": 1}


@pytest.mark.parametrize(
    ("function", "residual", "reason"),
    [
        (post_attention, rows(2, 3, 16), "a site of post_attention_norms"),
        (post_attention, rows(2, 1, 16), "shapes differ"),
        (sum_read_twice, rows(2, 3, 16).double(), "dtypes differ"),
    ],
)
def test_near_miss(function, residual: Tensor, reason: str) -> None:
    assert_missed(function, (rows(2, 3, 16), residual), FUSION, reason)
