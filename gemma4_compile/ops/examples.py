"""Random arguments for every op at given sizes: one registry for the tests, the benchmark and the docs.

An op without an example fails tests/ops/test_registry.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .library import OPS


@dataclass(frozen=True)
class Sizes:
    """The dimensions of one model (or of a small test) that the ops see."""

    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int = 64
    ple: int = 256
    layers: int = 35
    vocabulary: int = 4096
    experts: int = 128
    top_k: int = 8
    expert_intermediate: int = 64
    shared_kv: bool = False  # attention_k_eq_v: the op is given one tensor as k and v


SMALL = Sizes(
    hidden=24,
    q_heads=3,
    kv_heads=2,
    head_dim=16,
    intermediate=40,
    ple=12,
    layers=3,
    vocabulary=11,
    experts=10,
    top_k=3,
    expert_intermediate=20,
)


@dataclass(frozen=True)
class Draw:
    """Draws tensors of one dtype on one device: activations N(0, 1), norm weights around 1, matrices N(0, 0.02)."""

    sizes: Sizes
    batch: int
    tokens: int
    dtype: torch.dtype
    device: str
    eps = 1e-6  # of the models' norms

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(self.dtype)

    def states(self, width: int | None = None) -> Tensor:
        return self.normal(self.batch, self.tokens, width or self.sizes.hidden)

    def flat(self, width: int) -> Tensor:
        return self.normal(self.batch * self.tokens, width)

    def logits(self) -> Tensor:
        """Distinct within a token in every dtype: torch.topk leaves the order of equal ones open."""
        ranks = torch.rand(self.batch * self.tokens, self.sizes.experts, device=self.device).argsort(-1)
        scales = 1 + torch.rand(self.batch * self.tokens, 1, device=self.device)
        return ((ranks - self.sizes.experts / 2) / 16 * scales).to(self.dtype)

    def heads(self, count: int) -> Tensor:
        return self.normal(self.batch, self.tokens, count, self.sizes.head_dim)

    def weight(self, width: int | None = None) -> Tensor:
        return 1 + 0.1 * self.normal(width or self.sizes.hidden)

    def matrix(self, rows: int, columns: int) -> Tensor:
        return 0.02 * self.normal(rows, columns)

    def projections(self, *counts: int) -> tuple[Tensor, ...]:
        """States, and matrices of so many rows for them."""
        return self.states(), *(self.matrix(count, self.sizes.hidden) for count in counts)

    @property
    def q_width(self) -> int:
        return self.sizes.q_heads * self.sizes.head_dim

    @property
    def kv_width(self) -> int:
        return self.sizes.kv_heads * self.sizes.head_dim

    def scalar(self) -> Tensor:
        return torch.full((1,), 0.75, device=self.device, dtype=self.dtype)

    def angles(self) -> tuple[Tensor, Tensor]:
        angle = 3 * torch.randn(1, self.tokens, self.sizes.head_dim // 2, device=self.device)
        angle = torch.cat((angle, angle), -1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def ids(self) -> Tensor:
        return torch.randint(self.sizes.vocabulary, (self.batch, self.tokens), device=self.device)


def _verify(d: Draw) -> tuple:
    """A request a token, with three drafts or fewer of five candidates; four in eight are greedy."""
    requests, most, width = d.batch * d.tokens, 3, d.sizes.vocabulary
    counts = torch.arange(requests, device=d.device) % (most + 1)
    first = (counts + 1).cumsum(0) - counts - 1
    rows = sum(r % (most + 1) + 1 for r in range(requests))
    logits = 2 * d.normal(rows, width)
    tokens = torch.rand((requests, most, width), device=d.device).argsort(-1)[..., :5].contiguous()
    behind = first[:, None] + torch.minimum(torch.arange(most, device=d.device), counts[:, None])
    scores = logits[behind].float().gather(2, tokens) + torch.randn(tokens.shape, device=d.device)
    drafts = tokens.gather(2, (scores - torch.empty_like(scores).exponential_().log()).argmax(2, keepdim=True))[..., 0]
    temperature = (torch.arange(requests, device=d.device) // 4 + 1) % 2 * 0.8
    top_k = torch.full((requests,), 7, dtype=torch.int32, device=d.device)
    top_p, min_p = torch.full_like(temperature, 0.9), torch.full_like(temperature, 0.01)
    seeds = torch.randint(2**62, (requests,), device=d.device)
    return logits, first, counts, drafts, scores, tokens, temperature, top_k, top_p, min_p, seeds, seeds % 1000, True


EXAMPLES: dict[str, Callable[[Draw], tuple]] = {
    "verify": _verify,
}


def example(
    op: str, sizes: Sizes, tokens: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", batch: int = 1
) -> tuple[Any, ...]:
    """Fresh random arguments of gemma4::op for `batch` sequences of `tokens` tokens."""
    if op.startswith("all_reduce_"):
        return (*example(op.removeprefix("all_reduce_"), sizes, tokens, dtype, device, batch), "")
    return (OPS[op].example or EXAMPLES[op])(Draw(sizes, batch, tokens, dtype, device))
