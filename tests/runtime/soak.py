"""Random requests with random params, and aborts, on an engine with debug checks: nothing fails, nothing leaks, and greedy
requests get the tokens that they get alone."""

import os
import random
from typing import Any

from gemma4_compile import Engine, EngineConfig, SamplingParams
from gemma4_compile.geometry import geometry
from gemma4_compile.runtime.outputs import RequestOutput
from gemma4_compile.runtime.step import invariants
from gemma4_compile.runtime.worker.memory import divide
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


def soak(models: Demo, requests: int, seed: int, tokens: int = 120, longest: int = 150, **speculation: Any) -> str:
    """Serve so many random requests; returns a line that says what happened. Raises AssertionError if anything is wrong.

    speculation   of Engine
    """
    chooser = random.Random(seed)
    before = os.environ.get(invariants.VARIABLE)
    os.environ[invariants.VARIABLE] = "1"
    try:
        whole, plain = longest + tokens + 1, models.plain
        windows = {"full_attention": 0, "sliding_attention": plain.config.sliding_window}
        alone = divide(geometry(plain.config), windows, 2**40, 16, plain.dtype.itemsize, whole, whole, 1, 64)
        config = EngineConfig(  # memory for less than twelve requests want
            max_requests=12, max_batched_tokens=64, page_size=16, max_model_len=whole, expected_tokens=whole // 2,
            kv_bytes=int(1.8 * alone.bytes), overlap=True, capture_at_start=False,
        )  # fmt: skip
        engine = Engine(models.served, config, models.tokenizer, **speculation)
        texts = models.prompts(6, longest, seed)
        done: dict[str, RequestOutput] = {}
        started: list[str] = []
        greedy: list[str] = []
        aborted = 0
        while len(started) < requests or engine.has_work:
            for _ in range(min(requests - len(started), chooser.randint(0, 3) if len(engine.scheduler.waiting) < 10 else 0)):
                text = chooser.choice(texts)
                prompt = text[: chooser.randint(1, len(text))]
                params = random_params(chooser, tokens)
                started.append(engine.add_request(prompt, params, stream=chooser.random() < 0.5))
                if params == SamplingParams(max_tokens=params.max_tokens, ignore_eos=params.ignore_eos):
                    greedy.append(started[-1])
            if started and chooser.random() < 0.05:
                output = engine.abort(chooser.choice(started[-20:]))
                if output is not None:
                    done[output.request_id], aborted = output, aborted + 1
            done |= {c.request_id: c.output for c in engine.step() if c.output is not None}
        assert set(done) == set(started) and engine.metrics.errors == 0
        for pool in engine.runner.pages.pools.values():
            assert pool.free == pool.pages, f"{pool.in_use} pages of {pool.kind} have leaked"
        engine.scheduler.check()
        for name in greedy:
            assert not done[name].token_ids or models.divergence(done[name]) is None, f"{name} has other tokens than alone"
    finally:
        if before is None:
            del os.environ[invariants.VARIABLE]
        else:
            os.environ[invariants.VARIABLE] = before
    ends = [sample.finish_reason for output in done.values() for sample in output.samples]
    counts = {reason: ends.count(reason) for reason in sorted(set(ends))}
    metrics = engine.metrics
    return (
        f"{len(done)} requests, {len(greedy)} of them greedy, {len(ends)} samples {counts}, {aborted} aborted, "
        f"{metrics.preemptions} preemptions, {metrics.cached_tokens} of {metrics.prompt_tokens} prompt tokens reused, "
        f"{metrics.steps} steps"
    )
