"""Time the packed step of models of real size, with random weights: compiling it, prefill with and without YOCO, decode.

    python scripts/bench_step.py compile [--models E2B,26B-A4B] [--out FILE]
    python scripts/bench_step.py prefill [--models E2B,E4B] [--requests 30] [--tokens 7000] [--out FILE]
    python scripts/bench_step.py decode [--models E2B,26B-A4B] [--batches 1,32] [--context 1024] [--out FILE]
    python scripts/bench_step.py prefill --quick --device cpu       # few layers, short prompts: does it run?

compile   in a process with empty caches, then in a second process with those that it left: seconds to trace, pass, compile or
          load, and to the first token of a prompt (the model's random weights are made before the clock starts)
prefill   REQUESTS prompts of TOKENS tokens in packed steps of 8192 tokens, then 9 decode steps: 10 tokens each. CUDA graphs.
          The floor is the FLOPs of the matrix products and of attention over the rate of a large matrix product
decode    one token for each of BATCH requests, behind CONTEXT random keys and values, as one CUDA graph: wall time of a step
          when steps are launched one after the other, and how long the GPU is busy in it. The floor is the bytes of weights
          over the copy bandwidth
All medians; rates are measured in the same run.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile import OptimizeConfig, optimize, report
from gemma4_compile.bench.rates import copy_bandwidth, gpu_events, product_rate
from gemma4_compile.geometry import Geometry
from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.hf.loading import random_model
from gemma4_compile.packed.inputs import PlainKV, Request
from gemma4_compile.runtime.worker.model import PackedModel

BUDGET = 8192  # tokens a step
DECODED = 10


def model_of(name: str, arguments: argparse.Namespace) -> Any:
    """The model, ready to be optimized."""
    small: dict[str, Any] = {"layers": 6, "vocab_size": 512} if arguments.quick else {}
    model = random_model(name, device=arguments.device, **small).requires_grad_(False)
    if getattr(model.config, "enable_moe_block", False):
        model.set_experts_implementation("grouped_mm")
    return model


def runner(packed: PackedModel, kv: PlainKV) -> Callable[..., Any]:
    """CUDA graphs on a GPU, the program itself elsewhere."""
    if kv.device.type != "cuda":
        return packed
    return GraphRunner(packed.program, kv.inputs([Request([0])]), kv.requests)


def steps_of(requests: int, tokens: int, budget: int) -> list[list[tuple[int, int, int]]]:
    """Packed prefill steps as (request, first token, end): each full, but for the last."""
    steps: list[list[tuple[int, int, int]]] = [[]]
    room = budget
    for request in range(requests):
        first = 0
        while first < tokens:
            end = min(tokens, first + room)
            steps[-1].append((request, first, end))
            room -= end - first
            first = end
            if not room:
                steps.append([])
                room = budget
    return [step for step in steps if step]


def serve(run: Callable[..., Any], kv: PlainKV, prompts: list[list[int]], budget: int) -> dict[str, float]:
    """Prefill all prompts, then decode together. Seconds of both."""
    first_tokens: list[torch.Tensor] = []  # read when all are there: until then the host runs ahead of the GPU
    synchronize()
    start = time.perf_counter()
    for step in steps_of(len(prompts), len(prompts[0]), budget):
        rows = [request for request, _, _ in step]
        finished = [request for request, _, end in step if end == len(prompts[request])]
        wanting = finished or rows[-1:]  # a step computes one row at least
        batch = [Request(prompts[r][first:end], first, None if r in wanting else []) for r, first, end in step]
        logits = run(kv.inputs(batch, rows))
        first_tokens.append(logits[0, : len(finished)].argmax(-1))
    last = torch.cat(first_tokens).tolist()
    prefilled = time.perf_counter()
    for position in range(len(prompts[0]), len(prompts[0]) + DECODED - 1):
        last = run(kv.inputs([Request([token], position) for token in last]))[0].argmax(-1).tolist()
    synchronize()
    return {"prefill_s": prefilled - start, "decode_s": time.perf_counter() - prefilled}


def prefill(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """With and without YOCO, in turns, on the same weights."""
    requests, tokens, budget = (3, 40, 48) if arguments.quick else (arguments.requests, arguments.tokens, BUDGET)
    model = model_of(name, arguments)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, model.config.vocab_size, (requests, tokens), generator=generator).tolist()
    runs: dict[str, Any] = {}
    for variant, config in (("yoco", OptimizeConfig()), ("whole", OptimizeConfig(disable=("yoco",)))):
        packed = PackedModel(optimize(model, config))
        capacity = -(-(tokens + DECODED) // 16) * 16
        kv = PlainKV(packed.geometry, requests, capacity, model.dtype, arguments.device)
        runs[variant] = (runner(packed, kv), kv, packed)
    result: dict[str, Any] = {"model": name, "requests": requests, "tokens": tokens, "decoded": DECODED}
    times: dict[str, list[dict[str, float]]] = {variant: [] for variant in runs}
    for _ in range(arguments.repeats + 1):  # the first captures
        for variant, (run, kv, _) in runs.items():
            times[variant].append(serve(run, kv, prompts, budget))
    for variant, (run, _, packed) in runs.items():
        kept = times[variant][1:]
        row: dict[str, Any] = {key: round(statistics.median(t[key] for t in kept), 4) for key in kept[0]}
        row["total_s"] = round(statistics.median(sum(t.values()) for t in kept), 4)
        row["pflop"] = round(flops(model, packed.geometry, requests, tokens, variant == "yoco") / 1e15, 3)
        row["refused"] = getattr(run, "refused", {})
        result[variant] = row
    result["ratio"] = round(result["whole"]["total_s"] / result["yoco"]["total_s"], 3)
    result["ratio_prefill"] = round(result["whole"]["prefill_s"] / result["yoco"]["prefill_s"], 3)
    if arguments.device == "cuda":
        rate = product_rate()
        result["product_tflops"] = round(rate / 1e12, 1)
        for variant in runs:
            row = result[variant]
            row["floor_s"] = round(row["pflop"] * 1e15 / rate, 4)
            row["share_of_floor"] = round(row["floor_s"] / row["prefill_s"], 3)
    return result


def flops(model: Any, model_geometry: Geometry, requests: int, tokens: int, yoco: bool) -> float:
    """Of the matrix products and attention of the prefills: 2 a weight and row, 4 a query head's element and key."""
    window = model.config.sliding_window
    total = 0.0
    for layer, module in zip(model_geometry.layers, model.model.layers, strict=True):
        rows = 1 if yoco and layer.shares_kv else tokens
        weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
        total += 2.0 * weights * rows
        span = window if layer.kind == "sliding_attention" else tokens
        seen = min(span, tokens) * rows if rows == 1 else sum(min(i + 1, span) for i in range(tokens))
        total += 4.0 * layer.heads * layer.head_dim * seen
    if model_geometry.per_layer_input:
        total += 2.0 * model.model.per_layer_model_projection.weight.numel() * tokens
    total += 2.0 * model.config.vocab_size * model_geometry.hidden
    return total * requests


