"""What a user calls: model.generate(...) of a plain transformers model, eager, compiled by transformers, optimized, and Engine.

    python scripts/bench_generate.py --models E2B,26B-A4B [--out FILE]
    python scripts/bench_generate.py --quick --device cpu        # few layers, short: does it run?

Each way runs in a process of its own, `optimize` in two: with empty caches (Inductor's, Triton's, ours), then with what the
first has left. Models have their real size, random weights (norms 1, matrices N(0, 0.02)) and random prompts. Reported:

    first     seconds from the loaded model to the first token: optimize(), or the engine, and a call of one new token
    second    seconds of the first whole generate() behind it, where decode graphs are captured
    ttft      ms of generate(max_new_tokens=1), median
    tpot      ms a step: what further tokens of a longer generate() take, median
    cache     bytes that the GPU has for the cache of a prompt, against transformers' own

The prompts of further sizes (--long) are measured with `optimize` and the engine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

import gemma4_compile
from gemma4_compile import Engine, EngineConfig, SamplingParams
from gemma4_compile.bench.rates import copy_bandwidth
from gemma4_compile.hf.loading import random_model
from gemma4_compile.optimized import existing_state, state_of

WAYS = ("eager", "static", "optimize", "optimize again", "engine")


def synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def generate(model: Any, ids: torch.Tensor, new: int, **options: Any) -> float:
    """Seconds of a user's call."""
    synchronize(model)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
    synchronize(model)
    assert out.shape[1] == ids.shape[1] + new
    return time.perf_counter() - start


def times(model: Any, ids: torch.Tensor, new: int, repeats: int, **options: Any) -> dict[str, float]:
    for _ in range(4):  # a user's own first calls: by then what is captured is
        generate(model, ids, 1, **options)
    for _ in range(2):
        generate(model, ids, new, **options)
    first = [generate(model, ids, 1, **options) for _ in range(repeats)]
    whole = [generate(model, ids, new, **options) for _ in range(repeats)]
    ttft = statistics.median(first)
    return {"ttft_ms": 1e3 * ttft, "tpot_ms": 1e3 * (statistics.median(whole) - ttft) / (new - 1)}


def prompt(model: Any, batch: int, tokens: int) -> torch.Tensor:
    chooser = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=chooser).to(model.device)


def cache_bytes(model: Any, tokens: int) -> int:
    """What the GPU has allocated for the cache of a prompt while it is alive, all memory that is kept for caches included."""
    model.generate(prompt(model, 1, 16), max_new_tokens=2, do_sample=False)
    ids = prompt(model, 1, tokens)
    torch.cuda.empty_cache()
    state = existing_state(model)
    kept = 0 if state is None else state.cache_memory
    before = torch.cuda.memory_allocated() - kept
    with torch.inference_mode():
        output = model(ids, logits_to_keep=1)
    cache = output.get("cache") or output.get("past_key_values")
    del output
    torch.cuda.synchronize()
    used = torch.cuda.memory_allocated() - before
    assert cache.get_seq_length() == tokens
    return used


