"""Pass tests of gate_up: exact counts, numerics, near misses, dynamic shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.harness import assert_dynamic, assert_equal_alone, assert_missed, forms, rows

FUSION = "gate_up"
GATE, UP = rows(24, 16, seed=1), rows(24, 16, seed=2)
STATE = rows(2, 3, 24, seed=3)


def test_exact_count() -> None:
    assert forms("dense", FUSION) == {"gate_up": 2}
    assert forms("e", FUSION) == {"gate_up": 4}  # the PLE gate's up is no product
    assert forms("moe", FUSION) == {"gate_up": 3}  # the dense branch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["e", "moe"])
def test_equals_unfused(kind: str, dtype: torch.dtype) -> None:
    assert_equal_alone(kind, FUSION, dtype)


def test_dynamic_shape() -> None:
    assert_dynamic("dense", FUSION)


def mlp(x: Tensor, other: Tensor, bias: Tensor | None = None, up: Tensor = UP) -> Tensor:
    return F.gelu(F.linear(x, GATE, bias), approximate="tanh") * F.linear(other, up)


def other_input(x: Tensor) -> Tensor:
    return mlp(x, x * 2)


def with_bias(x: Tensor) -> Tensor:
    return mlp(x, x, bias=GATE[:, 0])


def up_read_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    up = F.linear(x, UP)
    return F.gelu(F.linear(x, GATE), approximate="tanh") * up, up


def no_product(x: Tensor) -> Tensor:
    return F.gelu(F.linear(x, GATE), approximate="tanh") * STATE


def one_vector(x: Tensor) -> Tensor:
    vector = x[0, 0]
    return mlp(vector, vector)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (other_input, "both must be the same"),
        (with_bias, "expected None"),
        (up_read_twice, "is also used by"),
        (no_product, "expected linear"),
        (one_vector, "must be [N, K]"),
    ],
)
def test_near_miss(function, reason: str) -> None:
    assert_missed(function, (rows(2, 3, 16),), FUSION, reason)
