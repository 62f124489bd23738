"""Engines on the demo checkpoints: Hugging Face's greedy tokens however requests come, faults that stay with their request."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig

from gemma4_compile import Engine, EngineConfig, OptimizeConfig, SamplingParams, report
from gemma4_compile.demo import DEMO_NAMES
from gemma4_compile.geometry import geometry
from gemma4_compile.graphs.buckets import Buckets
from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.ops.attention import attention_kernels
from gemma4_compile.optimized import state_of
from gemma4_compile.runtime.outputs import Chunk
from gemma4_compile.runtime.step import invariants
from gemma4_compile.runtime.worker.memory import divide, naive_token_bytes, token_bytes
from tests.models import CONFIGS, tiny
from tests.passes.harness import passes_only
from tests.runtime.demo_models import Demo, demo
from tests.runtime.host_recorder import HostRecorder
from tests.runtime.soak import soak

both = pytest.mark.parametrize("name", DEMO_NAMES)
one_is_slow = pytest.mark.parametrize("name", ["e", pytest.param("moe", marks=pytest.mark.slow)])
SMALL = EngineConfig(max_requests=8, max_batched_tokens=64, page_size=16)
CONFIGS_SERVED: dict[str, dict[str, Any]] = {
    "one at a time": {"max_requests": 1, "max_batched_tokens": 512},
    "large pages": {"max_requests": 8, "max_batched_tokens": 128, "page_size": 128},
    "odd chunks, overlapped": {"max_requests": 8, "max_batched_tokens": 33, "page_size": 16, "overlap": True},
    "no reuse": {"max_requests": 16, "max_batched_tokens": 256, "prefix_caching": False},
}  # fmt: skip


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(invariants.VARIABLE, "1")


def serve(name: str, config: EngineConfig = SMALL) -> Engine:
    models = demo(name)
    return Engine(models.served, config, models.tokenizer)


def assert_right(engine: Engine, models: Demo, outputs: list[Any]) -> None:
    """Greedy tokens, no page in use, nothing that waits."""
    assert [models.divergence(output) for output in outputs] == [None] * len(outputs)
    assert not engine.has_work
    engine.scheduler.check()
    for pool in engine.runner.pages.pools.values():
        assert pool.free == pool.pages


@pytest.mark.slow
@both
def test_tokens_of_held_out_prompts(name: str) -> None:
    models = demo(name)
    engine = serve(name, EngineConfig(max_requests=32, max_batched_tokens=512))
    outputs = engine.generate(models.prompts(64, 900), SamplingParams(max_tokens=8, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [8] * 64
    assert_right(engine, models, outputs)


def test_generate_itself() -> None:
    """The same tokens as model.generate(), which the other tests infer from one call of the model."""
    models = demo("e")
    prompts = models.prompts(3, 100)
    outputs = serve("e").generate(prompts, SamplingParams(max_tokens=10))
    assert [output.token_ids for output in outputs] == [models.generate(prompt, 10) for prompt in prompts]


@both
@pytest.mark.parametrize("how", CONFIGS_SERVED)
def test_tokens_whatever_the_batch(name: str, how: str) -> None:
    models = demo(name)
    engine = serve(name, EngineConfig(**CONFIGS_SERVED[how]))
    outputs = engine.generate(models.prompts(16, 200), SamplingParams(max_tokens=12, ignore_eos=True))
    assert_right(engine, models, outputs)


@one_is_slow
@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_under_preemption(name: str, overlap: bool) -> None:
    models = demo(name)
    config = EngineConfig(
        max_requests=8, max_batched_tokens=48, page_size=16, max_model_len=300, expected_tokens=60, overlap=overlap,
        kv_bytes=models.room_for(450),
    )  # fmt: skip
    engine = serve(name, config)
    outputs = engine.generate(models.prompts(12, 200), SamplingParams(max_tokens=40, ignore_eos=True))
    assert engine.metrics.preemptions > 0 and sum(o.metrics.preemptions for o in outputs) == engine.metrics.preemptions
    assert_right(engine, models, outputs)


@both
def test_tokens_with_reused_prefixes_and_late_arrivals(name: str) -> None:
    models = demo(name)
    engine = serve(name)
    text = next(p for p in models.prompts(4, 180) if len(p) == 180)
    outputs = []
    for length in (100, 180, 60, 100, 150):
        engine.add_request(text[:length], SamplingParams(max_tokens=12, ignore_eos=True), stream=False)
        for _ in range(3):
            outputs += [c.output for c in engine.step() if c.output]
    while engine.has_work:
        outputs += [c.output for c in engine.step() if c.output]
    assert sum(output.metrics.cached_tokens for output in outputs) >= 96 + 48 + 96 + 144
    assert_right(engine, models, outputs)


@both
def test_tokens_through_graphs(name: str) -> None:
    """The way of a GPU, with recorders of the host: packed inputs in one copy, tokens that never come to the host."""
    models = demo(name)
    engine = serve(name, EngineConfig(max_requests=6, max_batched_tokens=64, page_size=16, overlap=True, max_model_len=256))
    runner = engine.runner
    inputs = runner._padding_step(1, 1, runner.pages.tables["full_attention"].shape[1]) | runner.kv
    buckets = Buckets(decode=(1, 3, 6), tokens=(16, 64), rows=(2, 6))
    runner.graphs = GraphRunner(runner.packed.program, inputs, 6, buckets, HostRecorder(), runner.state)
    outputs = engine.generate(models.prompts(8, 150), SamplingParams(max_tokens=12, ignore_eos=True))
    assert runner.graphs.refused == {} and runner.graphs.replays > 12
    assert_right(engine, models, outputs)
    sampled = SamplingParams(max_tokens=8, temperature=0.9, seed=3, ignore_eos=True)
    with_graphs = [output.token_ids for output in engine.generate(models.prompts(4, 60), sampled)]
    assert with_graphs == [output.token_ids for output in serve(name).generate(models.prompts(4, 60), sampled)]


def test_attention_of_served_steps_is_that_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts beside decoding, in steps of all sizes, launch no kernel of attention that capturing has not, behind YOCO's
    boundary too, and use no graph that it has not compared: each would be compiled or run twice while requests wait."""
    models, seen = demo("e"), set[Hashable]()
    engine = serve("e", EngineConfig(max_requests=20, max_batched_tokens=128, page_size=16, max_model_len=2048))
    runner = engine.runner
    inputs = runner._padding_step(1, 1, runner._width) | runner.kv
    buckets = Buckets(decode=(1, 4, 12, 20), tokens=(16, 64, 128), rows=(4, 8, 20))
    runner.graphs = GraphRunner(runner.packed.program, inputs, 20, buckets, HostRecorder(), runner.state)
    shapes = {(shape[1] * shape[0], shape[2]): shape for _, shape in runner.attention_shapes()}

    def note(q: Tensor, k: Any, slots: Tensor, table: Tensor, *_: Any) -> None:
        shape = shapes[q.shape[2], q.shape[3]]
        seen.update(attention_kernels(shape, table.shape[1] * 16, q.element_size(), q.shape[1], table.shape[0]))

    monkeypatch.setattr(sys.modules["gemma4_compile.ops.attention"], "check_lengths", note)  # the op has the module's name
    for _ in runner.capture():
        pass
    at_the_start, compared = set(seen), set(runner.graphs._checked)
    for count, longest in ((2, 100), (20, 30), (40, 60)):
        prompts = [prompt[:longest] for prompt in models.prompts(count, 100)]
        params = [SamplingParams(max_tokens=(3, 12)[i % 2], ignore_eos=True) for i in range(count)]
        engine.generate(prompts, params)
    assert runner.graphs.refused == {} and seen == at_the_start
    assert len(compared) == 4 + 9 and runner.graphs._checked == compared, "a graph was compared while requests waited"


