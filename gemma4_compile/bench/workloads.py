"""Workloads: how many requests, of how many tokens, and when they come."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

# What others are measured with, too.
NAMED = {
    "one": "128/256x1", "even": "1024/1024x80", "long": "8000/1000x80", "summary": "3000/100x30", "chat": "500/500x50",
    "write": "100/1000x30", "classify": "7000/10x30", "quick": "48/8x4",
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Requests of one shape: each has `given` tokens and wants `wanted` new ones."""

    given: int
    wanted: int
    requests: int

    def __str__(self) -> str:
        return f"{self.given}/{self.wanted}x{self.requests}"

    @property
    def longest(self) -> int:
        """Tokens of a request at its end."""
        return self.given + self.wanted


def workload(text: str) -> Workload:
    """Of a name in NAMED, or IN/OUTxREQUESTS. Raises ValueError for neither."""
    found = re.fullmatch(r"(\d+)/(\d+)x(\d+)", NAMED.get(text, text))
    if found is None or not all(map(int, found.groups())):
        raise ValueError(f"a workload must be IN/OUTxREQUESTS or one of {', '.join(NAMED)}, got {text!r}; write 1024/1024x80")
    return Workload(*map(int, found.groups()))


@dataclass(frozen=True)
class Arrivals:
    """When requests come.

    concurrency  so many at a time, the next when one has ended; None: all that have come
    rate         so many a second, at random (Poisson); None: all at once
    """

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, got {self.concurrency}; leave it out for all at once")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate must be more than 0 requests a second, got {self.rate}; leave it out for all at once")

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g}/s" + (f", {self.concurrency} at a time" if self.concurrency else "")
        return "all at once" if self.concurrency is None else f"{self.concurrency} at a time"

    def times(self, requests: int, seed: int) -> list[float]:
        """Seconds from the start at which each comes."""
        if self.rate is None:
            return [0.0] * requests
        chooser, at, found = random.Random(seed), 0.0, []
        for _ in range(requests):
            found.append(at)
            at += chooser.expovariate(self.rate)
        return found


def random_prompts(load: Workload, vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids at random; special tokens, which come first, are left out."""
    chooser = random.Random(seed)
    return [[chooser.randrange(min(8, vocabulary - 1), vocabulary) for _ in range(load.given)] for _ in range(load.requests)]


def cut_prompts(texts: Sequence[Sequence[int]], load: Workload) -> list[list[int]]:
    """The first tokens of texts, again from the first text where there are too few."""
    return [list(texts[i % len(texts)][: load.given]) for i in range(load.requests)]
