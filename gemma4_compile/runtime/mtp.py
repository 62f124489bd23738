"""A round of multi-token prediction on the device: which drafts the target has confirmed, and the next ones.

The sampler samples behind each draft as it would without drafts: logits, seed and place of a token are the same if all tokens
before it are. So a draft is right if it is the token sampled in its place, and the tokens up to the first that is wrong, with
the one sampled there, are those that the request would have got one by one: greedy or sampled, whatever the drafts.

What a round is told of its R requests (`StepArrays.rounds`):

    first        [R] int64     the first of each request's rows among the S sampled ones, which stand together
    drafts       [R, K] int64  the tokens that its next rows stand for; -1 behind them
    states       [R] int64     the first of its rows among the N wanted ones
    positions    [R] int64     position of that row
    table.KIND   [R, pages] int32
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from .batch import KINDS


class Drafts(Protocol):
    """What drafts, see drafter.py."""

    speculative_tokens: int

    def draft(self, tokens: Tensor, hidden: Tensor, positions: Tensor, tables: dict[str, Tensor]) -> Tensor:
        """Draft tokens [R, K] to follow `tokens`."""


def finish_round(drafter: Drafts, tokens: Tensor, hidden: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How many drafts of each request are accepted, [R], and its next ones, [R, K]; nothing waits for the device.

    tokens  [S]     sampled
    hidden  [N, H]  final-normed states of the wanted rows
    given   what a round is told, on the device
    """
    accepted = count_accepted(tokens, given["first"], given["drafts"])
    tables = {kind: given[f"table.{kind}"] for kind in KINDS}
    last = tokens[given["first"] + accepted]
    drafts = drafter.draft(last, hidden[given["states"] + accepted], given["positions"] + accepted, tables)
    return {"accepted": accepted, "drafts": drafts}


def count_accepted(tokens: Tensor, first: Tensor, drafts: Tensor) -> Tensor:
    """Leading drafts of each request that are the tokens sampled in their places, [R] int64."""
    places = first[:, None] + torch.arange(drafts.shape[1], device=drafts.device)
    # Behind a request's rows stand those of the next, or none: no token is -1.
    sampled = tokens[places.clamp(max=len(tokens) - 1)]
    return (sampled == drafts).long().cumprod(1).sum(1)