def profile(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Kernels of decode steps, and what is between them."""
    from torch.profiler import ProfilerActivity, profile

    generate(model, ids, 16)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        seconds = generate(model, ids, 33)
    kernels = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names: dict[str, list[float]] = {}
    for event in kernels:
        names.setdefault(event.name[:60], []).append(event.device_time)
    top = sorted(((sum(found), len(found), name) for name, found in names.items()), reverse=True)[:25]
    return {
        "seconds": seconds, "kernels": len(kernels), "busy_ms": sum(event.device_time for event in kernels) / 1e3,
        "top": [{"us": us, "count": count, "name": name} for us, count, name in top],
    }  # fmt: skip


def measure(way: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    torch.set_grad_enabled(False)
    model = random_model(name, args.layers, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    if getattr(model.config, "enable_moe_block", False) and args.device == "cpu":
        model.set_experts_implementation("grouped_mm")
    found: dict[str, Any] = {}
    short = prompt(model, 1, args.prompt)
    if args.device == "cuda":
        found["bandwidth_tb_s"] = copy_bandwidth()
        found["weights_bytes"] = sum(p.untyped_storage().nbytes() for p in model.parameters())
        torch.cuda.empty_cache()
    start = time.perf_counter()
    if way == "engine":
        config = EngineConfig(
            max_model_len=args.prompt + args.new + 64 if not args.long else max(args.long) + args.new + 64, max_requests=32,
            max_batched_tokens=8192 if args.device == "cuda" else 256, prefix_caching=False, chat=False,
        )  # fmt: skip
        engine = Engine(model, config)
        found["made_s"] = time.perf_counter() - start
        engine.generate([short[0].tolist()], SamplingParams(max_tokens=1))
        found["first_s"] = time.perf_counter() - start
        for batch, tokens in [(1, args.prompt), *((b, args.prompt) for b in args.batches), *((1, n) for n in args.long)]:
            prompts, tpots, ttfts = prompt(model, batch, tokens).tolist(), [], []
            for _ in range(args.repeats + 1):
                outputs = engine.generate(prompts, SamplingParams(max_tokens=args.new, ignore_eos=True))
                tpots.append(statistics.median(o.metrics.tpot or 0 for o in outputs))
                ttfts.append(statistics.median(o.metrics.ttft or 0 for o in outputs))
            found[f"{batch}x{tokens}"] = {
                "ttft_ms": 1e3 * statistics.median(ttfts[1:]), "tpot_ms": 1e3 * statistics.median(tpots[1:]),
            }  # fmt: skip
        return found
    caches: list[tuple[str, dict[str, Any]]] = [("", {})]
    if way == "static":
        caches = [("", {"cache_implementation": "static"})]
    elif way.startswith("optimize"):
        gemma4_compile.optimize(model)
        caches.append((" static", {"cache_implementation": "static"}))
    generate(model, short, 1, **caches[0][1])
    found["first_s"] = time.perf_counter() - start
    print(f"{name} {way}: first token after {found['first_s']:.1f} s", file=sys.stderr, flush=True)
    found["second_s"] = generate(model, short, args.new, **caches[0][1])
    if way == "static":
        found["third_s"] = generate(model, short, args.new, **caches[0][1])
    if way == "optimize again":
        return found
    if args.device == "cuda" and args.cache and way in ("eager", "optimize"):
        found["cache_bytes"] = cache_bytes(model, args.cache)
    for label, options in caches:
        found[f"1x{args.prompt}{label}"] = times(model, short, args.new, args.repeats, **options)
    if way == "optimize":
        for batch in args.batches:
            found[f"{batch}x{args.prompt}"] = times(model, prompt(model, batch, args.prompt), args.new, args.repeats)
        for tokens in args.long:
            found[f"1x{tokens}"] = times(model, prompt(model, 1, tokens), args.new, args.repeats)
        if args.device == "cuda" and args.profile:
            found["profile"] = profile(model, short)
        found["report"] = str(gemma4_compile.report(model))
        found["seconds"] = state_of(model).programs[0].spec.seconds
    if args.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="E2B")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=lambda s: [int(x) for x in s.split(",") if x], default=[32])
    parser.add_argument("--long", type=lambda s: [int(x) for x in s.split(",") if x], default=[7000])
    parser.add_argument("--cache", type=int, default=8000, help="tokens of the prompt whose cache is weighed; 0: none")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.layers, args.prompt, args.new, args.repeats, args.batches, args.long = 4, 16, 8, 1, [2], [40]
    if args.way:
        print("RESULT " + json.dumps(measure(args.way, args.models, args)), flush=True)
        return
    results: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if args.device == "cuda":
        results["gpu"] = torch.cuda.get_device_name()
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton",
            }  # fmt: skip
            for way in args.ways.split(","):
                started = time.perf_counter()
                command = [sys.executable, __file__, *sys.argv[1:], "--models", name, "--way", way]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
                line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
                found = json.loads(line[7:]) if line else {"error": done.stdout[-3000:]}
                results.setdefault(name, {})[way] = found
                if args.out:
                    args.out.write_text(json.dumps(results, indent=1) + "\n")
                show(name, way, found, time.perf_counter() - started)


def show(name: str, way: str, found: dict[str, Any], seconds: float) -> None:
    if "error" in found:
        print(f"{name} {way}: failed\n{found['error']}", flush=True)
        return
    parts = [f"{key} {value:.2f}" for key, value in found.items() if isinstance(value, float)]
    parts += [str({k: round(v, 1) for k, v in found["seconds"].items()})] if "seconds" in found else []
    parts += [
        f"{key}: ttft {v['ttft_ms']:.1f} tpot {v['tpot_ms']:.2f}"
        for key, v in found.items()
        if isinstance(v, dict) and "tpot_ms" in v
    ]
    parts += [f"cache {found['cache_bytes'] / 1e6:.1f} MB"] if "cache_bytes" in found else []
    print(f"{name} {way} [{seconds:.0f} s]: " + ", ".join(parts), flush=True)
    if "profile" in found:
        shown = found["profile"]
        busy, whole = shown["busy_ms"], 1e3 * shown["seconds"]
        print(f"  profile of 33 tokens: {shown['kernels']} kernels, busy {busy:.1f} ms of {whole:.1f}")
        for item in shown["top"]:
            print(f"  {item['us']:9.0f} us {item['count']:6d} x {item['name']}")


if __name__ == "__main__":
    main()
