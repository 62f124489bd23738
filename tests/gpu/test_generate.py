"""model.generate() of the demo checkpoints on the GPU, from CUDA graphs, against plain Hugging Face."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from gemma4_compile import optimize, report, restore
from gemma4_compile.demo import DEMO_NAMES, demo_checkpoint, held_out_prompts
from gemma4_compile.hf.loading import load
from gemma4_compile.hf.step_cache import CACHE
from gemma4_compile.optimized import state_of

pytestmark = pytest.mark.parametrize("name", DEMO_NAMES)


@pytest.fixture(autouse=True)
def true_fp32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def demo(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model, tokenizer = load(demo_checkpoint(name) / "target", "cuda", dtype)
    if name == "moe":
        model.set_experts_implementation("grouped_mm" if dtype == torch.bfloat16 else "batched_mm")
    tokenizer.padding_side = "left"
    return model, tokenizer


def batch_of(tokenizer: Any, count: int, longest: int, seed: int = 0) -> dict[str, Any]:
    prompts = held_out_prompts(tokenizer, count, 24, longest, seed)
    return dict(tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to("cuda"))


def chat(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    kept, ids = DynamicCache(config=model.config), batch["input_ids"][:1, -24:]
    for _ in range(5):
        ids = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, **{CACHE: kept})
        ids = torch.cat([ids, batch["input_ids"][1:2, -9:]], 1)
    return ids


STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
LOOKUP: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
CASES: dict[str, Any] = {
    "greedy": lambda m, b: m.generate(**b, max_new_tokens=60, do_sample=False),
    "beams": lambda m, b: m.generate(**b, max_new_tokens=20, num_beams=3, do_sample=False),
    "static": lambda m, b: m.generate(**b, **STATIC, max_new_tokens=40, do_sample=False),
    "one by one": lambda m, b: torch.cat(
        [m.generate(b["input_ids"][i : i + 1, -24:], max_new_tokens=30, min_new_tokens=30, do_sample=False) for i in range(4)]
    ),
    "prompt lookup": lambda m, b: m.generate(b["input_ids"][:1, -24:], **LOOKUP, max_new_tokens=40, do_sample=False),
    "chat": chat,
}  # fmt: skip


def test_fp32_tokens_are_equal(name: str) -> None:
    """Each case four times: by then its prompts are replayed too."""
    model, tokenizer = demo(name)
    batch = batch_of(tokenizer, 4, 150)
    with torch.inference_mode():
        expected = {case: call(model, batch) for case, call in CASES.items()}
        optimize(model)
        for _ in range(4):
            for case, call in CASES.items():
                assert call(model, batch).tolist() == expected[case].tolist(), case
    assert set(report(model).calls) == {"packed steps"}, report(model)
    route: Any = state_of(model)._route
    calls = route._calls
    assert calls.graphs.replays > 500 and not calls.graphs.refused
    assert calls.prompts.replays > 4 and not calls.prompts.refused


def test_bf16_tokens_part_at_ties(name: str) -> None:
    """Where bf16 outputs diverge, plain logits of the two tokens are at most half a point apart; printed."""
    model, tokenizer = demo(name, torch.bfloat16)
    batch = batch_of(tokenizer, 16, 150)
    with torch.inference_mode():
        expected = model.generate(**batch, max_new_tokens=60, min_new_tokens=60, do_sample=False)
        optimize(model)
        actual = model.generate(**batch, max_new_tokens=60, min_new_tokens=60, do_sample=False)
        restore(model)
        start, margins = batch["input_ids"].shape[1], []
        for row in (actual != expected).any(1).nonzero().flatten().tolist():
            at = int((actual[row] != expected[row]).nonzero()[0])
            real = batch["attention_mask"][row].bool()
            ids = torch.cat([batch["input_ids"][row][real], expected[row, start:at]])
            logits = model(ids[None], use_cache=False).logits[0, -1].float()
            margins.append(float((logits[expected[row, at]] - logits[actual[row, at]]).abs()))
    print(f"\n{name}: {len(margins)} of 16 part, margins {[round(m, 3) for m in sorted(margins)]}")
    assert max(margins, default=0) <= 0.5


def test_a_decode_step_does_not_wait(name: str) -> None:
    """But for what generate() asks itself: a loop over model(...) makes no synchronization at all."""
    model, tokenizer = demo(name)
    optimize(model)
    batch = batch_of(tokenizer, 4, 60)
    with torch.inference_mode():
        for _ in range(2):  # the second runs on what the first has captured
            output = model(**batch, logits_to_keep=1)
            mask, cache = batch["attention_mask"], output[CACHE]
            torch.cuda.set_sync_debug_mode("default")
            for step in range(12):
                mask = torch.cat([mask, mask.new_ones((4, 1))], 1)
                places = mask.sum(1, keepdim=True) - 1
                tokens = output.logits[:, -1].argmax(-1, keepdim=True)
                if step == 3:  # captured by now
                    torch.cuda.set_sync_debug_mode("error")
                output = model(tokens, attention_mask=mask, position_ids=places, **{CACHE: cache})
            torch.cuda.set_sync_debug_mode("default")