@pytest.mark.slow
@both
def test_soak(name: str) -> None:
    """The short form of the 2,000 requests of tests/gpu/test_engine.py."""
    line = soak(demo(name), requests=60, seed=5, tokens=100, longest=60)
    print(line)
    assert " 0 preemptions" not in line and " 0 of" not in line, "what it is for"


# Faults


def bad_requests(engine: Engine) -> list[tuple[Any, SamplingParams, str]]:
    longest = engine.max_model_len
    return [
        ([], SamplingParams(), "a prompt must have at least one token, got none"),
        ([5] * longest, SamplingParams(), f"max_model_len={longest}, got {longest} tokens; shorten it"),
        ([5, 2048], SamplingParams(), "token ids must be 0 to 2047, got 2048"),
        ([-1], SamplingParams(), "token ids must be 0 to 2047, got -1"),
        (["text", 5], SamplingParams(), "must be text, token ids or messages"),
        ([{"role": "user", "content": "hello"}], SamplingParams(), "messages need a chat template"),
        ([5], SamplingParams(stop_token_ids=[9999]), "tokens in params must be 0 to 2047, got 9999"),
        ([5], SamplingParams(n=9, temperature=1.0), "n must be at most max_requests=8, got 9"),
    ]  # fmt: skip


def test_bad_requests_end_alone() -> None:
    models, engine = demo("e"), serve("e")
    good = models.prompts(4, 60)
    for prompt, params, message in bad_requests(engine):
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            engine.add_request(prompt, params)
    assert not engine.has_work
    prompts: list[Any] = [good[0], [], good[1], [5, 99999], good[2]]
    with pytest.warns(UserWarning, match="prompt 1 is not served"):
        outputs = engine.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    assert [output.finish_reason for output in outputs] == ["length", "error", "length", "error", "length"]
    assert "got 99999" in outputs[3].error
    assert_right(engine, models, [outputs[0], outputs[2], outputs[4]])


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_aborts_at_any_moment(overlap: bool) -> None:
    models = demo("e")
    engine = serve("e", EngineConfig(max_requests=4, max_batched_tokens=40, page_size=16, overlap=overlap))
    prompts = models.prompts(8, 120)
    for moment in range(0, 30, 2):
        ids = [engine.add_request(p, SamplingParams(max_tokens=12, ignore_eos=True), stream=False) for p in prompts]
        outputs = []
        for step in range(200):
            if step == moment:
                found = engine.abort(ids[moment % 8])
                assert found is None or found.finish_reason == "abort"
            outputs += [c.output for c in engine.step() if c.output]
            if not engine.has_work:
                break
        assert len(outputs) >= 7
        assert_right(engine, models, [o for o in outputs if len(o.token_ids) == 12])
    assert engine.abort("nobody") is None


