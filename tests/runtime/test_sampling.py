"""What SamplingParams say is what an engine does: against transformers' generate, plain loops over its logits, and itself."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4_compile import Chunk, Engine, EngineConfig, RequestOutput, SamplingParams
from gemma4_compile.geometry import geometry
from gemma4_compile.runtime.outputs import TokenLogprob
from gemma4_compile.runtime.worker.memory import token_bytes
from tests.runtime.demo_models import demo

CONFIG: dict[str, Any] = {"max_requests": 8, "max_batched_tokens": 64, "page_size": 16}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return serve()


def serve(**given: Any) -> Engine:
    models = demo("e")
    return Engine(models.served, EngineConfig(**(CONFIG | given)), models.tokenizer)


def crowded(**given: Any) -> Engine:
    """One whose pools hold fewer tokens than the tests' requests have."""
    layers = geometry(demo("e").plain.config)
    per_token = sum(token_bytes(layers.kv_owners(kind), 4) for kind in ("sliding_attention", "full_attention"))
    return serve(kv_bytes=260 * per_token, max_model_len=120, expected_tokens=100, **given)


@cache
def prompts(count: int = 5, longest: int = 60) -> list[list[int]]:
    return demo("e").prompts(count, longest)


@cache
def logits_of(tokens: tuple[int, ...]) -> Tensor:
    """Hugging Face's, after each of the tokens: [T, vocabulary]."""
    with torch.inference_mode():
        return demo("e").plain(torch.tensor([tokens]), use_cache=False).logits[0].float()


def by_hand(prompt: Sequence[int], count: int, choose: Callable[[Tensor, list[int]], Tensor]) -> list[int]:
    """Tokens of a plain loop; `choose` makes scores of the last logits and the tokens so far."""
    output: list[int] = []
    for _ in range(count):
        output.append(int(choose(logits_of((*prompt, *output))[-1], output).argmax()))
    return output


def one(engine: Engine, prompt: Any, **params: Any) -> RequestOutput:
    return engine.generate(prompt, SamplingParams(**params))[0]


# Values


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more, got 0"),
        ({"max_tokens": 1.5}, "max_tokens must be 1 or more, got 1.5"),
        ({"max_tokens": True}, "max_tokens must be 1 or more, got True"),
        ({"min_tokens": -1}, "min_tokens must be 0 or more, got -1"),
        ({"min_tokens": None}, "min_tokens must be 0 or more, got None"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be at most max_tokens, got 9 and 8"),
        ({"temperature": -0.1}, "temperature must be 0.0 to 1000000.0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0.0 to 1000000.0, got nan"),
        ({"temperature": math.inf}, "temperature must be 0.0 to 1000000.0, got inf"),
        ({"temperature": "1"}, "temperature must be 0.0 to 1000000.0, got '1'"),
        ({"top_k": -1}, "top_k must be 0 to 2147483647, got -1"),
        ({"top_k": 2**31}, "top_k must be 0 to 2147483647, got 2147483648"),
        ({"top_k": 1.0}, "top_k must be 0 to 2147483647, got 1.0"),
        ({"top_p": -0.1}, "top_p must be 0.0 to 1.0, got -0.1"),
        ({"top_p": 1.1}, "top_p must be 0.0 to 1.0, got 1.1"),
        ({"top_p": 0}, "top_p must be more than 0, got 0"),
        ({"min_p": -0.1}, "min_p must be 0.0 to 1.0, got -0.1"),
        ({"min_p": 1.1}, "min_p must be 0.0 to 1.0, got 1.1"),
        ({"repetition_penalty": -1}, "repetition_penalty must be 0.0 to 1000000.0, got -1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be more than 0, got 0"),
        ({"presence_penalty": 2.1}, "presence_penalty must be -2.0 to 2.0, got 2.1"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be -2.0 to 2.0, got -2.1"),
        ({"seed": -1}, "seed must be 0 to 9223372036854775807, got -1"),
        ({"seed": 2**63}, "seed must be 0 to 9223372036854775807, got 9223372036854775808"),
        ({"n": 0}, "n must be 1 or more, got 0"),
        ({"stop": ""}, "stop must hold strings that are not empty, got ['']"),
        ({"stop": ["a", 5]}, "stop must hold strings that are not empty, got ['a', 5]"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids must name tokens by their ids, got '5'"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias must name tokens by their ids, got '5'"),
        ({"logit_bias": {5: math.inf}}, "logit_bias must be -inf or within 1000000 of 0, got inf for token 5"),
        ({"logit_bias": {5: math.nan}}, "logit_bias must be -inf or within 1000000 of 0, got nan for token 5"),
        ({"logit_bias": {5: "1"}}, "logit_bias must be -inf or within 1000000 of 0, got '1' for token 5"),
        ({"logprobs": -1}, "logprobs must be 0 to 100, got -1"),
        ({"logprobs": 101}, "logprobs must be 0 to 100, got 101"),
        ({"prompt_logprobs": 101}, "prompt_logprobs must be 0 to 100, got 101"),
    ],
)
def test_values_that_cannot_be(params: dict[str, Any], message: str) -> None:
    """The rule, the value, and what to do."""
    with pytest.raises(ValueError) as caught:
        SamplingParams(**params)
    assert str(caught.value).startswith(message + "; ")


