"""Engines with an assistant: the tokens of an engine without one, whoever drafts, whatever ends a request or takes pages."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4_compile import AsyncEngine, Engine, EngineConfig, SamplingParams, SpeculativeConfig, demo_checkpoint
from gemma4_compile.demo import DEMO_NAMES
from gemma4_compile.graphs.buckets import Buckets
from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.hf.assistant import load_assistant
from gemma4_compile.runtime.outputs import RequestOutput
from gemma4_compile.runtime.speculative.drafter import Drafter
from gemma4_compile.runtime.speculative.verification import Drafted, count_accepted
from gemma4_compile.runtime.step import invariants
from tests.runtime.demo_models import demo
from tests.runtime.host_recorder import HostRecorder

both = pytest.mark.parametrize("name", DEMO_NAMES)
SMALL = EngineConfig(max_requests=8, max_batched_tokens=64, page_size=16, overlap=True)


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(invariants.VARIABLE, "1")


@cache
def assistant(name: str) -> Any:
    return load_assistant(demo_checkpoint(name) / "assistant", dtype=torch.float32).eval().requires_grad_(False)


@cache
def plain(name: str) -> Engine:
    """Without MTP; engines are right without it by test_engine.py."""
    return Engine(demo(name).served, SMALL, demo(name).tokenizer)


def serve(name: str, drafts: Any = 3, config: EngineConfig = SMALL, verification: str = "match") -> Engine:
    models = demo(name)
    speculative = SpeculativeConfig(assistant(name), drafts, verification)
    return Engine(models.served, config, models.tokenizer, speculative=speculative)


class Scripted:
    """Drafts from known texts: `change` makes what it says of what is right."""

    def __init__(self, engine: Engine, texts: list[list[int]], drafts: int, change: Callable[[int], int] = lambda token: token):
        made = engine.runner.drafter
        assert isinstance(made, Drafter)
        self.made, self.speculative_tokens, self.change = made, drafts, change
        self.following = {(len(text[:i]) - 1, text[i - 1]): text[i:] for text in texts for i in range(1, len(text) + 1)}

    def draft_from(
        self, count: int, fill: Callable[[dict[str, Tensor]], None], drafts: int | None = None, draws: bool = False
    ) -> Drafted:  # fmt: skip
        inputs = self.made._buffers(count, self.made._width)
        fill(inputs)
        found = []
        for token, position in zip(inputs["tokens"].tolist(), inputs["positions"].tolist(), strict=True):
            after = self.following.get((position + 1, token), [])
            found.append([self.change(t) for t in (after + [0] * self.speculative_tokens)[: self.speculative_tokens]])
        return Drafted(torch.tensor(found)[:, :drafts])


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def assert_empty(engine: Engine) -> None:
    while engine.has_work:  # a round planned before the last tokens were read
        assert engine.step() == []
    assert engine.metrics.errors == 0
    engine.scheduler.check()
    for pool in engine.runner.pages.pools.values():
        assert pool.free == pool.pages


def same(output: RequestOutput, other: RequestOutput) -> None:
    """All that a request gets but its times."""
    assert [(s.token_ids, s.text, s.finish_reason, s.stop_reason) for s in output.samples] == [
        (s.token_ids, s.text, s.finish_reason, s.stop_reason) for s in other.samples
    ]
    for mine, its in zip(output.samples, other.samples, strict=True):
        assert (mine.logprobs is None) == (its.logprobs is None)
        for a, b in zip(mine.logprobs or (), its.logprobs or (), strict=True):
            assert (a.token_id, a.rank, list(a.top)) == (b.token_id, b.rank, list(b.top))
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


# Tokens


@pytest.mark.parametrize(("name", "drafts"), [("e", 1), ("e", 6), ("moe", 3)])
def test_greedy_tokens_are_hugging_faces(name: str, drafts: int, record_property: Callable[[str, Any], None]) -> None:
    models, engine = demo(name), serve(name, drafts)
    prompts = models.prompts(12, 150)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=24, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [24] * 12
    assert [models.divergence(output) for output in outputs] == [None] * 12
    assert_empty(engine)
    metrics = engine.metrics
    assert sum(o.metrics.draft_tokens for o in outputs) == metrics.draft_tokens == sum(metrics.draft_tokens_at.values()) > 0
    assert (
        sum(o.metrics.accepted_draft_tokens for o in outputs)
        == metrics.accepted_draft_tokens
        == sum(metrics.accepted_draft_tokens_at.values())
    )
    shares = {place: metrics.accepted_draft_tokens_at.get(place, 0) / count for place, count in metrics.draft_tokens_at.items()}
    print(
        f"{name}, K={drafts}: {metrics.accepted_draft_tokens / metrics.draft_tokens:.2f} of drafts accepted, by place {shares}"
    )
    assert shares[1] > 0.5, "the assistant reads other keys than its target's"


@pytest.mark.parametrize("drafts", [{1: 3, 3: 1, 5: 0}, "adaptive"], ids=str)
def test_any_length_at_any_time(drafts: Any) -> None:
    """K falls to none and rises again as requests come and go; or changes from step to step, as an adaptive one may."""
    models, engine = demo("e"), serve("e", drafts)
    if drafts == "adaptive":
        chooser = random.Random(0)
        engine._draft_length.choose = lambda running: chooser.randrange(7)  # type: ignore[method-assign, union-attr]
    prompts, params = models.prompts(12, 60), SamplingParams(max_tokens=16, ignore_eos=True)
    outputs, lengths = [], set()
    launch = engine.runner.launch

    def noted(work: Any, drafts: int, *more: Any) -> Any:
        lengths.add(drafts)
        return launch(work, drafts, *more)

    engine.runner.launch = noted  # type: ignore[method-assign, assignment]
    for prompt in prompts:
        engine.add_request(prompt, params, stream=False)
        outputs += [c.output for _ in range(2) for c in engine.step() if c.output]
    while engine.has_work:
        outputs += [c.output for c in engine.step() if c.output]
    assert [models.divergence(output) for output in outputs] == [None] * 12
    assert len(lengths) > 2 and engine.metrics.accepted_draft_tokens > 0
    assert_empty(engine)


def test_one_request_at_a_time_and_generate_itself() -> None:
    models = demo("e")
    engine = serve("e", 3, EngineConfig(max_requests=1, max_batched_tokens=16, page_size=16))
    prompts = models.prompts(3, 60)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    assert ids(outputs) == [models.generate(prompt, 20) for prompt in prompts]
    assert engine.metrics.steps < 3 * 20
    assert_empty(engine)


@pytest.mark.parametrize("who", ["right", "wrong", "random"])
def test_tokens_whoever_drafts(who: str) -> None:
    models, engine = demo("e"), serve("e", 4)
    prompts, params = models.prompts(8, 100), SamplingParams(max_tokens=21, ignore_eos=True)
    expected = plain("e").generate(prompts, params)
    texts = [prompt + output.token_ids for prompt, output in zip(prompts, expected, strict=True)]
    chooser = random.Random(0)
    change = {
        "right": lambda token: token,
        "wrong": lambda token: (token + 1) % 2048,
        "random": lambda token: token if chooser.random() < 0.6 else chooser.randrange(2048),
    }[who]
    engine.runner.drafter = Scripted(engine, texts, 4, change)
    assert ids(engine.generate(prompts, params)) == ids(expected)
    assert_empty(engine)
    share = engine.metrics.accepted_draft_tokens / engine.metrics.draft_tokens
    assert {"right": share == 1, "wrong": share == 0, "random": 0.1 < share < 0.9}[who]


@both
def test_sampled_tokens_are_those_of_their_seeds(name: str) -> None:
    models, engine = demo(name), serve(name, 3)
    prompts = models.prompts(6, 80)
    given: list[dict[str, Any]] = [
        {}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 20}, {"temperature": 0.9, "top_p": 0.9, "n": 2},
        {"temperature": 0.6, "min_p": 0.05}, {"temperature": 0.8, "logit_bias": {100: 4.0}, "min_tokens": 7},
    ]  # fmt: skip
    params = [SamplingParams(max_tokens=20, ignore_eos=True, seed=i, **more) for i, more in enumerate(given)]
    for output, other in zip(engine.generate(prompts, params), plain(name).generate(prompts, params), strict=True):
        same(output, other)
    assert engine.metrics.accepted_draft_tokens > 0
    assert_empty(engine)


@pytest.mark.slow
def test_sampled_text_is_distributed_as_the_targets() -> None:
    """Chi-square of the first three tokens, two of which may be drafts, of 500 seeds; the target's probabilities by Hugging
    Face."""
    models, engine = demo("e"), serve("e", 3, replace(SMALL, max_requests=32), "block")
    prompt, top_k, temperature = models.prompts(3, 60)[0], 3, 1.0
    params = [
        SamplingParams(max_tokens=6, ignore_eos=True, temperature=temperature, top_k=top_k, seed=i) for i in range(500)
    ]  # fmt: skip
    found = Counter(tuple(tokens[:3]) for tokens in ids(engine.generate([prompt] * len(params), params)))
    assert engine.metrics.accepted_draft_tokens > 0.5 * len(params)

    expected: dict[tuple[int, ...], float] = {(): float(len(params))}
    for _ in range(3):
        longer = {}
        for text, count in expected.items():
            with torch.no_grad():
                logits = models.plain(torch.tensor([prompt + list(text)]), use_cache=False).logits[0, -1].double() / temperature
            values, tokens = logits.topk(top_k)
            for token, share in zip(tokens.tolist(), values.softmax(0).tolist(), strict=True):
                longer[(*text, token)] = count * share
        expected = longer
    assert set(found) <= set(expected)
    rare = {text for text, count in expected.items() if count < 8}
    cells = [(found[text], count) for text, count in expected.items() if text not in rare]
    cells.append((sum(found[text] for text in rare), sum(expected[text] for text in rare)))
    statistic = sum((seen - count) ** 2 / count for seen, count in cells if count)
    bound = 2 * float(torch.distributions.Gamma((len(cells) - 1) / 2, 1.0).sample((200_000,)).quantile(1 - 1e-4))
    assert len(cells) > 6 and statistic < bound
    assert_empty(engine)


def test_seeds_and_parameters_of_rejection_sampling() -> None:
    """Greedy requests beside sampled ones have their own tokens; the same engine gives a seed's text again; penalized ones and
    those with biases and least lengths are served."""
    models = demo("e")
    prompts = models.prompts(6, 80)
    given: list[dict[str, Any]] = [
        {}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 20, "logprobs": 2}, {"temperature": 0.9, "top_p": 0.9, "n": 2},
        {"temperature": 0.6, "repetition_penalty": 1.2}, {"temperature": 0.8, "logit_bias": {100: -4.0}, "min_tokens": 7},
    ]  # fmt: skip
    params = [SamplingParams(max_tokens=20, ignore_eos=i != 5, seed=i, **more) for i, more in enumerate(given)]
    texts = []
    for _ in range(2):
        engine = serve("e", 3, verification="block")
        outputs = engine.generate(prompts, params)
        texts.append([[s.token_ids for s in output.samples] for output in outputs])
        assert engine.metrics.accepted_draft_tokens > 0
        assert_empty(engine)
    assert texts[0] == texts[1] and models.divergence(outputs[0]) is None
    assert len(texts[0][3]) == 2 and len(texts[0][5][0]) >= 7
    chosen = [p.token_id for p in outputs[2].logprobs or ()]
    assert chosen == outputs[2].token_ids


def test_tokens_through_graphs() -> None:
    """FULL steps, whose tokens the graph itself has chosen, and sampled ones behind a graph."""
    models = demo("e")
    engine = serve("e", 3, EngineConfig(max_requests=4, max_batched_tokens=64, page_size=16, max_model_len=256))
    runner = engine.runner
    inputs = runner._padding_step(1, 1, runner.pages.tables["full_attention"].shape[1]) | runner.kv
    buckets = Buckets(decode=(1, 8, 16), tokens=(16, 64), rows=(4, 16))
    runner.graphs = GraphRunner(runner.packed.program, inputs, 4, buckets, HostRecorder(), runner.state)
    for params in (SamplingParams(max_tokens=16, ignore_eos=True),
                   SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.8, seed=5)):  # fmt: skip
        prompts = models.prompts(6, 100)
        assert ids(engine.generate(prompts, params)) == ids(plain("e").generate(prompts, params))
    assert runner.graphs.refused == {} and runner.graphs.replays > 8
    assert_empty(engine)


def test_nothing_is_captured_while_requests_run() -> None:
    """Rounds of each length that the configuration allows, greedy and drawn, for one request and for several."""
    config = EngineConfig(max_requests=4, max_batched_tokens=64, page_size=16, max_model_len=256)
    engine = serve("e", {1: 3, 2: 2}, config, "block")
    runner, recorder = engine.runner, HostRecorder()
    width = runner.pages.tables["full_attention"].shape[1]
    inputs = runner._padding_step(1, 1, width) | runner.kv
    buckets = Buckets(decode=(1, 4, 8, 16), tokens=(16, 64), rows=(4, 16))
    runner.graphs = GraphRunner(runner.packed.program, inputs, 4, buckets, recorder, runner.state)
    drafter = Drafter(
        runner.packed.model, engine.assistant, 3, runner.kv, width=width, sizes=(1, 2, 4), draws=True, recorder=recorder
    )
    runner.drafter = drafter
    names = list(runner.capture())
    assert [name for name in names if name.startswith("draft")] == [
        f"draft {drafts} for {size}{drawn}" for drafts, size in ((2, 4), (2, 2), (3, 1)) for drawn in ("", ", drawn")
    ]
    recorded, checked = recorder.recorded, set(runner.graphs._checked)
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=temperature)
        for count in (1, 4):
            engine.generate(demo("e").prompts(count, 60), params)
    assert recorder.recorded == recorded and not drafter.refused and not runner.graphs.refused
    assert runner.graphs._checked == checked, "no graph is compared with the program while a request waits"


# Ends


def test_requests_end_in_the_middle_of_an_accepted_run() -> None:
    """Stop tokens, stop strings, limits and log probabilities, each at every place of a run of right drafts."""
    models = demo("e")
    prompt = models.prompts(3, 60)[0] + models.prompts(3, 60)[1]
    [whole] = plain("e").generate(prompt, SamplingParams(max_tokens=14, ignore_eos=True))
    engine = serve("e", 4)
    engine.runner.drafter = Scripted(engine, [prompt + whole.token_ids], 4)
    cases: list[dict[str, Any]] = [{"max_tokens": n} for n in range(1, 12)]
    cases += [{"stop_token_ids": [token]} for token in dict.fromkeys(whole.token_ids)]
    pieces = [models.tokenizer.decode(whole.token_ids[i : i + 2]) for i in range(10)]
    cases += [{"stop": [piece]} for piece in dict.fromkeys(pieces) if piece.strip()]
    cases += [{"stop": [pieces[5]], "min_tokens": 4}, {"logprobs": 3}, {"logprobs": 2, "stop_token_ids": whole.token_ids[6:7]}]
    params = [SamplingParams(**{"max_tokens": 14, "ignore_eos": True, **case}) for case in cases]
    outputs, others = (made.generate([prompt] * len(cases), params) for made in (engine, plain("e")))
    for output, other in zip(outputs, others, strict=True):
        same(output, other)
    assert engine.metrics.accepted_draft_tokens > len(cases)
    assert_empty(engine)


def test_chunks_join_to_the_text() -> None:
    models, engine = demo("e"), serve("e", 3)
    prompt = models.prompts(2, 60)[1]
    chunks = list(engine.stream(prompt, SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)))
    output = chunks[-1].output
    assert output is not None and len(chunks) < 20
    assert [t for chunk in chunks for t in chunk.token_ids] == output.token_ids and len(output.token_ids) == 20
    assert "".join(chunk.text for chunk in chunks) == output.text
    assert [p.token_id for chunk in chunks for p in chunk.logprobs or ()] == output.token_ids


def test_async_engine() -> None:
    models = demo("e")
    prompts, params = models.prompts(3, 60), SamplingParams(max_tokens=12, ignore_eos=True)

    async def serve_all() -> list[RequestOutput]:
        made = AsyncEngine(models.served, SMALL, models.tokenizer, speculative=SpeculativeConfig(assistant("e")))
        async with made as engine:
            found = await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))
            assert engine.engine.metrics.accepted_draft_tokens > 0
            return list(found)

    assert [models.divergence(output) for output in asyncio.run(serve_all())] == [None] * 3


# Batches


def test_requests_that_it_does_not_serve_run_beside_those_it_does() -> None:
    models, engine = demo("e"), serve("e", 3)
    prompts = models.prompts(6, 60)
    params = [
        SamplingParams(max_tokens=16, ignore_eos=True, **more)  # type: ignore[arg-type]
        for more in ({}, {"repetition_penalty": 1.3}, {}, {"prompt_logprobs": 1}, {}, {"frequency_penalty": 0.5, "logprobs": 1})
    ]
    outputs = engine.generate(prompts, params)
    for output, other in zip(outputs, plain("e").generate(prompts, params), strict=True):
        same(output, other)
    assert [output.metrics.draft_tokens > 0 for output in outputs] == [True, False] * 3
    assert_empty(engine)


@both
def test_tokens_under_preemption(name: str) -> None:
    """Pages are given back and taken by others. The full pool runs out first here; sliding ones do in test_scheduler.py."""
    models = demo(name)
    config = EngineConfig(
        max_requests=8, max_batched_tokens=48, page_size=16, max_model_len=300, expected_tokens=60,
        kv_bytes=models.room_for(450),
    )  # fmt: skip
    engine = serve(name, 6, config)
    for prompt in models.prompts(12, 100):
        engine.add_request(prompt, SamplingParams(max_tokens=100, ignore_eos=True), stream=False)
    outputs = []
    while engine.has_work:
        outputs += [c.output for c in engine.step() if c.output]
    assert [models.divergence(output) for output in outputs] == [None] * 12
    assert engine.metrics.preemptions > 0 and engine.metrics.accepted_draft_tokens > 0
    assert_empty(engine)


def test_tokens_with_reused_prefixes() -> None:
    """Pages that are remembered hold accepted tokens alone: whoever reuses an answer gets what the text asks for."""
    models, engine = demo("e"), serve("e", 6)
    text = next(p for p in models.prompts(4, 120) if len(p) == 120)
    outputs = []
    for _ in range(4):
        outputs += engine.generate(text, SamplingParams(max_tokens=30, ignore_eos=True))
        text = text + outputs[-1].token_ids
    assert [models.divergence(output) for output in outputs] == [None] * 4
    assert [output.metrics.cached_tokens for output in outputs] == [0, 144, 176, 208]
    assert_empty(engine)


def test_aborts_and_failed_steps_leave_no_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    models, chooser = demo("e"), random.Random(1)
    engine = serve("e", 3, EngineConfig(max_requests=4, max_batched_tokens=40, page_size=16))
    params, outputs = SamplingParams(max_tokens=12, ignore_eos=True), []
    launch = engine.runner.launch

    def failing(*arguments: Any) -> Any:
        if chooser.random() < 0.05:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return launch(*arguments)

    monkeypatch.setattr(engine.runner, "launch", failing)
    for _ in range(6):
        names = [engine.add_request(p, params, stream=False) for p in models.prompts(8, 80)]
        sequences = [s for name in names for s in engine.outputs.requests[name].samples]
        while engine.has_work:
            if chooser.random() < 0.1:
                engine.abort(chooser.choice(names))
            outputs += [c.output for c in engine.step() if c.output]
        assert not any(s.allocation for s in sequences)
    ends = {output.finish_reason for output in outputs}
    assert ends == {"length", "error"} and all(models.divergence(o) is None for o in outputs if o.finish_reason == "length")
    engine.scheduler.check()
    for pool in engine.runner.pages.pools.values():
        assert pool.free == pool.pages


# What it is given


def test_what_cannot_be() -> None:
    models = demo("e")
    for drafts in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="speculative tokens must be 1 or more"):
            SpeculativeConfig(assistant("e"), drafts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="verification must be one of block, match, got 'token'"):
        SpeculativeConfig(assistant("e"), verification="token")
    with pytest.raises(ValueError, match="use its own assistant"):
        Engine(models.served, SMALL, speculative=SpeculativeConfig(assistant("moe")))


def test_accepted_drafts_are_leading_ones() -> None:
    """Of requests of 3, 0, 1 and 3 drafts; the last has a right one behind a wrong one, the second none at all."""
    tokens = torch.tensor([5, 6, 7, 8, 9, 4, 4, 1, 2, 3, 3])
    first = torch.tensor([0, 4, 5, 7])
    drafts = torch.tensor([[5, 6, 7], [-1, -1, -1], [4, -1, -1], [1, 9, 3]])
    assert count_accepted(tokens, first, drafts).tolist() == [3, 0, 1, 1]
