"""Rows for the sampler's tests: every mixture of parameters, and logits that are hard to rank."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

TOP_K = (0, 1, 5, 64, 10**6, -1)
TOP_P = (1.0, 0.95, 0.3, 1e-6, 0.0)
MIN_P = (0.0, 0.02, 1.0)
MIXES = list(product(TOP_K, TOP_P, MIN_P))


def parameters(rows: list[tuple[int, float, float]], greedy: int = 7) -> tuple[Tensor, ...]:
    """temperature, top_k, top_p, min_p, seeds and offsets of these rows; every `greedy`-th row is greedy (0: none)."""
    temperature = 0.3 + 1.5 * torch.rand(len(rows))
    if greedy:
        temperature[greedy - 1 :: greedy] = 0.0
    top_k, top_p, min_p = zip(*rows, strict=True)
    seeds = torch.randint(-(2**63), 2**63 - 1, (len(rows),))
    offsets = torch.randint(0, 2**34, (len(rows),))
    return temperature, torch.tensor(top_k, dtype=torch.int32), torch.tensor(top_p), torch.tensor(min_p), seeds, offsets


def mixture(count: int, width: int, *, greedy: int = 7, scale: float = 3.0) -> tuple[Tensor, ...]:
    """Arguments of the op for `count` rows, their parameters drawn from all mixes."""
    picked = [MIXES[i] for i in torch.randint(0, len(MIXES), (count,)).tolist()]
    return torch.randn(count, width) * scale, *parameters(picked, greedy)


def awkward(width: int) -> Tensor:
    """Rows [15, width] of ties, zeros of both signs, infinities, NaN and denormals."""
    rows = torch.randn(15, width) * 3
    rows[0] = 1.5
    rows[1] = rows[1].round()
    rows[2] = torch.where(torch.rand(width) < 0.5, -0.0, 0.0)
    rows[3, torch.rand(width) < 0.7] = -torch.inf
    rows[4] = -torch.inf
    rows[5] = -torch.inf
    rows[5, width // 2] = -1e30
    rows[6, width // 3 :: 7] = torch.inf
    rows[7, width // 3 :: 7] = torch.nan
    rows[8, width // 2] = -torch.nan
    rows[9] = torch.nan
    rows[10] *= 1e-39
    rows[11] *= 1e30
    rows[12] = -(rows[12].abs() * 1e4)
    rows[13] = torch.where(torch.arange(width) == width - 1, 40.0, rows[13])
    rows[14] = torch.linspace(20, 0, width)
    return rows
