"""Times and counts of requests, counts of an engine, and what Prometheus reads of them."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gemma4_compile import Engine, EngineConfig, RequestOutput, SamplingParams
from gemma4_compile.geometry import geometry
from gemma4_compile.runtime import engine as engine_module
from gemma4_compile.runtime.metrics import EngineMetrics, Histogram, RequestMetrics
from gemma4_compile.runtime.worker.memory import token_bytes
from tests.runtime.demo_models import demo


def serve(**given: Any) -> Engine:
    models = demo("e")
    return Engine(models.served, EngineConfig(max_requests=8, max_batched_tokens=64, page_size=16, **given), models.tokenizer)


@pytest.fixture(scope="module")
def metrics() -> EngineMetrics:
    """Of an engine that has served a few requests: one twice, one that is refused, one aborted, one with two samples."""
    engine, prompts = serve(), demo("e").prompts(4, 60)
    engine.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    engine.generate(prompts[3], SamplingParams(max_tokens=5, ignore_eos=True, temperature=1.0, n=2))
    with pytest.warns(UserWarning, match="at least one token"):
        engine.generate([[]])
    name = engine.add_request(prompts[0], SamplingParams(max_tokens=5, ignore_eos=True))
    engine.step()
    engine.abort(name)
    return engine.metrics


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The engine's clock stands still; a test moves it."""
    now = [100.0]
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: now[0])
    yield now


@pytest.mark.parametrize("overlap", [False, True])
def test_times_of_a_request(clock: list[float], overlap: bool) -> None:
    engine = serve(overlap=overlap)
    engine.add_request([5] * 100, SamplingParams(max_tokens=3, ignore_eos=True))
    clock[0] += 2  # it waits
    found: RequestOutput | None = None
    while found is None:
        clock[0] += 10
        found = next((chunk.output for chunk in engine.step() if chunk.output), None)
    times = found.metrics
    assert (times.arrived, times.scheduled) == (100.0, 112.0) and times.queue_time == 12.0
    first = 122.0 + 10 * overlap  # 100 tokens are two steps; overlapped, the host hears a step later
    assert (times.first_token, times.ttft) == (first, first - 100)
    assert times.finished == first + 20 and times.tpot == 10.0
    assert (times.prompt_tokens, times.output_tokens) == (100, 3)


def test_times_that_there_are_not() -> None:
    never = RequestMetrics(arrived=5.0)
    assert (never.queue_time, never.ttft, never.tpot) == (None, None, None)
    one = RequestMetrics(arrived=5.0, first_token=6.0, finished=6.0, output_tokens=1)
    assert one.ttft == 1.0 and one.tpot is None
    engine = serve()
    name = engine.add_request([5, 6])
    output = engine.abort(name)
    assert output is not None and output.metrics.scheduled is None and output.metrics.finished is not None
    assert engine.metrics.histograms["ttft"].cumulative()[-1] == ("+Inf", 0.0)


def test_cached_tokens() -> None:
    engine, prompt = serve(), demo("e").prompts(4, 60)[2]
    assert len(prompt) == 40
    outputs = [engine.generate(prompt, SamplingParams(max_tokens=2))[0] for _ in range(2)]
    assert [output.metrics.cached_tokens for output in outputs] == [0, 32]
    assert (engine.metrics.prompt_tokens, engine.metrics.cached_tokens) == (80, 32)
    without = serve(prefix_caching=False)
    without.generate([prompt, prompt], SamplingParams(max_tokens=2))
    assert without.metrics.cached_tokens == 0


def test_preemptions() -> None:
    models = demo("e")
    layers = geometry(models.plain.config)
    per_token = sum(token_bytes(layers.kv_owners(kind), 4) for kind in ("sliding_attention", "full_attention"))
    engine = serve(kv_bytes=260 * per_token, max_model_len=120, expected_tokens=100)
    outputs = engine.generate(models.prompts(6, 60), SamplingParams(max_tokens=50, ignore_eos=True))
    each = [output.metrics.preemptions for output in outputs]
    assert engine.metrics.preemptions == sum(each) > 0 and each[0] == 0, "the oldest goes on"
    assert engine.metrics.free_pages == engine.metrics.pages and engine.metrics.output_tokens == 300


