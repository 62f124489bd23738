"""Pass tests of linear: exact counts, numerics, near misses, dynamic shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.passes import FUSIONS
from tests.models import prompt, tiny
from tests.passes.harness import assert_dynamic, assert_equal_alone, assert_missed, assert_same, compile_passes, forms, rows

FUSION = "linear"
WEIGHTS = [rows(8 * i, 16, seed=i) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("e", {"linear_triple": 2, "linear_pair": 4, "linear": 20}),
        ("dense", {"linear_triple": 1, "linear_pair": 3, "linear": 5}),
    ],
)
def test_exact_count(kind: str, expected: dict[str, int]) -> None:
    """Alone: gate and up are a pair too."""
    assert forms(kind, FUSION) == expected


def test_exact_count_beside_the_others() -> None:
    """What other fusions hold is theirs: q, k, v; o; down of each layer, the PLE projection and the head are left."""
    model = tiny("e").requires_grad_(False)
    inside = {"norm_gate_up", "norm_ple", "norm_linear"}  # which take the norm in front of a product into it
    enabled = {name for name, fusion in FUSIONS.items() if fusion.on_by_default} - inside
    done = compile_passes(lambda ids: model(ids, use_cache=False).logits, enabled)
    with torch.no_grad():
        done.call(prompt(2, 6))
    found = {name: count for name, count in done.ops.items() if name.startswith("linear") or name == "gate_up"}
    assert found == {"linear_triple": 2, "linear": 2 + 4 + 4 + 2, "gate_up": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["e", "moe"])
def test_equals_unfused(kind: str, dtype: torch.dtype) -> None:
    assert_equal_alone(kind, FUSION, dtype)


@pytest.mark.parametrize("kind", ["e", "moe"])
def test_dynamic_shape(kind: str) -> None:
    assert_dynamic(kind, FUSION)


def test_four_of_one_input_are_three_and_one() -> None:
    def four(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, weight) for weight in WEIGHTS)

    x = rows(2, 3, 16)
    done = compile_passes(four, {FUSION})
    assert_same(done.call(x), four(x))
    assert done.ops == {"linear_triple": 1, "linear": 1}


def with_bias(x: Tensor) -> Tensor:
    return F.linear(x, WEIGHTS[0], WEIGHTS[0][:, 0])


def one_vector(x: Tensor) -> Tensor:
    return F.linear(x[0, 0], WEIGHTS[0])


def one_output(x: Tensor) -> Tensor:
    return F.linear(x, WEIGHTS[0][0])


def in_doubles(x: Tensor) -> Tensor:
    return F.linear(x.double(), WEIGHTS[0].double())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (with_bias, "expected None"),
        (one_vector, "must be [N, K]"),
        (one_output, "must be [N, K]"),
        (in_doubles, "no kernel for float64"),
    ],
)
def test_near_miss(function, reason: str) -> None:
    assert_missed(function, (rows(2, 3, 16),), FUSION, reason)
