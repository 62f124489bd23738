"""Pass tests of ple_tail: exact counts, numerics, near misses, dynamic shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import DEVICE
from tests.passes.harness import assert_dynamic, assert_equal_alone, assert_missed, at_yoco_boundary, forms, norm, rows

FUSION = "ple_tail"
POST = norm(seed=1)
GATE, PROJECTION, SCALAR = rows(8, 16, seed=11), rows(16, 8, seed=12), torch.full((1,), 0.7).to(DEVICE)


def test_exact_count() -> None:
    # the last layer joins the norm of the model
    assert forms("e", FUSION) == at_yoco_boundary("ple_tail_norm", "ple_tail")
    assert forms("moe", FUSION) == forms("dense", FUSION) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_unfused(dtype: torch.dtype) -> None:
    assert_equal_alone("e", FUSION, dtype)


def test_dynamic_shape() -> None:
    assert_dynamic("e", FUSION)


def tail(hidden: Tensor, ple: Tensor, gate_reads: Tensor, approximate: str = "tanh") -> tuple[Tensor, Tensor]:
    gated = F.gelu(F.linear(gate_reads, GATE), approximate=approximate) * ple
    return (hidden + POST(F.linear(gated, PROJECTION))) * SCALAR, gated


def other_input(hidden: Tensor, ple: Tensor) -> Tensor:
    return tail(hidden, ple, hidden * 2)[0]


def erf(hidden: Tensor, ple: Tensor) -> Tensor:
    return tail(hidden, ple, hidden, "none")[0]


def gate_read_twice(hidden: Tensor, ple: Tensor) -> tuple[Tensor, Tensor]:
    return tail(hidden, ple, hidden)


def plain(hidden: Tensor, ple: Tensor) -> Tensor:
    return tail(hidden, ple, hidden)[0]


@pytest.mark.parametrize(
    ("function", "ple", "reason"),
    [
        (other_input, rows(2, 3, 8), "both must be the same"),
        (erf, rows(2, 3, 8), "expected geglu"),
        (gate_read_twice, rows(2, 3, 8), "is also used by"),
        (plain, rows(1, 3, 8), "expected geglu"),  # a broadcast per-layer input: its geglu was not raised
    ],
)
def test_near_miss(function, ple: Tensor, reason: str) -> None:
    assert_missed(function, (rows(2, 3, 16), ple), FUSION, reason)
