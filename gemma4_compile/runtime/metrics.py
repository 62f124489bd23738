"""Times and counts of requests and of an engine, as objects and as Prometheus text. Seconds throughout."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any


@dataclass
class RequestMetrics:
    """Times are those of time.perf_counter.

    arrived, scheduled, first_token, finished   None where it did not come to that
    prompt_tokens, output_tokens                the latter of all samples; longest_output of the longest one
    cached_tokens                               prompt tokens whose keys and values were there already
    preemptions                                 how often it was computed anew
    draft_tokens, accepted_draft_tokens         draft tokens that were verified, and those accepted
    """

    arrived: float = 0.0
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    longest_output: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    @property
    def queue_time(self) -> float | None:
        """From arrival to the first step that it had a part in."""
        return None if self.scheduled is None else self.scheduled - self.arrived

    @property
    def ttft(self) -> float | None:
        """Time to first token, from arrival."""
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, of the longest sample. None before there are two."""
        if self.first_token is None or self.finished is None or self.longest_output < 2:
            return None
        return (self.finished - self.first_token) / (self.longest_output - 1)


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, text: str, bounds: Sequence[float]):
        self.text, self.bounds, self.sum = text, tuple(bounds), 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(bound, values up to it), as Prometheus counts."""
        names = [*map(str, self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))


_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TPOT = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.5)
_HISTOGRAMS = {
    "ttft": ("Time to first token", _TTFT),
    "tpot": ("Time per output token after the first", _TPOT),
    "queue_time": ("Time to the first step", _TTFT),
}


def _gauge(text: str) -> Any:
    return field(default=0, metadata={"kind": "gauge", "help": text})


def _counter(text: str) -> Any:
    return field(default=0, metadata={"kind": "counter", "help": text})


def _labelled(kind: str, label: str, text: str) -> Any:
    return field(default_factory=dict, metadata={"kind": kind, "label": label, "help": text})


@dataclass
class EngineMetrics:
    """An engine now, and since it was made."""

    running: int = _gauge("Sequences that hold pages")
    waiting: int = _gauge("Sequences that wait for pages")
    free_pages: Mapping[str, int] = _labelled("gauge", "pool", "Free pages of a pool")
    pages: Mapping[str, int] = _labelled("gauge", "pool", "All pages of a pool")
    steps: int = _counter("Steps")
    requests: int = _counter("Requests that ended, however")
    errors: int = _counter("Requests that ended with an error")
    prompt_tokens: int = _counter("Prompt tokens of requests that were admitted")
    cached_tokens: int = _counter("Prompt tokens found in the prefix cache")
    output_tokens: int = _counter("Tokens sampled")
    preemptions: int = _counter("Sequences that were preempted")
    draft_tokens: int = _counter("Draft tokens verified")
    accepted_draft_tokens: int = _counter("Draft tokens accepted")
    draft_tokens_at: dict[int, int] = _labelled("counter", "position", "Draft tokens verified, by their position in a round")
    accepted_draft_tokens_at: dict[int, int] = _labelled(
        "counter", "position", "Draft tokens accepted, by their position in a round"
    )
    host_seconds: float = _counter("Time the host spent on steps, without waiting for the device")

    def __post_init__(self) -> None:
        self.histograms = {name: Histogram(text, bounds) for name, (text, bounds) in _HISTOGRAMS.items()}

    def observe(self, request: RequestMetrics) -> None:
        """A request has ended."""
        for name, histogram in self.histograms.items():
            if (value := getattr(request, name)) is not None:
                histogram.add(value)

    def observe_round(self, drafted: int, accepted: int) -> None:
        """So many draft tokens of a sequence have been verified, and so many of them accepted."""
        self.draft_tokens += drafted
        self.accepted_draft_tokens += accepted
        for counts, count in ((self.draft_tokens_at, drafted), (self.accepted_draft_tokens_at, accepted)):
            for place in range(1, count + 1):
                counts[place] = counts.get(place, 0) + 1

    def prometheus(self) -> str:
        """Prometheus' text form: each value here, and histograms of TTFT, TPOT and queue time."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(_Collector(self))
        return generate_latest(registry).decode()


class _Collector:
    """The metrics as prometheus_client asks for them."""

    def __init__(self, metrics: EngineMetrics):
        self.metrics = metrics

    def collect(self) -> Any:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        families = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
        for entry in fields(self.metrics):
            value, family = getattr(self.metrics, entry.name), families[entry.metadata["kind"]]
            name, text = f"gemma4_compile_{entry.name}", entry.metadata["help"]
            if not isinstance(value, Mapping):
                yield family(name, text, value=value)
                continue
            labelled = family(name, text, labels=[entry.metadata["label"]])
            for key, count in tuple(value.items()):  # an engine on another thread may add one
                labelled.add_metric([str(key)], count)
            yield labelled
        for key, histogram in self.metrics.histograms.items():
            name = f"gemma4_compile_{key}_seconds"
            yield HistogramMetricFamily(name, histogram.text, buckets=histogram.cumulative(), sum_value=histogram.sum)
