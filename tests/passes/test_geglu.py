"""Pass tests of geglu: exact counts, numerics, near misses, dynamic shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.harness import assert_dynamic, assert_equal_alone, assert_missed, forms, rows

FUSION = "geglu"


def test_exact_count() -> None:
    assert forms("dense", FUSION) == {"geglu": 2}
    assert forms("e", FUSION) == {"geglu": 8}  # and the PLE gates
    assert forms("moe", FUSION) == {"geglu": 6}  # and the experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["e", "moe"])
def test_equals_unfused(kind: str, dtype: torch.dtype) -> None:
    assert_equal_alone(kind, FUSION, dtype)


def test_dynamic_shape() -> None:
    assert_dynamic("dense", FUSION)


def tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def erf(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def swapped(gate: Tensor, up: Tensor) -> Tensor:
    return up * F.gelu(gate, approximate="tanh")


def read_twice(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    activated = F.gelu(gate, approximate="tanh")
    return activated * up, activated


@pytest.mark.parametrize(
    ("function", "up", "reason"),
    [
        (erf, rows(4, 16), "expected 'tanh', found None"),
        (swapped, rows(4, 16), "expected gelu"),
        (read_twice, rows(4, 16), "is also used by"),
        (tanh, rows(1, 16), "shapes differ"),
        (tanh, rows(4, 16).bfloat16(), "dtypes differ"),
    ],
)
def test_near_miss(function, up: Tensor, reason: str) -> None:
    assert_missed(function, (rows(4, 16), up), FUSION, reason)
