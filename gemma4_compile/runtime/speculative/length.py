"""How many drafts a round verifies: always as many, by the number of running requests, or by what has paid off so far."""

from collections import defaultdict, deque
from collections.abc import Mapping
from statistics import median

ADAPTIVE = "adaptive"
MOST = 6  # drafts of an adaptive round
_SKIPPED = 2  # rounds of a length that do not count: in the first ones graphs are captured
_KEPT = 9  # times that a median is taken of
_EVERY, _PROBE = 256, 8  # so many rounds in so many have all drafts, to see whether more of them are accepted by now
_FORGET = 4096  # verified drafts after which older ones count half

SpeculativeTokens = int | Mapping[int, int] | str


class DraftLength:
    """Chooses K for each step.

    wanted  K; or {requests: K}, where the largest number that is not above the running requests decides, 0 below all; or
            "adaptive": the K up to 6 with the most tokens a second, by measured acceptance and measured times of rounds

    Raises ValueError for anything else, and where no K is above 0.
    """

    def __init__(self, wanted: SpeculativeTokens):
        self.adaptive = wanted == ADAPTIVE
        lengths = {0: MOST} if self.adaptive else dict(wanted) if isinstance(wanted, Mapping) else {0: wanted}
        for key, value in lengths.items():
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (key, value)):
                raise ValueError(
                    f"speculative tokens must be 1 or more, {{requests: drafts}} or 'adaptive', got {wanted!r}; "
                    "leave the assistant out to draft nothing"
                )
        self.most: int = max(lengths.values(), default=0)  # type: ignore[assignment]
        if self.most < 1:
            raise ValueError(f"speculative tokens must be 1 or more, got {wanted!r}; leave the assistant out to draft nothing")
        self._lengths: list[tuple[int, int]] = sorted(lengths.items(), reverse=True)  # type: ignore[arg-type]
        self._rounds = 0
        self._verified, self._accepted = [0.0] * (self.most + 1), [0.0] * (self.most + 1)  # by place
        self._times: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._seen: dict[tuple[int, int], int] = defaultdict(int)

    def choose(self, running: int) -> int:
        """K of the next round of so many requests."""
        if not self.adaptive:
            return next((length for requests, length in self._lengths if requests <= running), 0)
        self._rounds += 1
        if self._rounds % _EVERY < _PROBE:
            return self.most
        size = running.bit_length()
        known = {k: median(times) for k in range(self.most + 1) if (times := self._times.get((size, k)))}
        if len(known) <= self.most:  # each is measured once, the long ones first
            return max(k for k in range(self.most + 1) if k not in known)
        return max(known, key=lambda k: self.tokens(k) / known[k])

    def lengths(self, fewest: int, most: int) -> list[int]:
        """Every K above 0 that rounds of `fewest` to `most` requests can have, the largest first."""
        found = range(1, self.most + 1) if self.adaptive else {self.choose(running) for running in range(fewest, most + 1)}
        return sorted(set(found) - {0}, reverse=True)

    def tokens(self, length: int) -> float:
        """What a round of so many drafts has given a request on average."""
        return 1 + sum(a / v if v else 1.0 for a, v in zip(self._accepted[1 : length + 1], self._verified[1:], strict=False))

    def observe(self, verified: int, accepted: int) -> None:
        """So many draft tokens of a request were verified, and so many of them accepted."""
        for place in range(1, verified + 1):
            self._verified[place] += 1
            self._accepted[place] += place <= accepted
        if self._verified[1] > _FORGET:
            self._verified, self._accepted = ([n / 2 for n in counts] for counts in (self._verified, self._accepted))

    def took(self, requests: int, length: int, seconds: float) -> None:
        """A round of so many drafts for each of so many requests has taken so long."""
        key = requests.bit_length(), length
        self._seen[key] += 1
        if self._seen[key] > _SKIPPED:
            self._times[key].append(seconds)
