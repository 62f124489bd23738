"""Pass tests of route: exact counts, numerics, near misses, dynamic shapes."""

import pytest
import torch
from torch import Tensor

from tests.models import DEVICE
from tests.passes.harness import assert_dynamic, assert_equal_alone, assert_missed, forms, rows

FUSION = "route"
SCALE = torch.linspace(0.5, 1.5, 8).to(DEVICE)


def test_exact_count() -> None:
    assert forms("moe", FUSION) == {"route": 3}
    assert forms("e", FUSION) == forms("dense", FUSION) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_unfused(dtype: torch.dtype) -> None:
    assert_equal_alone("moe", FUSION, dtype)


def test_dynamic_shape() -> None:
    assert_dynamic("moe", FUSION)


def router(logits: Tensor, dim: int = -1, dtype: torch.dtype = torch.float32, renormalize: bool = True) -> tuple:
    probabilities = torch.nn.functional.softmax(logits, dim=dim, dtype=dtype)
    weights, indices = torch.topk(probabilities, k=2, dim=-1)
    if renormalize:
        weights /= weights.sum(dim=-1, keepdim=True)
    return weights * SCALE[indices], indices, probabilities


def whole(logits: Tensor) -> tuple:
    return router(logits)[:2]


def over_tokens(logits: Tensor) -> tuple:
    return router(logits, dim=0)[:2]


def double(logits: Tensor) -> tuple:
    return router(logits, dtype=torch.float64)[:2]


def not_renormalized(logits: Tensor) -> tuple:
    return router(logits, renormalize=False)[:2]


def probabilities_read(logits: Tensor) -> tuple:
    return router(logits)


@pytest.mark.parametrize(
    ("function", "logits", "reason"),
    [
        (over_tokens, rows(5, 8), "expected -1, found 0"),
        (double, rows(5, 8), "expected torch.float32"),
        (not_renormalized, rows(5, 8), "expected truediv"),
        (probabilities_read, rows(5, 8), "is also used by"),
        (whole, rows(2, 5, 8), "logits must be [tokens, experts]"),
        (whole, rows(5, 8).double(), "no kernel for float64"),
    ],
)
def test_near_miss(function, logits: Tensor, reason: str) -> None:
    assert_missed(function, (logits,), FUSION, reason)
