"""Penalties and log-probabilities against transformers, and against their definitions token by token."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from gemma4_compile.ops.sampling.logits import apply_penalties, logprobs_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
V = 40


def state(slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """counts and prompt_seen"""
    return torch.randint(0, 3, (slots, V), dtype=torch.int32) * (torch.rand(slots, V) < 0.3), torch.rand(slots, V) < 0.3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalties_token_by_token(dtype: torch.dtype):
    logits = (torch.randn(3, V) * 5).to(dtype)
    (counts, seen), slots = state(5), torch.tensor([4, 0, 4])
    repetition, presence, frequency = (
        torch.tensor([1.3, 0.7, 1.0]),
        torch.tensor([0.5, -0.2, 0.0]),
        torch.tensor([0.1, 0.0, 2.0]),
    )
    before = logits.clone()
    actual = apply_penalties(logits, counts, seen, slots, repetition, presence, frequency)
    assert actual.dtype == torch.float32
    assert torch.equal(logits, before)
    for row, slot in enumerate(slots.tolist()):
        for token in range(V):
            x, count = logits[row, token].item(), counts[slot, token].item()
            if count or seen[slot, token]:
                r = repetition[row].item()
                x = x / r if x > 0 else x * r
            x -= frequency[row].item() * count + presence[row].item() * (count > 0)
            assert actual[row, token].item() == pytest.approx(x, abs=1e-5)


def test_no_penalties_change_nothing():
    logits, (counts, seen), slots = torch.randn(2, V), state(2), torch.arange(2)
    logits[0, 3] = -torch.inf
    ones, zeros = torch.ones(2), torch.zeros(2)
    actual = apply_penalties(logits, counts, seen, slots, ones, zeros, zeros)
    assert torch.equal(actual, logits)
    assert actual.data_ptr() != logits.data_ptr()


def test_repetition_as_transformers():
    logits, tokens = torch.randn(2, V) * 5, torch.randint(0, V, (2, 12))
    counts, seen = torch.zeros(2, V, dtype=torch.int32), torch.zeros(2, V, dtype=torch.bool)
    seen.scatter_(1, tokens[:, :7], True)
    counts.scatter_add_(1, tokens[:, 7:], torch.ones(2, 5, dtype=torch.int32))
    zeros = torch.zeros(2)
    actual = apply_penalties(logits, counts, seen, torch.arange(2), torch.tensor([1.2, 1.2]), zeros, zeros)
    torch.testing.assert_close(actual, RepetitionPenaltyLogitsProcessor(1.2)(tokens, logits.clone()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs(dtype: torch.dtype):
    logits, tokens = (torch.randn(4, V) * 5).to(dtype), torch.tensor([0, 7, 39, 5])
    exact = torch.log_softmax(logits.double(), dim=1)
    chosen, ranks, values, ids = logprobs_of(logits, tokens, 6)
    assert (chosen.dtype, ranks.dtype, values.dtype, ids.dtype) == (torch.float32, torch.int64, torch.float32, torch.int64)
    torch.testing.assert_close(chosen.double(), exact[torch.arange(4), tokens], rtol=0, atol=1e-5)
    torch.testing.assert_close(values.double(), exact.topk(6).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(values.double(), exact.gather(1, ids), rtol=0, atol=1e-5)
    assert ranks.tolist() == [1 + sum(row > row[t]).item() for row, t in zip(logits, tokens, strict=True)]


def test_logprobs_of_the_best_of_equals_and_of_none():
    logits = torch.tensor([[1.0, 2.0, 2.0, -torch.inf]] * 3)
    chosen, ranks, values, ids = logprobs_of(logits, torch.tensor([1, 2, 3]), 0)
    assert ranks.tolist() == [1, 1, 4]
    assert chosen[2] == -torch.inf
    assert values.shape == ids.shape == (3, 0)
    assert [t.shape for t in logprobs_of(logits[:0], torch.zeros(0, dtype=torch.int64), 2)] == [(0,), (0,), (0, 2), (0, 2)]


def test_wrong_shapes():
    logits, (counts, seen), slots, one = torch.randn(2, V), state(3), torch.arange(2), torch.ones(2)
    with pytest.raises(
        ValueError, match="apply_penalties: prompt_seen must have the shape of counts, got .3, 39., wanted .3, 40."
    ):
        apply_penalties(logits, counts, seen[:, :-1], slots, one, one, one)
    with pytest.raises(ValueError, match="apply_penalties: presence must be .N. for logits .N, V., got .1., wanted .2.; pass"):
        apply_penalties(logits, counts, seen, slots, one, one[:1], one)
    with pytest.raises(ValueError, match="logprobs_of: tokens must be .N."):
        logprobs_of(logits, slots[:1], 3)
    with pytest.raises(ValueError, match="logprobs_of: top must lie in 0..V, got False, wanted True; ask for fewer"):
        logprobs_of(logits, slots, V + 1)
