"""What was measured of each request, and what that is for all of them."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class Timing:
    """One request. Times are seconds since the run began.

    chunks  (when, how many new tokens) of each part that came
    error   why it failed; empty if it did not
    tokens  new token ids, where they are known
    """

    begun: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    error: str = ""
    tokens: list[int] = field(default_factory=list)

    @property
    def count(self) -> int:
        """New tokens."""
        return sum(count for _, count in self.chunks)

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.chunks[0][0] - self.begun

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there is none."""
        after = self.count - self.chunks[0][1]
        return (self.chunks[-1][0] - self.chunks[0][0]) / after if after else None

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: between parts, which may have several tokens."""
        return [b - a for (a, _), (b, _) in pairwise(self.chunks)]

    @property
    def e2e(self) -> float:
        """End-to-end latency."""
        return self.chunks[-1][0] - self.begun


@dataclass(frozen=True)
class Spread:
    """Milliseconds."""

    median: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Spread | None":
        """None of nothing. The 99th percentile is a value that was measured: the lowest that 99% do not exceed."""
        found = sorted(seconds)
        if not found:
            return None
        return cls(1e3 * statistics.median(found), 1e3 * found[-(-99 * len(found) // 100) - 1])


@dataclass(frozen=True)
class Summary:
    """A run of a workload. seconds: from the first request to the last token; rates are of new tokens and of all."""

    seconds: float
    requests: int
    failed: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None


def summary(timings: Sequence[Timing], given: int) -> Summary:
    """given  tokens of each prompt"""
    good = [timing for timing in timings if not timing.error and timing.chunks]
    start = min(timing.begun for timing in timings)
    seconds = max((timing.chunks[-1][0] for timing in good), default=start) - start
    new = sum(timing.count for timing in good)
    rate = 1 / seconds if seconds else 0.0
    return Summary(
        seconds, len(timings), len(timings) - len(good), new, new * rate, (new + given * len(good)) * rate,
        Spread.of(timing.ttft for timing in good), Spread.of(t for timing in good if (t := timing.tpot) is not None),
        Spread.of(gap for timing in good for gap in timing.gaps), Spread.of(timing.e2e for timing in good),
    )  # fmt: skip
