"""Decode on a static cache is replayed as a CUDA graph: the same tokens, and results that outlive the next replay."""

from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

from gemma4_compile import OptimizeConfig, demo_checkpoint, optimize
from gemma4_compile.demo import held_out_prompts
from gemma4_compile.hf.loading import load
from gemma4_compile.hf.step_cache import CACHE

FOLDER = demo_checkpoint("e") / "target"


def test_same_tokens_with_and_without() -> None:
    graphed, tokenizer = load(FOLDER, "cuda", torch.float32)
    plain = load(FOLDER, "cuda", torch.float32)[0]
    optimize(graphed, OptimizeConfig(packed=False))
    optimize(plain, OptimizeConfig(packed=False, cuda_graphs=False))
    counters.clear()
    for prompt in held_out_prompts(tokenizer, count=4, min_tokens=16, max_tokens=160):
        ids = torch.tensor([prompt], device="cuda")
        options = {"max_new_tokens": 48, "do_sample": False, "cache_implementation": "static"}
        assert torch.equal(graphed.generate(ids, **options), plain.generate(ids, **options))
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_logits_outlive_the_next_step() -> None:
    model: Any = optimize(load(FOLDER, "cuda")[0], OptimizeConfig(packed=False))
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.inference_mode():
        model(torch.tensor([[2, 50, 60, 70]], device="cuda"), **{CACHE: cache})
        steps = [model(torch.tensor([[token]], device="cuda"), **{CACHE: cache}).logits for token in (80, 90, 100, 110)]
        kept = [logits.clone() for logits in steps]
        model(torch.tensor([[120]], device="cuda"), **{CACHE: cache})
    for logits, copy in zip(steps, kept, strict=True):
        assert torch.equal(logits, copy)
    assert not torch.equal(steps[0], steps[3])