def test_a_callback_that_raises_ends_its_request_alone() -> None:
    models, engine = demo("e"), serve("e")
    prompts = models.prompts(4, 60)
    seen: list[Chunk] = []

    def fail_at_the_third(chunk: Chunk) -> None:
        seen.append(chunk)
        if len(seen) == 3:
            raise KeyError("mine")

    params = SamplingParams(max_tokens=8, ignore_eos=True)
    bad = engine.add_request(prompts[0], params, on_chunk=fail_at_the_third)
    for prompt in prompts[1:]:
        engine.add_request(prompt, params)
    outputs: dict[str, Any] = {}
    with pytest.warns(UserWarning, match="its on_chunk raised KeyError: 'mine'"):
        while engine.has_work:
            outputs |= {c.request_id: c.output for c in engine.step() if c.output}
    failed = outputs.pop(bad)
    assert failed is not None and failed.finish_reason == "error" and "KeyError" in failed.error and len(seen) == 3
    assert_right(engine, models, [o for o in outputs.values() if o])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_fails_ends_its_requests_alone(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    models = demo("e")
    engine = serve("e", EngineConfig(max_requests=3, max_batched_tokens=64, page_size=16, overlap=overlap))
    launch, calls = engine.runner.launch, 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return launch(*arguments)

    monkeypatch.setattr(engine.runner, "launch", failing)
    outputs = engine.generate(models.prompts(8, 60), SamplingParams(max_tokens=8, ignore_eos=True))
    ends = [output.finish_reason for output in outputs]
    assert 1 <= ends.count("error") <= 3 and ends.count("length") == 8 - ends.count("error")
    assert all("a step failed: OutOfMemoryError" in output.error for output in outputs if output.error)
    assert_right(engine, models, [output for output in outputs if not output.error])


def test_a_stream_whose_step_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve("e")
    stream = engine.stream([5, 6, 7])
    assert next(stream).finish_reason is None
    monkeypatch.setattr(engine.runner, "launch", lambda *_: 1 / 0)
    [last] = list(stream)
    assert last.finish_reason == "error" and last.output is not None and "ZeroDivisionError" in last.output.error


def test_a_stream_that_nobody_reads_is_aborted() -> None:
    engine = serve("e")
    stream = engine.stream([5, 6, 7])
    assert engine.has_work
    stream.close()
    assert not engine.has_work and list(stream) == []
    next(engine.stream([5, 6, 7]))  # and one that is forgotten
    assert not engine.outputs.requests


def test_generate_that_is_interrupted_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve("e")
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="prompt 1 is not served"):
        warnings.simplefilter("error")
        engine.generate([[5, 6], []])
    assert not engine.has_work


def test_generate_ends_if_a_callback_aborts_its_requests() -> None:
    models, engine = demo("e"), serve("e")

    def abort_all(chunk: Chunk) -> None:
        for index in range(20):
            engine.abort(f"request-{index}")

    engine.add_request([5, 6], on_chunk=abort_all)
    outputs = engine.generate([[5, 6, 7], [5, 6, 8]], SamplingParams(max_tokens=30, ignore_eos=True))
    assert [output.finish_reason for output in outputs] == ["abort", "abort"]
    assert all(models.divergence(output) is None for output in outputs if output.token_ids)


