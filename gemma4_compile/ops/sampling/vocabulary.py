"""The vocabulary divided between the ranks of tensor parallelism: tokens and log-probabilities, without all logits on one rank.

Each rank has the logits of its own tokens. What it computes of them is local_sample.py's; here the ranks' results are added, or
the highest taken, as integers: all ranks get the same tokens, and those that `sample` gives for all logits, to the bit. Where
one rank has them all, the ops for whole vocabularies run.

A draw takes one maximum over the ranks; top_p and min_p one more before it, for the highest logit; top_k and top_p three sums
each, one a digit of the threshold. What no row of a batch uses is left out. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4_compile.ops.library import expect

from .local_sample import BITS, begin_search, digit_histogram, drawn_token, local_draw, local_highest, next_digit, token_of
from .logits import logprobs_of
from .sample import MOST

THRESHOLDS = frozenset(("top_k", "top_p", "min_p"))


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens' logits a rank has. Each method is called by all ranks, and gives all of them the same result.

    size   tokens of all ranks, at most 2**22
    start  the first token of this rank, a multiple of 4
    shard  tokens of this rank, from `start` on, as many as any other has
    group  name of a process group, as group.group_name gives it, whose ranks have their tokens in order; "": this one has all

    Raises ValueError for parts that are not equal, or that do not begin at a multiple of 4 (which share random numbers).
    """

    size: int
    start: int
    shard: int
    group: str = ""

    def __post_init__(self) -> None:
        op = "Vocabulary"
        expect(op, "size must lie in 1..2**22", bool(1 <= self.size <= MOST), True, "pass the model's vocabulary")
        fits = self.shard > 0 and self.size % self.shard == self.start % self.shard == 0 and 0 <= self.start < self.size
        expect(op, f"{self.shard} tokens from {self.start} on must be an equal part of {self.size}", fits, True, "pad the head")
        expect(op, "start must be a multiple of 4, its remainder", self.start % 4, 0, "pad the head")
        expect(op, "a group has parts, one rank has all: divided", self.shard < self.size, bool(self.group), "name the group")

    @property
    def ranks(self) -> int:
        return self.size // self.shard

    def local_tokens(self, tokens: list[int]) -> list[int]:
        """Where these tokens are among those of this rank, without those of other ranks."""
        if not self.group:
            return tokens
        return [token - self.start for token in tokens if 0 <= token - self.start < self.shard]

    def to_shard(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Where these tokens are among those of this rank, anywhere for others; and which are this rank's."""
        if not self.group:
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        places = tokens - self.start
        return places.clamp(0, self.shard - 1), (places >= 0) & (places < self.shard)

    def argmax(self, logits: Tensor) -> Tensor:
        """The lowest of the highest: logits [N, shard] -> tokens [N] int64. One maximum over the ranks."""
        self._check("argmax", logits)
        if not self.group:
            return logits.argmax(dim=1)
        return token_of(_all_reduce(local_highest(logits, self.start), "max", self.group))

    def sample(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, offsets: Tensor,
        thresholds: Collection[str] = THRESHOLDS,
    ) -> Tensor:  # fmt: skip
        """The tokens [N] int64 that `sample` gives for all ranks' logits.

        logits      [N, shard]  fp32, fp16 or bf16
        thresholds  which of top_k, top_p and min_p any row uses; the others are not looked at. The same on all ranks, as are
                    the other arguments, which are those of `sample`

        Raises ValueError for a width other than `shard`, and for thresholds of other names.
        """
        self._check("sample", logits)
        unknown = sorted(set(thresholds) - THRESHOLDS)
        expect("sample", "thresholds are top_k, top_p and min_p: others", unknown, [], "name what rows use")
        if not self.group:
            return torch.ops.gemma4.sample(logits, temperature, top_k, top_p, min_p, seeds, offsets)
        best = least = None
        if "top_p" in thresholds or "min_p" in thresholds:
            best = _all_reduce(local_highest(logits, self.start), "max", self.group)
        if "top_k" in thresholds:
            least = self._least(logits, temperature, top_k, None, None)
        if "top_p" in thresholds:
            last = self._least(logits, temperature, top_p, least, best)
            least = last if least is None else torch.maximum(least, last)
        minimum = min_p if "min_p" in thresholds else None
        drawn = local_draw(logits, temperature, seeds, offsets, self.start, least, best, minimum)
        return drawn_token(_all_reduce(drawn, "max", self.group), temperature)

    def _least(self, logits: Tensor, temperature: Tensor, limit: Tensor, least: Tensor | None, best: Tensor | None) -> Tensor:
        """The least key [N] that a top_k keeps or, with `best`, a top_p of the keys from `least` on; rows without: negative."""
        search = begin_search(temperature, limit, best, self.size)
        for digit in range(len(BITS)):
            histogram = digit_histogram(logits, temperature, search[0], least, best, digit)
            # The first histogram is of all that is kept: top_p is a share of its sum.
            search = next_digit(_all_reduce(histogram, "sum", self.group), *search, best is not None and digit == 0)
        return search[0]

    def logprobs(self, logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `logprobs_of` gives for all ranks' logits; the sum of all exponentials is rounded in another order.

        logits   [N, shard]  fp32, fp16 or bf16
        tokens   [N] int64  from 0 to size - 1, the same on all ranks
        top      0..size
        returns  chosen [N] fp32, ranks [N] int64, top_values [N, top] fp32, top_ids [N, top] int64

        Raises ValueError for shapes that do not fit. Two collectives.
        """
        self._check("logprobs", logits)
        if not self.group:
            return logprobs_of(logits, tokens, top)
        expect("logprobs", "tokens must be [N] for logits [N, shard]", tokens.shape, logits.shape[:1], "pass one a row")
        expect("logprobs", "top must lie in 0..size", bool(0 <= top <= self.size), True, "ask for fewer")
        values, ids = logits.topk(count := min(top, self.shard), dim=1)
        given = logits.gather(1, (tokens - self.start).clamp(0, self.shard - 1)[:, None])
        columns = logits.float().logsumexp(dim=1, keepdim=True), given, values, ids + self.start
        exact = torch.cat([t.double() for t in columns], dim=1)  # all in one collective
        found = _all_gather(exact, self.ranks, self.group)
        total = found[:, :, :1].float().logsumexp(dim=0)
        chosen = found[tokens // self.shard, torch.arange(len(tokens), device=tokens.device), 1][:, None].float()
        ranks = _all_reduce((logits > chosen).sum(dim=1), "sum", self.group) + 1
        values, ids = (part.transpose(0, 1).flatten(1) for part in found[:, :, 2:].split_with_sizes([count, count], dim=2))
        values, places = values.topk(top, dim=1)
        return (chosen - total)[:, 0], ranks, values.float() - total, ids.gather(1, places).long()

    def gather(self, logits: Tensor) -> Tensor:
        """All ranks' logits, for who needs each of them: [N, shard] -> [N, size]."""
        self._check("gather", logits)
        if not self.group:
            return logits
        return _all_gather(logits, self.ranks, self.group).transpose(0, 1).flatten(1)

    def _check(self, op: str, logits: Tensor) -> None:
        expect(op, "logits must be [N, shard]", (logits.dim(), logits.shape[-1]), (2, self.shard), "pass this rank's own")


def _all_reduce(x: Tensor, reduction: str, group: str) -> Tensor:
    """int64 sums and maxima are exact, in whatever order."""
    if not x.numel():
        return x
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), reduction, group))


def _all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """[N, C] of each rank -> [ranks, N, C]"""
    if not x.numel():
        return x.expand(ranks, *x.shape)
    collectives = torch.ops._c10d_functional
    gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), ranks, group))
    return gathered.view(ranks, *x.shape)