def test_values_that_can_be() -> None:
    edges = SamplingParams(
        max_tokens=None, min_tokens=9, temperature=1, top_k=2**31 - 1, top_p=1, min_p=1, seed=2**63 - 1, n=9, stop="END",
        stop_token_ids=[5], repetition_penalty=0.1, presence_penalty=-2, frequency_penalty=2, logit_bias={5: -math.inf, 6: -1},
        logprobs=100, prompt_logprobs=0,
    )  # fmt: skip
    assert edges.stop == ("END",) and edges.stop_token_ids == (5,) and edges.token_ids() == {5, 6} and edges.penalizes
    assert not SamplingParams().penalizes


def test_params_that_the_model_cannot_serve(engine: Engine) -> None:
    for params, message in (
        ({"logit_bias": {2048: 1.0}}, "tokens in params must be 0 to 2047, got 2048"),
        ({"stop_token_ids": [-1]}, "tokens in params must be 0 to 2047, got -1"),
        ({"n": 9, "temperature": 1.0}, "n must be at most max_requests=8, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add_request([5], SamplingParams(**params))  # type: ignore[arg-type]
    assert not engine.has_work


# Penalties, biases


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(engine: Engine, penalty: float) -> None:
    plain = demo("e").plain
    outputs = engine.generate(prompts(), SamplingParams(max_tokens=12, repetition_penalty=penalty))
    without = engine.generate(prompts(), SamplingParams(max_tokens=12))
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids])
        with torch.inference_mode():
            wanted = plain.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, repetition_penalty=penalty
            )
        assert output.token_ids == wanted[0, ids.shape[1] :].tolist()
    assert [output.token_ids for output in outputs] != [output.token_ids for output in without]


def penalized(presence: float, frequency: float) -> Callable[[Tensor, list[int]], Tensor]:
    def choose(logits: Tensor, output: list[int]) -> Tensor:
        scores = logits.clone()
        for token, count in Counter(output).items():
            scores[token] -= presence + frequency * count
        return scores

    return choose


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-1.0, 1.5)])
def test_presence_and_frequency_penalties(engine: Engine, presence: float, frequency: float) -> None:
    """Of what was sampled, not of the prompt; amid requests that have none, in rows that others had before."""
    some = SamplingParams(max_tokens=16, presence_penalty=presence, frequency_penalty=frequency, ignore_eos=True)
    mixed = [some, SamplingParams(max_tokens=16), some]
    outputs = engine.generate(prompts()[1:4], mixed)
    for output, params in zip(outputs, mixed, strict=True):
        choose = penalized(params.presence_penalty, params.frequency_penalty)
        assert output.token_ids == by_hand(output.prompt_token_ids, len(output.token_ids), choose)
    plain = engine.generate(prompts()[1:4], SamplingParams(max_tokens=16, ignore_eos=True))
    assert [output.token_ids for output in plain][::2] != [output.token_ids for output in outputs][::2]


def test_penalties_count_what_was_there_before_a_preemption() -> None:
    params = SamplingParams(max_tokens=40, frequency_penalty=0.7, repetition_penalty=1.2, ignore_eos=True)
    for overlap in (False, True):
        tight = crowded(overlap=overlap)
        outputs = tight.generate(prompts(), params)
        assert tight.metrics.preemptions > 0
        assert [o.token_ids for o in outputs] == [o.token_ids for o in serve().generate(prompts(), params)]


