"""Pass tests of post_attention_norms: exact counts, numerics, near misses, dynamic shapes."""

import pytest
import torch
from torch import Tensor

from tests.passes.harness import assert_dynamic, assert_equal_alone, assert_missed, forms, norm, rows

FUSION = "post_attention_norms"
POST, NEXT = norm(seed=1), norm(seed=2)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("e", {"post_attention_norm": 4}), ("moe", {"post_attention_norms": 3}), ("dense", {"post_attention_norm": 2})],
)
def test_exact_count(kind: str, expected: dict[str, int]) -> None:
    assert forms(kind, FUSION) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["e", "moe", "dense"])
def test_equals_unfused(kind: str, dtype: torch.dtype) -> None:
    assert_equal_alone(kind, FUSION, dtype)


@pytest.mark.parametrize("kind", ["e", "moe"])
def test_dynamic_shape(kind: str) -> None:
    assert_dynamic(kind, FUSION)


def broadcast(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + POST(x)
    return hidden, NEXT(hidden)


def second_user(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    normed = POST(x)
    hidden = residual + normed
    return hidden, NEXT(hidden), normed * 2


def swapped(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = POST(x) + residual
    return hidden, NEXT(hidden)


def no_stream(x: Tensor, residual: Tensor) -> Tensor:
    return NEXT(residual + POST(x))


def other_eps(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + POST(x)
    return hidden, OTHER(hidden)


OTHER = norm(seed=4)
OTHER.eps = 1e-5


@pytest.mark.parametrize(
    ("function", "residual", "reason"),
    [
        (broadcast, rows(1, 3, 16), "shapes differ"),
        (broadcast, rows(2, 3, 16).double(), "dtypes differ"),
        (second_user, rows(2, 3, 16), "is also used by"),
        (swapped, rows(2, 3, 16), "expected rms_norm"),
        (no_stream, rows(2, 3, 16), "no residual stream"),
        (other_eps, rows(2, 3, 16), "eps is"),
    ],
)
def test_near_miss(function, residual: Tensor, reason: str) -> None:
    assert_missed(function, (rows(2, 3, 16), residual), FUSION, reason)
