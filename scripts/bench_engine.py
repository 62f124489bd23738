"""Serve random prompts with an Engine, all submitted at once: total time, TTFT and TPOT, beside vLLM's times.

    python scripts/bench_engine.py --models E2B [--workloads 1024/1024x80,128/256x1] [--out FILE]
    python scripts/bench_engine.py --mtp 2.8                      # with the assistant, so many tokens a round
    torchrun --nproc-per-node 2 scripts/bench_engine.py --models 31B --workloads 128/256x1   # divided between two GPUs
    python scripts/bench_engine.py --quick --device cpu          # few layers, short: does it run?

A workload is IN/OUTxREQUESTS in tokens. Models have their real size, random weights (norms 1, matrices N(0, 0.02)) and random
prompts; every request runs to OUT tokens, greedy. The first run of a workload warms up and is not counted (128 tokens of
output at most); the median of --repeats others is. vLLM's times are those of version 0.26 on
the same kind of GPU, measured earlier: the ratio is between two days, not within one run. The floor of TPOT at one request is
the bytes of weights over the copy bandwidth of this run. With --mtp the drafts are verified as ever, but how many count as
right is drawn, so that rounds give --mtp tokens on average: with random weights none would be right.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile import Engine, EngineConfig, SamplingParams, SpeculativeConfig
from gemma4_compile.bench.acceptance import forced
from gemma4_compile.bench.rates import copy_bandwidth
from gemma4_compile.bench.workloads import Workload, workload
from gemma4_compile.hf.loading import random_assistant, random_model
from gemma4_compile.torchrun import launched_ranks
from scripts._divided import divided_assistant, divided_model

WARM_UP = 128  # tokens: by then every graph that the workload uses is captured, also with --lazy
# (total seconds, median TTFT ms, median TPOT ms) of vLLM 0.26 on an H200; with fast prefill where that was measured.
VLLM: dict[str, dict[str, tuple[float | None, float | None, float]]] = {
    "E2B": {
        "1024/1024x80": (5.32, 350, 4.84), "8000/1000x80": (10.3, 1222, 8.93), "3000/100x30": (0.72, 198, 5.03),
        "500/500x50": (2.18, 120, 4.11), "100/1000x30": (3.59, 63, 3.53), "7000/10x30": (0.76, 401, 27.5),
        "128/256x1": (None, None, 3.27),
    },
    "26B-A4B": {
        "1024/1024x80": (22.9, 731, 21.6), "8000/1000x80": (36.8, 6006, 30.3), "3000/100x30": (2.99, 800, 21.6),
        "500/500x50": (9.07, 312, 17.5), "100/1000x30": (14.3, 85, 14.3), "128/256x1": (None, None, 4.21),
    },
    "E4B": {"1024/1024x80": (9.32, None, 0), "7000/10x30": (3.41, None, 0), "128/256x1": (None, None, 4.77)},
    "31B": {"1024/1024x32": (31.2, None, 28.1), "128/256x1": (None, None, 18.0)},
}  # fmt: skip


# The same with its MTP, 3 drafts, 2.8 tokens a step forced.
VLLM_MTP: dict[str, dict[str, tuple[float | None, float | None, float]]] = {
    "E2B": {"1024/1024x80": (3.69, 464, 3.10), "8000/1000x80": (10.6, 3165, 7.20), "128/256x1": (None, None, 1.43)},
}


def serve(engine: Engine, load: Workload, seed: int) -> dict[str, float]:
    """One run: all requests at once, to their ends."""
    chooser = random.Random(seed)
    vocabulary = engine.runner.vocabulary.size
    prompts = [[chooser.randrange(3, vocabulary) for _ in range(load.given)] for _ in range(load.requests)]
    params = SamplingParams(max_tokens=load.wanted, ignore_eos=True)
    hosts, steps = [], engine.metrics.steps
    start = time.perf_counter()
    for prompt in prompts:
        engine.add_request(prompt, params, stream=False)
    outputs = []
    while engine.has_work:
        before = engine.metrics.host_seconds
        outputs += [chunk.output for chunk in engine.step() if chunk.output is not None]
        hosts.append(engine.metrics.host_seconds - before)
    total = time.perf_counter() - start
    assert len(outputs) == load.requests and all(len(o.token_ids) == load.wanted for o in outputs)
    steps = engine.metrics.steps - steps
    return {
        "seconds": total,
        "ttft_ms": 1e3 * statistics.median(o.metrics.ttft or 0 for o in outputs),
        "tpot_ms": 1e3 * statistics.median(o.metrics.tpot or 0 for o in outputs),
        "steps": steps,
        "host_ms_a_step": 1e3 * statistics.median(hosts),
        "preemptions": sum(o.metrics.preemptions for o in outputs),
    }


def bench(name: str, workloads: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    small: dict[str, Any] = {"layers": 6, "vocab_size": 512} if arguments.quick else {}
    divided = launched_ranks() > 1
    if divided:
        model = divided_model(name, **small)
        torch.manual_seed(0)  # as --mtp draws what is right, on all ranks alike
    else:
        model = random_model(name, device=arguments.device, **small).requires_grad_(False)
    if getattr(model.config, "enable_moe_block", False):
        model.set_experts_implementation("grouped_mm")
    loaded = time.perf_counter() - start
    loads = [workload(text) for text in workloads]
    longest = max(load.longest for load in loads)
    config = EngineConfig(
        max_model_len=longest + 1, max_requests=max(load.requests for load in loads), expected_tokens=longest,
        max_batched_tokens=arguments.max_batched_tokens, kv_dtype=arguments.kv_dtype, prefix_caching=not arguments.no_reuse,
        capture_at_start=not arguments.lazy, page_size=arguments.page_size,
    )  # fmt: skip
    speculative = None
    if arguments.mtp:
        vocabulary = small.get("vocab_size")
        if divided:
            assistant = divided_assistant(name, model, vocabulary)
        else:
            assistant = random_assistant(name, arguments.device, vocab_size=vocabulary)
        speculative = SpeculativeConfig(assistant, arguments.speculative_tokens)
    start = time.perf_counter()
    engine = Engine(model, config, speculative=speculative)
    ready = time.perf_counter() - start
    if not engine.is_driver:
        engine.run_worker()
        return {}
    rows: list[dict[str, Any]] = []
    for load in loads:
        serve(engine, replace(load, wanted=min(load.wanted, WARM_UP)), seed=1)
        runs = [serve(engine, load, seed=2 + i) for i in range(arguments.repeats)]
        row: dict[str, Any] = {"workload": str(load)} | {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        beside = (VLLM_MTP if arguments.mtp else VLLM).get(name, {}).get(str(load))
        if beside is not None:
            row["vllm"] = dict(zip(("seconds", "ttft_ms", "tpot_ms"), beside, strict=True))
        rows.append(row)
        print(f"{name:8} {load!s:14} {describe(row)}", flush=True)
    if arguments.host_profile:
        _profile_host(engine, loads[-1].given, loads[-1].requests)
    refused = {} if engine.runner.graphs is None else engine.runner.graphs.refused
    floor = {}
    if arguments.device == "cuda":
        floor = {"weights_gb": engine.memory.weights / 1e9, "copy_bandwidth_tb": copy_bandwidth() / 1e12}
    print(engine.memory, flush=True)
    engine.close()
    ranks = engine.runner.ranks.division.ranks
    return {"model": name, "ranks": ranks, "load_s": loaded, "start_s": ready, "rows": rows, "refused": refused, **floor}


def _profile_host(engine: Engine, given: int, requests: int) -> None:
    """Print where the host's time goes while so many requests write."""
    params = SamplingParams(max_tokens=300, ignore_eos=True)
    for index in range(requests):
        engine.add_request([3 + index] * given, params, stream=False)
    for _ in range(60):
        engine.step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(100):
        engine.step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    while engine.has_work:
        engine.step()


