"""Forced acceptance: with random weights no draft would be right, so chance decides which count as right."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gemma4_compile.runtime.speculative import verification
from gemma4_compile.runtime.worker import model_runner


@contextmanager
def forced(tokens_a_round: float, drafts: int) -> Iterator[None]:
    """Within it, greedy rounds accept so many drafts that they give so many tokens on average. Tokens are then not the model's.

    Raises ValueError for fewer than one, or more than drafts + 1."""
    if not 1 <= tokens_a_round <= drafts + 1:
        raise ValueError(f"tokens a round must be 1 to {drafts + 1} with {drafts} drafts, got {tokens_a_round}; draft more")
    chance = _chance(tokens_a_round, drafts)

    def propose(
        drafter: Any, state: Any, tokens: Tensor, hidden: Tensor, step: Any, drafts: int, accepted: Tensor | None, draws: bool
    ) -> Tensor:  # fmt: skip
        made = verification.verified_drafts(state, step.speculation)
        right = (torch.rand(made.shape, device=made.device) < chance) & (made >= 0)
        return verification.propose(drafter, state, tokens, hidden, step, drafts, right.long().cumprod(1).sum(1), draws)

    with mock.patch.object(model_runner, "propose", propose):
        yield


def _chance(tokens_a_round: float, drafts: int) -> float:
    """Of each draft behind right ones; by bisection of a sum that grows with it."""
    low, high = 0.0, 1.0
    for _ in range(50):
        chance = (low + high) / 2
        more = sum(chance**i for i in range(drafts + 1)) > tokens_a_round
        low, high = (low, chance) if more else (chance, high)
    return low