def test_logit_bias(engine: Engine) -> None:
    prompt, greedy = prompts()[2], one(engine, prompts()[2], max_tokens=1).token_ids[0]
    ranking = logits_of(tuple(prompt))[-1].argsort(descending=True).tolist()
    assert ranking[0] == greedy
    assert one(engine, prompt, max_tokens=3, logit_bias={77: 100}).token_ids == [77] * 3
    for never in (-100, -math.inf):
        assert one(engine, prompt, max_tokens=1, logit_bias={greedy: never}).token_ids == ranking[1:2]
        two = {greedy: never, ranking[1]: never}
        assert one(engine, prompt, max_tokens=1, logit_bias=two, temperature=1.0, top_k=1).token_ids == ranking[2:3]
    assert one(engine, prompt, max_tokens=1, logit_bias={greedy: 0.0}).token_ids == [greedy]


# Ends


def test_stop_tokens(engine: Engine) -> None:
    prompt = prompts()[3]
    free = one(engine, prompt, max_tokens=16, ignore_eos=True).token_ids
    stop = free[5]
    found = one(engine, prompt, max_tokens=16, stop_token_ids=[stop, 3])
    end = free.index(stop) + 1
    assert (found.token_ids, found.finish_reason, found.samples[0].stop_reason) == (free[:end], "stop", stop)
    assert found.text == demo("e").tokenizer.decode(free[:end])


def test_min_tokens_and_the_ends_of_the_model(engine: Engine) -> None:
    """With <eos> made likely, it comes at once; not before min_tokens; and ends nothing where it is ignored."""
    prompt, eos = prompts()[3], 1
    likely: dict[str, Any] = {"max_tokens": 8, "logit_bias": {eos: 100}}
    at_once = one(engine, prompt, **likely)
    assert (at_once.token_ids, at_once.finish_reason, at_once.samples[0].stop_reason) == ([eos], "stop", eos)
    assert at_once.text == ""
    later = one(engine, prompt, min_tokens=3, **likely)
    assert later.token_ids == [*by_hand(prompt, 3, lambda x, _: x.index_fill(0, torch.tensor(eos), -torch.inf)), eos]
    ignored = one(engine, prompt, ignore_eos=True, **likely)
    assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 8, "length")
    # Stop tokens of one's own are held back too, <eos> is not where it is ignored.
    both = one(engine, prompt, min_tokens=2, stop_token_ids=[77], logit_bias={eos: 90, 77: 100}, max_tokens=8, ignore_eos=True)
    assert both.token_ids == [eos, eos, 77]


def test_stop_strings(engine: Engine) -> None:
    prompt = prompts()[3]
    free = one(engine, prompt, max_tokens=24, ignore_eos=True)
    tokens = [demo("e").tokenizer.decode([token]) for token in free.token_ids]
    stop = free.text[len("".join(tokens[:5])) - 1 :][:3]  # of two tokens at least
    cut = free.text.index(stop)
    for stream in (False, True):
        name = engine.add_request(prompt, SamplingParams(max_tokens=24, stop=[stop], ignore_eos=True), stream=stream)
        chunks: list[Chunk] = []
        while not chunks or chunks[-1].output is None:
            chunks += [chunk for chunk in engine.step() if chunk.request_id == name]
        output = chunks[-1].output
        assert (output.text, output.finish_reason, output.samples[0].stop_reason) == (free.text[:cut], "stop", stop)
        assert "".join(chunk.text for chunk in chunks) == output.text
        assert (
            len("".join(tokens[: len(output.token_ids)])) >= cut + len(stop) > len("".join(tokens[: len(output.token_ids) - 1]))
        )
    late = one(engine, prompt, max_tokens=24, min_tokens=24, stop=[stop], ignore_eos=True)
    assert late.text == free.text


# Log probabilities


