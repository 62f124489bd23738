"""Engines on the GPU: Hugging Face's greedy tokens however requests are batched, sampling, and the soak."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import triton

from gemma4_compile import Engine, EngineConfig, OptimizeConfig, SamplingParams
from gemma4_compile import report as passes_of
from gemma4_compile.demo import DEMO_NAMES, demo_checkpoint
from gemma4_compile.hf.loading import load
from gemma4_compile.runtime.outputs import RequestOutput
from tests.accuracy_of_model import Divergence, Exact, parted, plain_logits
from tests.runtime.demo_models import Demo, demo
from tests.runtime.soak import soak

TOKENS = 24
SERVED = {
    "default": EngineConfig(max_requests=64, memory_fraction=0.3, capture_at_start=False),
    "small chunks and pages": EngineConfig(max_requests=16, max_batched_tokens=96, page_size=16, memory_fraction=0.3,
                                           capture_at_start=False),
    "one request at a time": EngineConfig(max_requests=1, memory_fraction=0.3, capture_at_start=False),
    "no graphs, no overlap": EngineConfig(max_requests=64, cuda_graphs=False, overlap=False, memory_fraction=0.3),
    "preemption": EngineConfig(max_requests=32, max_batched_tokens=256, page_size=16, max_model_len=960, expected_tokens=200,
                               capture_at_start=False),
}  # fmt: skip
both = pytest.mark.parametrize("name", DEMO_NAMES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def engine(models: Demo, config: EngineConfig) -> Engine:
    return Engine(models.served, config, models.tokenizer)


def report(models: Demo, outputs: list[RequestOutput], title: str) -> list[Divergence]:
    """Where outputs diverge from Hugging Face's greedy ones, and what fp64 says of it."""
    found: list[Divergence] = []
    exact: Exact | None = None
    for number, output in enumerate(outputs):
        if (place := models.divergence(output)) is None:
            continue
        at, margin = place
        context = output.prompt_token_ids + output.token_ids[:at]
        choices = int(plain_logits(models.plain, [context])[0][-1].argmax()), output.token_ids[at]
        exact = exact or Exact(models.plain)
        found.append(parted(number, at, context, choices, margin, models.plain, exact))
    print(f"\n{title}: {len(found)} of {len(outputs)} part")
    print(*found, sep="\n")
    return found


@both
@dtypes
@pytest.mark.parametrize("how", SERVED)
def test_tokens_are_hugging_faces(name: str, dtype: torch.dtype, how: str) -> None:
    """fp32: all. bf16: where outputs diverge, Hugging Face itself cannot tell the two tokens apart: in fp64 they differ by at
    most twice the largest error of its own logits there."""
    torch.set_float32_matmul_precision("highest")
    models = demo(name, "cuda", dtype)
    scarce = how == "preemption"
    served = engine(models, replace(SERVED[how], kv_bytes=models.room_for(2500)) if scarce else SERVED[how])
    params = SamplingParams(max_tokens=2 * TOKENS if scarce else TOKENS, ignore_eos=True)
    outputs = served.generate(models.prompts(64, 900), params)
    found = report(models, outputs, f"{name} {dtype} {how}, {served.metrics.preemptions} preemptions")
    assert (served.metrics.preemptions > 0) == scarce
    assert all(d.margin <= 1e-3 if dtype == torch.float32 else d.is_tie for d in found)
    assert served.runner.graphs is None or served.runner.graphs.refused == {}
    for pool in served.runner.pages.pools.values():
        assert pool.free == pool.pages


def test_nothing_is_compiled_while_requests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of all lengths beside decoding, few and many: the start has compiled every kernel, and compared every graph."""
    models = demo("e", "cuda", torch.bfloat16)
    served = engine(models, EngineConfig(max_requests=48, max_batched_tokens=512, memory_fraction=0.3))
    graphs = served.runner.graphs
    assert graphs is not None
    checked, compiled = set(graphs._checked), list[str]()
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["fn"].name))
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (4, 40)]
    for count in (2, 9, 30, 96):
        for longest in (30, 900):
            prompts = models.prompts(count, longest)
            served.generate(prompts, [params[i % 2] for i in range(count)])
    assert compiled == [] and graphs._checked == checked and graphs.refused == {}


@dtypes
def test_norms_inside_products(dtype: torch.dtype) -> None:
    """One and two requests at a time decode by the kernels that norm their input themselves."""
    torch.set_float32_matmul_precision("highest")
    name, normed = "e", ("norm_gate_up", "norm_ple", "norm_linear")
    models = demo(name, "cuda", dtype)
    models = replace(models, served=load(demo_checkpoint(name) / "target", "cuda", dtype)[0])  # compiled with these fusions
    for requests in (1, 2):
        served = engine(models, replace(SERVED["default"], max_requests=requests, optimize=OptimizeConfig(enable=normed)))
        outputs = served.generate(models.prompts(8, 900), SamplingParams(max_tokens=TOKENS, ignore_eos=True))
        found = report(models, outputs, f"{name} {dtype} {normed}, {requests} at a time")
        assert all(d.margin <= 1e-3 if dtype == torch.float32 else d.is_tie for d in found)
    fusions = passes_of(models.served).fusions
    assert all(fusions[fusion].matched == fusions[fusion].expected > 0 for fusion in normed)


@both
def test_generate_itself(name: str) -> None:
    """The same tokens as model.generate(), which the test above infers from one call. On the CPU: with torch 2.11 on a GPU,
    Hugging Face's own fp32 model chooses another token behind the prompt of 257 tokens than it does on the CPU."""
    torch.set_float32_matmul_precision("highest")
    models = demo(name, "cuda", torch.float32)
    prompts = models.prompts(8, 900)
    outputs = engine(models, SERVED["default"]).generate(prompts, SamplingParams(max_tokens=TOKENS))
    assert [output.token_ids for output in outputs] == [demo(name).generate(prompt, TOKENS) for prompt in prompts]


def test_fp8_keys_and_values_write_the_same_text_for_a_while() -> None:
    models = demo("e", "cuda", torch.bfloat16)
    config = EngineConfig(max_requests=64, kv_dtype="fp8", memory_fraction=0.3, capture_at_start=False)
    served = engine(models, config)
    assert served.runner.kv["keys.0"].dtype == torch.float8_e4m3fn
    parted = report(models, served.generate(models.prompts(64, 900), SamplingParams(max_tokens=8)), "fp8")
    assert len(parted) < 32


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    torch.set_float32_matmul_precision("highest")
    models = demo("e", "cuda", torch.float32)
    served = engine(models, SERVED["default"])
    prompts = models.prompts(16, 200)
    mine = SamplingParams(max_tokens=24, temperature=0.8, top_k=50, top_p=0.9, seed=7)
    alone = served.generate(prompts[5], mine)[0].token_ids
    others = [SamplingParams(max_tokens=24, temperature=1.0, seed=i) for i in range(16)]
    others[5] = mine
    assert served.generate(prompts, others)[5].token_ids == alone


@both
def test_soak(name: str) -> None:
    torch.set_float32_matmul_precision("highest")
    print(soak(demo(name, "cuda", torch.float32), requests=2000, seed=random.Random(name).randrange(1000)))