def decode(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each batch."""
    model: Any = optimize(model_of(name, arguments))
    packed = PackedModel(model)
    context = 32 if arguments.quick else arguments.context
    rows = []
    for batch in [2] if arguments.quick else arguments.batches:
        kv = PlainKV(packed.geometry, batch, -(-(context + 1) // 16) * 16, model.dtype, arguments.device)
        for tensor in kv.tensors.values():
            tensor.normal_()
        run = runner(packed, kv)
        tokens = torch.randint(5, model.config.vocab_size, (batch,)).tolist()
        inputs = kv.inputs([Request([token], context) for token in tokens])
        for _ in range(4):
            run(inputs)
        synchronize()
        walls = []
        for _ in range(5):  # of 20 steps each, launched one after the other as a server does
            start = time.perf_counter()
            for _ in range(20):
                run(inputs)
            synchronize()
            walls.append((time.perf_counter() - start) / 20 * 1e3)
        row: dict[str, Any] = {"model": name, "batch": batch, "context": context, "wall_ms": round(statistics.median(walls), 4)}
        if arguments.device == "cuda":
            row |= busy(partial(run, inputs))
            row["busy_share"] = round(row["busy_ms"] / row["wall_ms"], 4)
            weights = weight_bytes(model, batch)
            row["weight_gb"] = round(weights / 1e9, 3)
            row["floor_ms"] = round(weights / copy_bandwidth() * 1e3, 3)
        row["refused"] = getattr(run, "refused", {})
        rows.append(row)
    return rows


def weight_bytes(model: Any, batch: int) -> float:
    """Of a decode step: each matrix once, of the per-layer embeddings the rows, of the experts those that so many tokens choose
    on average if all are as likely."""
    total = 0.0
    for name, parameter in model.named_parameters():  # tied weights once
        size = float(parameter.numel() * parameter.element_size())
        if "embed_tokens_per_layer" in name:
            size *= batch / parameter.shape[0]
        elif ".experts." in name:
            size *= 1 - (1 - model.config.top_k_experts / model.config.num_experts) ** batch
        total += size
    return total


def busy(step: Callable[[], Any]) -> dict[str, Any]:
    """Kernels of one step, the time the GPU runs at least one of them, and the twelve names that cost most."""
    found = []
    for _ in range(5):
        events = gpu_events(step)
        spans = sorted((e.time_range.start, e.time_range.end) for e in events)
        covered, until = 0.0, 0.0
        for first, last in spans:
            covered += max(0.0, last - max(first, until))
            until = max(until, last)
        found.append((covered / 1e3, events))
    found.sort(key=lambda one: one[0])
    middle, events = found[len(found) // 2]
    spent: dict[str, list[float]] = {}
    for event in events:
        spent.setdefault(event.name[:70], []).append(event.device_time)
    top = sorted(spent.items(), key=lambda item: -sum(item[1]))[:12]
    return {
        "busy_ms": round(middle, 4),
        "kernels": len(events),
        "top": [{"name": name, "count": len(times), "ms": round(sum(times) / 1e3, 4)} for name, times in top],
    }


def compile_once(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """In this process: what it takes from a model to the first token."""
    model = model_of(name, arguments)
    prompt = list(range(5, 105))
    kv_tokens = 112
    synchronize()
    start = time.perf_counter()
    packed = PackedModel(optimize(model))
    opened = time.perf_counter()
    kv = PlainKV(packed.geometry, 1, kv_tokens, model.dtype, arguments.device)
    run = runner(packed, kv)
    first = run(kv.inputs([Request(prompt)]))[0, 0].argmax().item()
    token = time.perf_counter()
    run(kv.inputs([Request([int(first)], len(prompt))]))[0, 0].argmax().item()
    found = report(model)
    spec = packed.program.spec
    return {
        "model": name, "opened_s": round(opened - start, 2), "first_token_s": round(token - start, 2),
        "second_token_s": round(time.perf_counter() - token, 2),
        "steps_s": {k: round(v, 2) for k, v in spec.seconds.items()} if packed.program.compiled else {},
        "pieces": found.pieces, "unique_pieces": found.unique_pieces, "compiled": packed.program.compiled,
        "first_token": int(first),
    }  # fmt: skip


def compile_twice(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Two processes, one after the other, with one set of caches that starts empty."""
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": caches, "TRITON_CACHE_DIR": f"{caches}/triton"}
        command = [sys.executable, __file__, "once", "--models", name, "--device", arguments.device]
        command += ["--quick"] if arguments.quick else []
        rows = []
        for _ in range(2):
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            rows.append(json.loads(done.stdout.splitlines()[-1]) | {"process_s": round(time.perf_counter() - start, 1)})
    return {"model": name, "cold": rows[0], "second": rows[1]}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "prefill", "decode", "once"))
    parser.add_argument("--models", default="E2B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--batches", type=lambda text: [int(b) for b in text.split(",")], default=[1])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few layers and short prompts, to see that it runs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    measure = {"compile": compile_twice, "prefill": prefill, "decode": decode, "once": compile_once}[arguments.what]
    rows: list[Any] = []
    for name in arguments.models.split(","):
        found = measure(name, arguments)
        rows += found if isinstance(found, list) else [found]
        print(json.dumps(rows[-1] if not isinstance(found, list) else found), flush=True)
    if arguments.out:
        machine = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        given = [word for i, word in enumerate(sys.argv[1:]) if "--out" not in (word, sys.argv[i])]
        command = " ".join(["python scripts/bench_step.py", *given])
        about = {"machine": machine, "torch": torch.__version__, "transformers": transformers.__version__, "command": command}
        arguments.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