def test_ids_of_ours_do_not_meet_those_of_others() -> None:
    engine = serve("e")
    for index in range(8):
        engine.add_request([9, 9, 9], SamplingParams(max_tokens=40, ignore_eos=True), request_id=f"request-{index}")
    outputs = engine.generate([[5, 6]] * 4, SamplingParams(max_tokens=2, ignore_eos=True))
    assert [output.prompt_token_ids for output in outputs] == [[5, 6]] * 4


@pytest.mark.parametrize(("kind", "layers"), [("sliding_attention", "0"), ("full_attention", "3")])
def test_a_page_out_of_range_is_trapped(kind: str, layers: str) -> None:
    """Before a kernel reads it; names the request, the layers and the index."""
    engine = serve("e")
    engine.add_request([5] * 40, SamplingParams(max_tokens=30))
    engine.step()
    engine.runner.pages.tables[kind][:, 1] = 12345
    [chunk] = engine.step()
    assert chunk.output is not None
    message = chunk.output.error
    assert "request request-0, " in message and "page 1 must be 0 to" in message and "got 12345" in message
    assert f"layers of {kind} ({layers}" in message


# What it is given


def test_configs_that_cannot_be() -> None:
    for given, message in (
        ({"page_size": 20}, "page_size must be a multiple of 16, got 20"),
        ({"max_requests": 0}, "max_requests must be a positive integer, got 0"),
        ({"max_requests": 100, "max_batched_tokens": 50}, "max_batched_tokens must be at least max_requests"),
        ({"kv_dtype": "int4"}, "kv_dtype must be"),
        ({"memory_fraction": 1.5}, "memory_fraction must be over 0"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig(**given)  # type: ignore[arg-type]
    for config, message in (
        (EngineConfig(max_model_len=4096), "max_model_len must be at most the model's context, 2048, got 4096; lower it"),
        (EngineConfig(kv_bytes=100_000, max_model_len=2000), "must hold one request of max_model_len=2000 tokens"),
        (EngineConfig(cuda_graphs=True), "cuda_graphs=True needs a model on the GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            serve("e", config)


def test_what_the_memory_error_advises_works() -> None:
    with pytest.raises(ValueError, match="lower max_model_len to") as error:
        serve("e", EngineConfig(max_requests=2, kv_bytes=1_000_000, max_model_len=2000, max_batched_tokens=64, page_size=16))
    advised = int(str(error.value).split("lower max_model_len to ")[1].split(",")[0])
    assert 100 < advised < 2000
    serve("e", EngineConfig(max_requests=2, kv_bytes=1_000_000, max_model_len=advised, max_batched_tokens=64, page_size=16))
    chosen = serve("e", EngineConfig(max_requests=2, kv_bytes=1_000_000, max_batched_tokens=64, page_size=16))
    assert advised // 2 < chosen.max_model_len <= advised  # what nobody asked for is lowered, not refused


def test_a_multimodal_checkpoint_is_served_without_its_towers(tmp_path: Path) -> None:
    tower = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
             "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    torch.manual_seed(0)
    config = Gemma4Config(text_config=Gemma4TextConfig(**CONFIGS["e"]).to_dict(), vision_config=tower, audio_config=None)
    whole = Gemma4ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    prompt = list(range(3, 40))
    with torch.inference_mode():
        wanted = whole.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
    params = SamplingParams(max_tokens=6)
    served = Engine(tmp_path, SMALL)
    assert not any("tower" in name for name, _ in served.model.named_parameters())
    assert served.generate(prompt, params)[0].token_ids == wanted[:6]
    given = Engine(whole, SMALL)  # the model itself: on its own weights
    assert given.model.model is whole.model.language_model
    assert given.generate(prompt, params)[0].token_ids == wanted[:6]


def test_fp8_keys_and_values() -> None:
    """Half the bytes; a text that begins as the exact one does."""
    models = demo("e")
    engine = serve("e", EngineConfig(max_requests=8, max_batched_tokens=64, page_size=16, kv_dtype="fp8"))
    assert {t.dtype for t in engine.runner.kv.values()} == {torch.float8_e4m3fn}
    outputs = engine.generate(models.prompts(16, 100), SamplingParams(max_tokens=3, ignore_eos=True))
    assert sum(models.divergence(output) is None for output in outputs) >= 12


@pytest.mark.parametrize(
    ("name", "ours", "naive"), [("E2B", 18_432, 43_008), ("E4B", 57_344, 100_352), ("26B-A4B", 225_280, 225_280)]
)
def test_bytes_of_released_models(name: str, ours: int, naive: int) -> None:
    """bf16: layers that share KV have none; what slides is bounded: long requests cost little more than their full layers."""
    model = random_model_config(name)
    found = geometry(model)
    kinds = {"full_attention": 0, "sliding_attention": model.sliding_window}
    assert sum(token_bytes(found.kv_owners(kind), 2) for kind in kinds) == ours
    assert naive_token_bytes(found, 2) == naive
    sizes = divide(found, kinds, 100 * 2**30, 64, 2, expected=20_000, longest=100_000, requests=10_000, chunk=8192)
    assert sizes.requests > 3 * sizes.naive and 0.95 * 100 * 2**30 < sizes.bytes <= 100 * 2**30


def random_model_config(name: str) -> Any:
    from gemma4_compile.hf.checkpoints import TEXT_CONFIGS

    return Gemma4TextConfig(**TEXT_CONFIGS[name])


def test_the_split_follows_the_expected_lengths() -> None:
    """Short requests need sliding pages as much as full ones; long ones few of them."""
    found = geometry(random_model_config("26B-A4B"))
    kinds = {"full_attention": 0, "sliding_attention": 1024}
    shares = []
    for expected in (500, 4_000, 50_000):
        pages = divide(found, kinds, 60 * 2**30, 64, 2, expected, 60_000, 10_000, 2048).pages
        shares.append(pages["sliding_attention"] / pages["full_attention"])
    assert shares[0] > 0.9 and shares[0] > shares[1] > shares[2] and shares[2] < 0.1


def test_an_optimized_model_stays_as_it_was() -> None:
    """Its own config, and its own calls beside the engine."""
    config = OptimizeConfig(max_graphs=7)
    model = passes_only(tiny("e").requires_grad_(False), config)
    engine = Engine(model, SMALL)
    assert engine.model is model and state_of(model).backend.config == config and report(model).packed_steps == 1
    ids = torch.tensor([list(range(3, 12))])
    with torch.inference_mode():
        wanted = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 9:].tolist()
    assert engine.generate(ids[0].tolist(), SamplingParams(max_tokens=4))[0].token_ids == wanted


@pytest.mark.slow
def test_the_example_of_the_readme() -> None:
    """From a folder, in a process of its own: stream, generate, metrics, memory."""
    code = """
import gemma4_compile, json
engine = gemma4_compile.Engine(gemma4_compile.demo_checkpoint("e") / "target", gemma4_compile.EngineConfig(dtype="float32"))
text = "".join(chunk.text for chunk in engine.stream("def area(width, height):"))
[output] = engine.generate("def area(width, height):")
assert output.text == text and output.metrics.cached_tokens == 0 and "full pool" in str(engine.memory)
print(json.dumps([text, engine.metrics.requests]))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    text, requests = json.loads(done.stdout.strip().splitlines()[-1])
    assert text and requests == 2


@pytest.mark.parametrize(
    ("fitting", "remedy"), [(40, "lower max_batched_tokens to 16"), (8, "free memory or take a larger GPU")]
)
def test_a_step_too_large_for_the_gpu_says_what_to_lower(monkeypatch: pytest.MonkeyPatch, fitting: int, remedy: str) -> None:
    runner = serve("e").runner
    for name in ("empty_cache", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)

    def packed(inputs: dict[str, torch.Tensor]) -> None:
        if inputs["positions"].shape[0] > fitting:
            raise torch.cuda.OutOfMemoryError("out of memory")

    packed.geometry, packed.model = runner.packed.geometry, runner.packed.model  # type: ignore[attr-defined]
    sizing = replace(runner.sizing, packed=packed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"got out of memory; {remedy}"):
        sizing.measure_step(graphs=True)


def test_a_step_that_does_not_compile_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where there is no C++ compiler; calls of the model run plain there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny("dense").requires_grad_(False)
    config = EngineConfig(max_model_len=64, kv_bytes=4 << 20, optimize=OptimizeConfig(cache_dir=str(tmp_path)))
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(ValueError, match="must compile, got no C\\+\\+ compiler, .* install g\\+\\+"):
            Engine(model, config)
        with pytest.warns(UserWarning, match="uncompiled: .*no C\\+\\+ compiler"), torch.no_grad():
            model(torch.tensor([[5, 6, 7]]))
