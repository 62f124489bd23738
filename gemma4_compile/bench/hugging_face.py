"""Plain Hugging Face as a peer, and as the judge of greedy tokens."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from .timings import Timing
from .workloads import Arrivals


class _Clock(StoppingCriteria):
    """Notes when each token is there; ends nothing."""

    def __init__(self, start: float, device: torch.device):
        self.times: list[float] = []
        self._start, self._device = start, device

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self._start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run(model: Any, prompts: Sequence[list[int]], wanted: int, arrivals: Arrivals, compiled: bool) -> list[Timing]:
    """`generate` over batches of as many prompts as run at a time, one batch behind the other. Arrivals at a rate are no batch.

    compiled  on a static cache, which transformers compiles

    Raises ValueError for a rate, or for compiled on a CPU, where transformers compiles nothing."""
    if arrivals.rate is not None:
        raise ValueError("generate() takes whole batches, got arrivals at a rate; use --concurrency")
    if compiled and model.device.type != "cuda":
        raise ValueError(f"transformers compiles generate() on a GPU alone, got {model.device}; use hf-eager")
    at_a_time = arrivals.concurrency or len(prompts)
    more = {"cache_implementation": "static"} if compiled else {}
    timings: list[Timing] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), at_a_time):
        ids = torch.tensor(prompts[first : first + at_a_time], device=model.device)
        begun = 0.0 if arrivals.concurrency is None else time.perf_counter() - start
        clock = _Clock(start, model.device)
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False,
                stopping_criteria=[clock], **more,
            )  # fmt: skip
        for new in output[:, ids.shape[1] :].tolist():
            timings.append(Timing(begun, [(when, 1) for when in clock.times], tokens=new))
    return timings


def agreement(model: Any, prompts: Sequence[list[int]], timings: Sequence[Timing]) -> float:
    """Share of new tokens that are the plain model's greedy choice behind what stands before them: one call for each text, as
    attention is causal.

    model  plain"""
    right = total = 0
    for prompt, timing in zip(prompts, timings, strict=True):
        if not timing.tokens:
            continue
        ids = torch.tensor([prompt + timing.tokens], device=model.device)
        with torch.inference_mode():
            logits = model(ids, use_cache=False, logits_to_keep=len(timing.tokens) + 1).logits[0, :-1]
        right += int((logits.argmax(-1) == ids[0, len(prompt) :]).sum())
        total += len(timing.tokens)
    return right / total if total else 0.0
