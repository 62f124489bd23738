"""Pass tests of ple_inputs: exact counts, numerics, near misses, dynamic shapes."""

import pytest
import torch
from torch import Tensor

from tests.models import prompt, tiny
from tests.passes.harness import (
    assert_dynamic,
    assert_equal_alone,
    assert_missed,
    assert_same,
    compile_passes,
    forms,
    norm,
    rows,
)

FUSION = "ple_inputs"
NORM = norm(8, seed=1)


def test_exact_count() -> None:
    assert forms("e", FUSION) == {"ple_inputs": 1}
    assert forms("moe", FUSION) == forms("dense", FUSION) == {}


def test_without_the_gather() -> None:
    """As Gemma4ForConditionalGeneration calls the text model: embeddings and per-layer inputs come from outside."""
    model = tiny("e").requires_grad_(False).model
    ids = prompt(2, 5)
    embeds, per_layer = model.embed_tokens(ids), model.get_per_layer_inputs(ids, None)
    done = compile_passes(lambda e, p: model(inputs_embeds=e, per_layer_inputs=p, use_cache=False)[0], {FUSION})
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, per_layer_inputs=per_layer, use_cache=False)[0]
        assert_same(done.call(embeds, per_layer), expected)
    assert done.ops == {"ple_combine": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_unfused(dtype: torch.dtype) -> None:
    assert_equal_alone("e", FUSION, dtype)


def test_dynamic_shape() -> None:
    assert_dynamic("e", FUSION)


def combine(projection: Tensor, tokens: Tensor) -> Tensor:
    return (NORM((projection * 0.25).reshape(2, 3, 5, 8)) + tokens) * 0.7


def minus(projection: Tensor, tokens: Tensor) -> Tensor:
    return (NORM((projection * 0.25).reshape(2, 3, 5, 8)) - tokens) * 0.7


def read_twice(projection: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    normed = NORM((projection * 0.25).reshape(2, 3, 5, 8))
    return (normed + tokens) * 0.7, normed


@pytest.mark.parametrize(
    ("function", "tokens", "reason"),
    [
        (combine, rows(2, 3, 1, 8), "shapes differ"),
        (combine, rows(2, 3, 5, 8).double(), "dtypes differ"),
        (minus, rows(2, 3, 5, 8), "expected add"),
        (read_twice, rows(2, 3, 5, 8), "is also used by"),
    ],
)
def test_near_miss(function, tokens: Tensor, reason: str) -> None:
    assert_missed(function, (rows(2, 3, 40), tokens), FUSION, reason)
