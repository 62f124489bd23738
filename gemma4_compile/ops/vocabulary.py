"""The vocabulary as tensor parallelism divides it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .logits import logprobs_of


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens' logits a rank has: `here` of `size`, from `first` on. group: "" if it has all."""

    size: int
    first: int
    here: int
    group: str = ""

    def own(self, tokens: list[int]) -> list[int]:
        """Of these tokens the places in the part that is here, without those that are elsewhere."""
        return [token - self.first for token in tokens if 0 <= token - self.first < self.here]

    def place(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Their places in the part that is here, any for a token that is elsewhere, and which are here."""
        places = tokens - self.first
        return places.clamp(0, self.here - 1), (places >= 0) & (places < self.here)

    def argmax(self, logits: Tensor) -> Tensor:
        if not self.group:
            return logits.argmax(-1)
        return self.gather(logits).argmax(-1)

    def gather(self, logits: Tensor) -> Tensor:
        if not self.group:
            return logits
        c = torch.ops._c10d_functional
        ranks = self.size // self.here
        found = c.wait_tensor(c.all_gather_into_tensor(logits.contiguous(), ranks, self.group))
        return found.view(ranks, *logits.shape).transpose(0, 1).reshape(len(logits), -1)

    def sample(self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.gemma4.sample(self.gather(logits), temperature, top_k, top_p, min_p, seeds, offsets)

    def logprobs(self, logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return logprobs_of(self.gather(logits), tokens, top)
