"""Random requests with random params, and aborts, on an engine with debug checks: nothing fails, nothing leaks, and greedy
requests get the tokens that they get alone."""

import os
import random
from typing import Any

from gemma4_compile import Engine, EngineConfig, SamplingParams
from gemma4_compile.geometry import geometry
from gemma4_compile.runtime import invariants
from gemma4_compile.runtime.outputs import RequestOutput
from tests.runtime.demo_models import Demo


def random_params(chooser: random.Random, tokens: int) -> SamplingParams:
    """Mostly greedy; each feature now and then."""
    given: dict[str, Any] = {"max_tokens": chooser.randint(1, tokens)}
    if chooser.random() < 0.5:
        return SamplingParams(**given, ignore_eos=chooser.random() < 0.5)
    given |= {"temperature": chooser.choice([0.0, 0.5, 1.0, 1.5])}
    choices: dict[str, Any] = {
        "top_k": chooser.randint(1, 100), "top_p": chooser.uniform(0.1, 1.0), "min_p": chooser.uniform(0, 0.3),
        "seed": chooser.randrange(100), "repetition_penalty": chooser.uniform(0.8, 1.4), "presence_penalty": 0.5,
        "frequency_penalty": 0.3, "logit_bias": {chooser.randrange(2000): 3.0}, "logprobs": chooser.randint(0, 5),
        "prompt_logprobs": chooser.randint(0, 3), "stop": chooser.choice([["\n"], ["self", "def "], ["  "]]),
        "stop_token_ids": [chooser.randrange(2000)], "min_tokens": chooser.randint(0, given["max_tokens"]),
    }  # fmt: skip
    for name in chooser.sample(sorted(choices), chooser.randint(0, 4)):
        given[name] = choices[name]
    if given["temperature"]:
        given["n"] = chooser.choice([1, 1, 1, 2, 3])
    return SamplingParams(**given)


def soak(models: Demo, requests: int, seed: int, tokens: int = 24, longest: int = 400) -> str:
    """Serve so many random requests; returns a line that says what happened. Raises AssertionError if anything is wrong."""
    chooser = random.Random(seed)
    before = os.environ.get(invariants.VARIABLE)
    os.environ[invariants.VARIABLE] = "1"
    try:
        layers = [layer for layer in geometry(models.plain.config).layers if not layer.shares_kv]
        per_token = sum(2 * layer.kv_heads * layer.head_dim for layer in layers)
        room = 1000 * per_token * models.plain.dtype.itemsize  # less than twelve requests want now and then
        config = EngineConfig(
            max_requests=12, max_batched_tokens=160, page_size=16, max_model_len=longest + tokens + 1, expected_tokens=100,
            kv_bytes=room, overlap=True, capture_at_start=False,
        )  # fmt: skip
        engine = Engine(models.served, config, models.tokenizer)
        texts = models.prompts(30, longest, seed)
        done: dict[str, RequestOutput] = {}
        started: list[str] = []
        aborted = 0
        while len(started) < requests or engine.has_work:
            if len(started) < requests and chooser.random() < 0.6:
                text = chooser.choice(texts)
                prompt = text[: chooser.randint(1, len(text))]
                started.append(engine.add_request(prompt, random_params(chooser, tokens), stream=chooser.random() < 0.5))
            if started and chooser.random() < 0.05:
                output = engine.abort(chooser.choice(started[-20:]))
                if output is not None:
                    done[output.request_id], aborted = output, aborted + 1
            done |= {c.request_id: c.output for c in engine.step() if c.output is not None}
        assert set(done) == set(started) and engine.metrics.errors == 0
        for pool in engine.runner.pages.pools.values():
            assert pool.free == pool.pages, f"{pool.in_use} pages of {pool.kind} have leaked"
        engine.scheduler.check()
    finally:
        if before is None:
            del os.environ[invariants.VARIABLE]
        else:
            os.environ[invariants.VARIABLE] = before
    ends = [sample.finish_reason for output in done.values() for sample in output.samples]
    counts = {reason: ends.count(reason) for reason in sorted(set(ends))}
    metrics = engine.metrics
    return (
        f"{len(done)} requests, {len(ends)} samples {counts}, {aborted} aborted, {metrics.preemptions} preemptions, "
        f"{metrics.cached_tokens} of {metrics.prompt_tokens} prompt tokens reused, {metrics.steps} steps"
    )
