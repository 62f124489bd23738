"""Rounds of drafts for the tests of verify: a target and a drafter whose next token depends on the last one alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma4_compile.ops import draw_draft
from tests.ops.sample_cases import MIXES, awkward, parameters


def mixture(
    requests: int, most: int, width: int, candidates: int | None = None, *, greedy: int = 7, spare: int = 2, mixes: Any = MIXES
) -> list[Any]:
    """Arguments of the op but for `block`: ragged counts, each mix of parameters, rows in any order and `spare` unused ones.

    The drafter's scores resemble the target's logits; its candidates are its likeliest, in any order."""
    counts = torch.randint(0, most + 1, (requests,))
    ends = (counts + 1).cumsum(0)
    order = torch.randperm(requests)
    first = torch.empty_like(counts)
    lengths = (counts + 1)[order]
    first[order] = lengths.cumsum(0) - lengths + spare
    logits = torch.randn(int(ends[-1]) + 2 * spare, width) * 3
    picked = [mixes[i] for i in torch.randint(0, len(mixes), (requests,)).tolist()]
    temperature, *shaping, seeds, offsets = parameters(picked, greedy)
    rows = first[:, None] + torch.minimum(torch.arange(most), counts[:, None])
    noisy = logits[rows] + torch.randn(requests, most, width)
    scores = noisy / torch.where(temperature > 0, temperature, 1.0)[:, None, None]
    tokens = None
    if candidates is not None:
        likely = scores.topk(candidates, dim=2).indices
        tokens = likely.gather(2, torch.rand(likely.shape).argsort(2))
        scores = scores.gather(2, tokens)
    drafts = torch.stack([
        draw_draft(scores[:, j], None if tokens is None else tokens[:, j], seeds, offsets, j, ~(temperature > 0))
        for j in range(most)
    ], dim=1)  # fmt: skip
    drafts = torch.where(torch.arange(most) < counts[:, None], drafts, -1)
    return [logits, first, counts, drafts, scores, tokens, temperature, *shaping, seeds, offsets]


def awkward_requests(width: int, most: int = 2, *, greedy: int = 7, mixes: Any = MIXES) -> list[Any]:
    """Each row of `awkward` as each row of a request, and as the drafter's scores of another."""
    rows = awkward(width)
    plain = torch.randn(len(rows), width)
    requests = len(rows) * (2 * most + 1)
    args = mixture(requests, most, width, greedy=greedy, spare=0, mixes=mixes)
    args[1], args[2] = torch.arange(requests) * (most + 1), torch.full((requests,), most)
    logits = torch.randn(requests, most + 1, width)
    for j in range(most + 1):
        logits[len(rows) * j : len(rows) * (j + 1), j] = rows
    scores = logits[:, :most] + 0.3 * torch.randn(requests, most, width)
    for j in range(most):
        begin = len(rows) * (most + 1 + j)
        scores[begin : begin + len(rows), j] = rows
        scores[len(rows) * j : len(rows) * (j + 1), j] = plain  # of a broken row of the target, not broken itself
    seeds, offsets = args[10], args[11]
    best = ~(args[6] > 0)
    args[0], args[4] = logits.flatten(0, 1), scores
    args[3] = torch.stack([draw_draft(scores[:, j], None, seeds, offsets, j, best) for j in range(most)], dim=1)
    return args


class Chain:
    """Target and drafter of `width` tokens; row `width` of their tables is what follows the prompt."""

    def __init__(self, width: int, most: int, nearness: float, scale: float = 1.5):
        self.width, self.most = width, most
        self.target = torch.randn(width + 1, width) * scale
        self.drafter = nearness * self.target + (1 - nearness) * scale * torch.randn(width + 1, width)

    def drafts(self, last: Tensor, seeds: Tensor, offsets: Tensor, temperature: float, draw: Any = draw_draft) -> tuple:
        """Drafts [R, K] behind the tokens `last`, their scores [R, K, V], and the target's logits [R * (K + 1), V]."""
        seen, scores = [last], []
        for j in range(self.most):
            scores.append(self.drafter[seen[-1]] / temperature)
            seen.append(draw(scores[-1], None, seeds, offsets, j, torch.zeros_like(last, dtype=torch.bool)))
        return torch.stack(seen[1:], 1), torch.stack(scores, 1), self.target[torch.stack(seen, 1)].flatten(0, 1)
