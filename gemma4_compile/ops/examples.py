"""Random arguments for the ops at given sizes, for tests, benchmarks and docs: what each op's example draws from."""

from __future__ import annotations

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


def example(
    op: str, sizes: Sizes, tokens: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", batch: int = 1
) -> tuple[Any, ...]:
    """Fresh random arguments of gemma4::op for `batch` sequences of `tokens` tokens."""
    draw = OPS[op].example
    assert draw is not None  # what has none is not in OPS
    return draw(Draw(sizes, batch, tokens, dtype, device))