def test_counts(metrics: EngineMetrics) -> None:
    lengths = [len(prompt) for prompt in demo("e").prompts(4, 60)]
    assert (metrics.running, metrics.waiting, metrics.errors, metrics.preemptions) == (0, 0, 0, 0)
    assert metrics.requests == 6, "those that ended, aborted ones too; what was refused never began"
    assert metrics.prompt_tokens == sum(lengths) + lengths[3] + lengths[0]
    assert metrics.output_tokens == 4 * 5 + 2 * 5 + 1
    assert metrics.free_pages == metrics.pages and set(metrics.pages) == {"full_attention", "sliding_attention"}
    assert metrics.steps >= 11 and metrics.host_seconds > 0
    assert {name: h.cumulative()[-1][1] for name, h in metrics.histograms.items()} == {"ttft": 6, "tpot": 5, "queue_time": 6}


def test_errors_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve()
    monkeypatch.setattr(engine.runner, "launch", lambda *_: 1 / 0)
    output = engine.generate([5, 6])[0]
    assert "ZeroDivisionError" in output.error and (engine.metrics.errors, engine.metrics.requests) == (1, 1)


def test_running_and_waiting() -> None:
    engine = serve()
    for token in range(12):
        engine.add_request([5 + token] * 8, SamplingParams(max_tokens=8, ignore_eos=True))
    engine.step()
    assert (engine.metrics.running, engine.metrics.waiting) == (8, 4)
    assert all(engine.metrics.free_pages[kind] == count - 8 for kind, count in engine.metrics.pages.items())


def test_prometheus_reads_all_of_it(metrics: EngineMetrics) -> None:
    families = {family.name: family for family in text_string_to_metric_families(metrics.prometheus())}
    kinds = {name.removeprefix("gemma4_compile_"): family.type for name, family in families.items()}
    assert kinds == dict.fromkeys(("running", "waiting", "free_pages", "pages"), "gauge") | dict.fromkeys(
        ("steps", "requests", "errors", "prompt_tokens", "cached_tokens", "output_tokens", "preemptions", "host_seconds",
         "draft_tokens", "accepted_draft_tokens", "draft_tokens_at", "accepted_draft_tokens_at"),
        "counter",
    ) | dict.fromkeys(("ttft_seconds", "tpot_seconds", "queue_time_seconds"), "histogram")  # fmt: skip
    assert all(family.documentation for family in families.values())
    values = {(s.name, s.labels.get("pool")): s.value for family in families.values() for s in family.samples}
    assert values["gemma4_compile_output_tokens_total", None] == 31
    assert values["gemma4_compile_pages", "full_attention"] == metrics.pages["full_attention"]


@pytest.mark.parametrize("name", ["ttft", "tpot", "queue_time"])
def test_histograms_are_cumulative(metrics: EngineMetrics, name: str) -> None:
    families = {family.name: family for family in text_string_to_metric_families(metrics.prometheus())}
    samples = families[f"gemma4_compile_{name}_seconds"].samples
    buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets) and buckets[-1][0] == math.inf
    count, total = (next(s.value for s in samples if s.name.endswith(end)) for end in ("_count", "_sum"))
    assert buckets[-1][1] == count > 0 and total == pytest.approx(metrics.histograms[name].sum)


def test_rounds_are_counted_by_position() -> None:
    found = EngineMetrics()
    for drafted, accepted in ((3, 2), (3, 0), (1, 1)):
        found.observe_round(drafted, accepted)
    assert (found.draft_tokens, found.accepted_draft_tokens) == (7, 3)
    samples = [s for f in text_string_to_metric_families(found.prometheus()) for s in f.samples]
    values = {(s.name, s.labels["position"]): s.value for s in samples if "position" in s.labels}
    assert values == {
        ("gemma4_compile_draft_tokens_at_total", "1"): 3, ("gemma4_compile_draft_tokens_at_total", "2"): 2,
        ("gemma4_compile_draft_tokens_at_total", "3"): 2, ("gemma4_compile_accepted_draft_tokens_at_total", "1"): 2,
        ("gemma4_compile_accepted_draft_tokens_at_total", "2"): 1,
    }  # fmt: skip


def test_a_histogram() -> None:
    histogram = Histogram("x", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 7.0):
        histogram.add(value)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)] and histogram.sum == 12.0