def assert_logprobs(found: list[TokenLogprob] | None, tokens: list[int], logits: Tensor, top: int) -> None:
    assert found is not None and [entry.token_id for entry in found] == tokens
    expected = logits.log_softmax(-1)
    for entry, row in zip(found, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        near = ((row - row[entry.token_id]).abs() < 1e-4).sum()
        assert abs(entry.rank - 1 - int((row > row[entry.token_id]).sum())) < near
        assert len(entry.top) == top and list(entry.top.values()) == sorted(entry.top.values(), reverse=True)
        best = row.topk(max(top, 1)).values.tolist()[:top]
        assert list(entry.top.values()) == pytest.approx(best, abs=1e-4)
        assert all(value == pytest.approx(float(row[token]), abs=1e-4) for token, value in entry.top.items())


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    """Whatever the sampling makes of the logits; each request as many as it asks for."""
    shaped: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3, "logit_bias": {77: 5.0}, "seed": 3}
    params = [
        SamplingParams(max_tokens=8, logprobs=3), SamplingParams(max_tokens=8, logprobs=0, **shaped),
        SamplingParams(max_tokens=8), SamplingParams(max_tokens=8, logprobs=100, **shaped),
    ]  # fmt: skip
    for output, param in zip(engine.generate(prompts()[1:], params), params, strict=True):
        if param.logprobs is None:
            assert output.logprobs is None
            continue
        logits = logits_of((*output.prompt_token_ids, *output.token_ids))[len(output.prompt_token_ids) - 1 : -1]
        assert_logprobs(output.logprobs, output.token_ids, logits, param.logprobs)


def assert_prompt_logprobs(output: RequestOutput, top: int) -> None:
    prompt = output.prompt_token_ids
    assert_logprobs(output.prompt_logprobs, prompt[1:], logits_of(tuple(prompt))[:-1], top)


def test_prompt_logprobs(engine: Engine) -> None:
    """Beside requests without; of one token: none; of a prompt that was computed before: all."""
    params = [SamplingParams(max_tokens=4, prompt_logprobs=p, logprobs=1) for p in (2, None, 0, 5, 1)]
    for _ in range(2):
        outputs = engine.generate(prompts(), params)
        for output, param in zip(outputs, params, strict=True):
            if param.prompt_logprobs is None:
                assert output.prompt_logprobs is None
            else:
                assert_prompt_logprobs(output, param.prompt_logprobs)
        assert [demo("e").divergence(output) for output in outputs] == [None] * 5
    assert outputs[0].prompt_logprobs == [] and outputs[4].metrics.cached_tokens == 0 < outputs[1].metrics.cached_tokens


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_logprobs_of_chunks(overlap: bool) -> None:
    """Prompts longer than a step, and than the rows that a step has for them."""
    cut = serve(max_batched_tokens=17, overlap=overlap)
    for output in cut.generate(prompts(), SamplingParams(max_tokens=3, prompt_logprobs=2)):
        assert_prompt_logprobs(output, 2)
    wide = serve(max_batched_tokens=700, overlap=overlap)
    long = demo("e").prompts(2, 400)[::-1]
    outputs = wide.generate(long + prompts()[3:], SamplingParams(max_tokens=3, prompt_logprobs=1))
    for output in outputs:
        assert_prompt_logprobs(output, 1)


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_logprobs_under_preemption(overlap: bool) -> None:
    tight = crowded(overlap=overlap)
    params = [SamplingParams(max_tokens=40, ignore_eos=True, prompt_logprobs=i % 3, logprobs=1) for i in range(5)]
    outputs = tight.generate(prompts(), params)
    assert tight.metrics.preemptions > 0 and max(output.metrics.preemptions for output in outputs) > 0
    for index, output in enumerate(outputs):
        assert_prompt_logprobs(output, index % 3)
        logits = logits_of((*output.prompt_token_ids, *output.token_ids))[len(output.prompt_token_ids) - 1 : -1]
        assert_logprobs(output.logprobs, output.token_ids, logits, 1)


# Sampling


HOT: dict[str, Any] = {"max_tokens": 12, "temperature": 1.2, "ignore_eos": True}


def test_a_seed_gives_the_same_tokens_whatever_else_runs(engine: Engine) -> None:
    prompt = prompts()[4]
    mine = SamplingParams(**HOT, seed=7, top_p=0.95, presence_penalty=0.5)
    alone = one(engine, prompt, **HOT, seed=7, top_p=0.95, presence_penalty=0.5).token_ids
    assert alone != one(engine, prompt, **HOT, seed=8, top_p=0.95, presence_penalty=0.5).token_ids
    others = [
        SamplingParams(max_tokens=20), SamplingParams(max_tokens=3, temperature=0.5, top_k=5),
        SamplingParams(max_tokens=9, temperature=2.0, min_p=0.1, n=2), SamplingParams(**HOT, seed=1, logit_bias={9: 4.0}),
        SamplingParams(max_tokens=7, repetition_penalty=1.4), SamplingParams(**HOT, seed=7), SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=12, logprobs=4, prompt_logprobs=2, temperature=0.7),
    ]  # fmt: skip
    company = [prompts()[i % 5] for i in range(8)]
    for at in (0, 4, 8):
        outputs = engine.generate([*company[:at], prompt, *company[at:]], [*others[:at], mine, *others[at:]])
        assert outputs[at].token_ids == alone
    for other in (serve(max_batched_tokens=9, overlap=True), serve(prefix_caching=False), crowded(overlap=True)):
        outputs = other.generate([prompts()[3], prompts()[2], prompt], [*others[:2], mine])
        assert outputs[2].token_ids == alone