def describe(row: dict[str, Any]) -> str:
    ours = (
        f"{row['seconds']:6.2f} s  TTFT {row['ttft_ms']:6.0f}  TPOT {row['tpot_ms']:6.2f}  host {row['host_ms_a_step']:.2f} ms"
    )
    if "vllm" not in row:
        return ours
    seconds, ttft, tpot = row["vllm"].values()
    return ours + f"   vLLM {seconds or '-'} s  TTFT {ttft or '-'}  TPOT {tpot or '-'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="E2B")
    parser.add_argument("--workloads", default="", help="default: those of vLLM's table")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--kv-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--max-batched-tokens", type=int, default=8192)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--no-reuse", action="store_true", help="without the prefix cache")
    parser.add_argument("--host-profile", action="store_true", help="print the host's functions by time, on the last workload")
    parser.add_argument("--lazy", action="store_true", help="capture graphs when they are first used, not at the start")
    parser.add_argument("--mtp", type=float, default=0.0, help="tokens a round on average, 1 to --speculative-tokens + 1")
    parser.add_argument("--speculative-tokens", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    for name in arguments.models.split(","):
        default = ["48/8x4", "32/16x1"] if arguments.quick else list(VLLM[name])
        workloads = arguments.workloads.split(",") if arguments.workloads else default
        with forced(arguments.mtp, arguments.speculative_tokens) if arguments.mtp else nullcontext():
            results.append(bench(name, workloads, arguments))
    without_out = [word for i, word in enumerate(sys.argv) if i and "--out" not in sys.argv[i - 1 : i + 1]]
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    found = {
        "machine": machine, "torch": torch.__version__, "transformers": transformers.__version__,
        "command": " ".join(["python scripts/bench_engine.py", *without_out]), "models": results,
    }  # fmt: skip
    if arguments.out and results[0]:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
