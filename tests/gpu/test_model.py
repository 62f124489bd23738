"""The demo checkpoints on the GPU, optimized against plain Hugging Face: texts, logits, matched sites, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma4_compile import OptimizeConfig, optimize, report, restore
from gemma4_compile.demo import DEMO_NAMES, demo_checkpoint, held_out_prompts
from gemma4_compile.hf.loading import load
from gemma4_compile.passes import FUSIONS
from tests.accuracy_of_model import Exact, divergences, errors_exceed, greedy, logit_error, plain_logits

# With `all`, the fusions that are off by default are tested too: off means no faster, not less right.
CONFIGS = {"default": OptimizeConfig(), "all": OptimizeConfig(enable=tuple(FUSIONS))}
pytestmark = pytest.mark.parametrize("name", DEMO_NAMES)
each_config = pytest.mark.parametrize("config", CONFIGS)


def demo(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A demo checkpoint on the GPU and its tokenizer, with experts that can be traced; grouped_mm is for bf16."""
    model, tokenizer = load(demo_checkpoint(name) / "target", "cuda", dtype)
    if name == "moe":
        model.set_experts_implementation("grouped_mm" if dtype == torch.bfloat16 else "batched_mm")
    return model, tokenizer


def assert_all_matched(model: Any, graphs: int) -> None:
    """Every expected site of every enabled fusion in every graph, in so many graphs, and nothing ran uncompiled."""
    found = report(model)
    print(found)
    for fusion in found.fusions.values():
        if fusion.enabled:
            assert fusion.matched == fusion.expected, f"{fusion.name}: {fusion.unmatched}"
    assert set(found.calls) == {"packed steps"}, found.reasons
    assert found.graphs_compiled + found.loaded == graphs


@pytest.fixture(autouse=True)
def true_fp32():
    """fp32 matrix products in fp32, not in tf32, which is a coarser type than what is compared here. The fp64 model gets
    one CPU thread: the workers of pytest-xdist would fight for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(before)
    torch.set_num_threads(threads)


@each_config
def test_bf16_text_parts_from_eager_at_ties_only(name: str, config: str):
    """bf16 texts may part where eager cannot tell two tokens apart: where the tokens' fp64 logits differ by at most
    twice the largest error of eager's own logits at that position, as each of the two may be off by that much."""
    model, tokenizer = demo(name, torch.bfloat16)
    prompts = held_out_prompts(tokenizer, 20, 24, 160)
    expected = greedy(model, prompts, 64)
    optimize(model, CONFIGS[config])
    actual = greedy(model, prompts, 64)
    assert_all_matched(model, graphs=1)  # one packed step for prompts and decode
    restore(model)
    found = divergences(prompts, expected, actual, model, Exact(model))
    print(f"\n{name} {config}: {len(found)} of {len(prompts)} texts of up to 64 tokens part", *found, sep="\n  ")
    assert [str(one) for one in found if not one.is_tie] == []


def test_fp32_text_is_eagers(name: str):
    model, tokenizer = demo(name, torch.float32)
    prompts = held_out_prompts(tokenizer, 20, 24, 160)
    expected = greedy(model, prompts, 64)
    optimize(model)
    actual = greedy(model, prompts, 64)
    assert_all_matched(model, graphs=1)
    assert [text.tokens for text in actual] == [text.tokens for text in expected]


@each_config
def test_bf16_logits_are_as_near_to_fp64_as_eagers(name: str, config: str):
    model, tokenizer = demo(name, torch.bfloat16)
    prompts = held_out_prompts(tokenizer, 128, 24, 160)  # many: a few positions decide the rms of a model with experts
    exact_model = Exact(model)
    exact = [exact_model.logits(torch.tensor([prompt]))[0] for prompt in prompts]
    plain = plain_logits(model, prompts)
    eager = logit_error(plain, exact)
    optimize(model, CONFIGS[config])
    compiled = plain_logits(model, prompts)
    optimized = logit_error(compiled, exact)
    print(f"\n{name} {config}: error against fp64, eager {eager}\n{name} {config}:                 optimized {optimized}")
    assert_all_matched(model, graphs=1)
    assert optimized.typical <= 1.1 * eager.typical
    assert optimized.rms <= 1.1 * eager.rms or not errors_exceed(compiled, plain, exact)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_padded_batch_after_a_single_prompt(name: str, cache: str):
    """One prompt, then four of different lengths, padded on the left: equal fp32 tokens, all sites, one graph."""
    model, tokenizer = demo(name, torch.float32)
    prompts = held_out_prompts(tokenizer, 4, 24, 100)
    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to("cuda")
    assert not batch["attention_mask"].all()
    one = {"input_ids": torch.tensor(prompts[:1], device="cuda")}
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    expected = [model.generate(**inputs, **options) for inputs in (one, batch)]
    optimize(model)
    actual = [model.generate(**inputs, **options) for inputs in (one, batch)]
    for mine, other in zip(actual, expected, strict=True):
        assert mine.tolist() == other.tolist()
    assert_all_matched(model, graphs=1)  # one packed step for all of them