def test_seeds_after_preemption() -> None:
    params = [SamplingParams(max_tokens=40, temperature=1.2, ignore_eos=True, seed=i) for i in range(5)]
    wanted = [output.token_ids for output in serve().generate(prompts(), params)]
    for overlap in (False, True):
        tight = crowded(overlap=overlap)
        assert [output.token_ids for output in tight.generate(prompts(), params)] == wanted
        assert tight.metrics.preemptions > 0


def test_samples_of_one_prompt() -> None:
    """n=3 is three requests with seeds that follow each other, over one computation of the prompt."""
    engine, prompt = serve(), prompts()[2]
    three = one(engine, prompt, **HOT, n=3, seed=5, logprobs=1)
    assert engine.metrics.cached_tokens == 0 and len({tuple(sample.token_ids) for sample in three.samples}) == 3
    singles = [one(engine, prompt, **HOT, seed=5 + i, logprobs=1) for i in range(3)]
    for sample, single in zip(three.samples, singles, strict=True):
        assert (sample.token_ids, sample.text, sample.finish_reason) == (single.token_ids, single.text, "length")
        logits = logits_of((*prompt, *sample.token_ids))[len(prompt) - 1 : -1]
        assert_logprobs(sample.logprobs, sample.token_ids, logits, 1)
    assert three.metrics.output_tokens == 36 and [single.metrics.cached_tokens for single in singles] == [48, 48, 48]


def test_samples_share_their_prompts_pages() -> None:
    engine, prompt = serve(max_batched_tokens=200), prompts()[2] + prompts()[2][1:]
    assert len(prompt) == 119
    engine.add_request(prompt, SamplingParams(**HOT, n=3, seed=5))
    engine.step()
    assert [s.cached for s in engine.scheduler.running] == [0, 112, 112]
    full = engine.metrics.pages["full_attention"] - engine.metrics.free_pages["full_attention"]
    assert full == 7 + 3
    while engine.has_work:
        engine.step()


def test_samples_of_one_prompt_with_its_logprobs(engine: Engine) -> None:
    output = one(engine, prompts()[4], **HOT, n=3, seed=1, prompt_logprobs=2)
    assert_prompt_logprobs(output, 2)


def test_engines_seeds() -> None:
    """Requests without a seed differ from each other, and are the same for engines with the same seed."""
    first, same, other = (
        [output.token_ids for output in serve(seed=seed).generate([prompts()[2]] * 3, SamplingParams(**HOT))]
        for seed in (1, 1, 2)
    )
    assert first == same != other and len(set(map(tuple, first))) == 3


def test_one_likely_token_is_greedy(engine: Engine) -> None:
    greedy = [output.token_ids for output in engine.generate(prompts(), SamplingParams(max_tokens=8))]
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        params = SamplingParams(**{"max_tokens": 8, "temperature": 1.5, **only})  # type: ignore[arg-type]
        assert [output.token_ids for output in engine.generate(prompts(), params)] == greedy


def test_tokens_come_as_often_as_they_should() -> None:
    """600 first tokens, against softmax(logits / temperature) of the likeliest: chi-square over those expected 5 times."""
    engine, prompt = serve(max_requests=64, max_batched_tokens=256), prompts()[4]
    params = [SamplingParams(max_tokens=1, temperature=1.5, top_k=40, seed=seed) for seed in range(600)]
    counts = Counter(output.token_ids[0] for output in engine.generate([prompt] * 600, params))
    values, tokens = logits_of(tuple(prompt))[-1].topk(40)
    assert set(counts) <= set(tokens.tolist())
    expected = dict(zip(tokens.tolist(), (600 * (values / 1.5).softmax(0)).tolist(), strict=True))
    often = {token for token, number in expected.items() if number >= 5}
    assert len(often) >= 4
    square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in often)
    assert square < len(often) + 4 * math.sqrt(2 * len(often)), (square, len(often))
