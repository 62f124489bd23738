"""What an Engine of several GPUs is tested with: a line `case: ok` or `case: what went wrong` from rank 0.

    torchrun --nproc-per-node 2 -m tests.gpu.engine_worker [beginnings of cases]

Started by test_parallel_engine.py, or by hand. A case `killed` or `stuck` ends the run, and is run alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.gpu.all_reduce_worker import run  # first: it keeps NVLink multicast off

import torch  # isort: skip
import torch.distributed as dist  # isort: skip

from gemma4_compile import Engine, EngineConfig, SamplingParams, SpeculativeConfig, demo_checkpoint
from gemma4_compile.demo import held_out_prompts
from gemma4_compile.hf.loading import load

PROMPTS, TOKENS = 16, 48
SETTINGS: dict[str, Any] = {"max_model_len": 512, "max_requests": PROMPTS, "max_batched_tokens": 256, "expected_tokens": 128}
GREEDY = SamplingParams(max_tokens=TOKENS, logprobs=2)
# Between the log probabilities of the two likeliest tokens, where bf16 may part: those of one GPU in bf16 differ from fp32's by
# as much.
TIE = 0.7


def tokens_of_one_gpu(kind: str, dtype: torch.dtype, mtp: bool, params: SamplingParams) -> None:
    """The tokens of an engine of two GPUs are those of one; where they part in bf16, it is at a tie."""
    folder = demo_checkpoint(kind)
    config = EngineConfig(**SETTINGS, dtype=dtype, memory_fraction=0.3)
    speculative = SpeculativeConfig(folder / "assistant", verification="match") if mtp else None
    with Engine(folder / "target", config, speculative=speculative) as engine:
        prompts = held_out_prompts(engine.tokenizer, count=PROMPTS, min_tokens=16, max_tokens=120)
        found = engine.generate(prompts, params)
    if engine.runner.graphs is not None:
        assert not engine.runner.graphs.refused, engine.runner.graphs.refused
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [output.token_ids for output in found])
    assert all(other == everywhere[0] for other in everywhere), "generate() gives other tokens on another rank"
    if dist.get_rank():
        return
    if mtp:
        metrics = engine.metrics
        print(f"{metrics.accepted_draft_tokens} of {metrics.draft_tokens} drafts accepted", flush=True)
        assert metrics.accepted_draft_tokens > 0
    model, _ = load(folder / "target", "cuda", dtype)
    if kind == "moe" and dtype == torch.float32:
        model.set_experts_implementation("batched_mm")  # grouped_mm on a GPU is for bf16
    alone = Engine(model, config)
    parted = []
    for ours, wanted in zip(found, alone.generate(prompts, params), strict=True):
        assert not ours.error and not wanted.error, ours.error or wanted.error
        place = next((i for i, (a, b) in enumerate(zip(ours.token_ids, wanted.token_ids, strict=False)) if a != b), None)
        if place is not None:
            assert wanted.logprobs is not None
            likeliest = sorted(wanted.logprobs[place].top.values())
            parted.append(likeliest[-1] - likeliest[-2])
    print(f"{len(parted)} of {PROMPTS} part, at margins of {', '.join(f'{m:.4f}' for m in sorted(parted)) or '-'}", flush=True)
    assert not parted or (dtype == torch.bfloat16 and max(parted) < TIE), parted


def ended(how: str) -> None:
    """Rank 1 is killed or stopped amid a long answer; the others must say so and end."""
    folder = demo_checkpoint("e")
    engine = Engine(
        folder / "target", EngineConfig(**SETTINGS, step_timeout=10.0), speculative=SpeculativeConfig(folder / "assistant")
    )
    prompts = held_out_prompts(engine.tokenizer, count=4, min_tokens=16, max_tokens=120)
    engine.generate(prompts, SamplingParams(max_tokens=8))
    if dist.get_rank() == 1:

        def trouble() -> None:
            time.sleep(0.5)
            print(f"at {time.time():.2f}: {how}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

        threading.Thread(target=trouble, daemon=True).start()
    while True:
        engine.generate(prompts, SamplingParams(max_tokens=300, ignore_eos=True))


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    sampled = SamplingParams(max_tokens=TOKENS, temperature=0.8, top_k=20, top_p=0.9, seed=5, logprobs=2)
    for kind in ("e", "moe"):
        for dtype in (torch.float32, torch.bfloat16):
            for mtp in (False, True):
                name = f"{kind} {str(dtype)[6:]}{' mtp' if mtp else ''}"
                found[name] = partial(tokens_of_one_gpu, kind, dtype, mtp, GREEDY)
        found[f"sampled {kind}"] = partial(tokens_of_one_gpu, kind, torch.float32, True, sampled)
    return found


if __name__ == "__main__":
    if sys.argv[1:] in (["killed"], ["stuck"]):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
        ended(sys.argv[1])
    run(cases(), sys.argv[1:])
