"""Time attention over launch plans at the shapes of the released models: attention_plan and hopper_plan come from here.

    python scripts/bench_attention.py [--only "E2B full, decode 80|26B-A4B"] [--out FILE]
    python scripts/bench_attention.py --decode [--only "E2B sliding"] [--out FILE]        # few rows, as a step launches them

Each shape is one class of the plan: a prefill of one request of 8192 tokens, decode of 1 to 80 requests behind 1024 to 8000
keys, verification of three drafts. Microseconds, median of 20 launches, each plan beside the one that attention_plan picks.
The floor of a decode is the bytes of its keys and values over the copy bandwidth, that of a prefill its FLOPs over the rate of
a large product. Most of the time goes to compiling: `--compile` does that alone, so that several processes can, shape by shape.

--decode: one new token a request, fewer plans, and each launch as in a step: dependent, behind a norm, reading keys that are
not in the L2 cache, in pages of 64 that lie anywhere. The norm's own time is taken off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile.bench.rates import copy_bandwidth, median_seconds, product_rate
from gemma4_compile.ops.attention import AttentionPlan, attention_plan, launch_planned
from gemma4_compile.ops.attention_hopper import HopperPlan, hopper_plan
from gemma4_compile.ops.dependent import constants
from gemma4_compile.ops.gluon import is_hopper
from gemma4_compile.ops.rms_norm import rms_norm
from scripts.bench_linear import quick_microseconds

Plan = AttentionPlan | HopperPlan


class Shape(NamedTuple):
    """Requests of `rows` new tokens behind `seen` earlier ones."""

    name: str
    requests: int
    rows: int
    seen: int
    heads: int
    kv_heads: int
    dim: int
    window: int


LAYERS = {
    "E2B sliding": (8, 1, 256, 512),
    "E2B full": (8, 1, 512, 0),
    "26B-A4B sliding": (16, 8, 256, 1024),
    "26B-A4B full": (16, 2, 512, 0),
    "31B full": (32, 4, 512, 0),
}
BATCHES = {
    "prefill 8192": (1, 8192, 0), "decode 1": (1, 1, 1024), "decode 32": (32, 1, 1024), "decode 32 long": (32, 1, 8000),
    "decode 80": (80, 1, 1500), "verify 1": (1, 4, 1024), "verify 32": (32, 4, 1024),
}  # fmt: skip
SHAPES = [Shape(f"{layer}, {batch}", *BATCHES[batch], *LAYERS[layer]) for layer in LAYERS for batch in BATCHES]


def inputs_of(shape: Shape) -> tuple[Any, ...]:
    """Random arguments of launch_planned, a page a request."""
    tokens, page = shape.requests * shape.rows, -(-(shape.rows + shape.seen) // 16) * 16
    new = [torch.randn(1, tokens, n, shape.dim, device="cuda", dtype=torch.bfloat16) for n in (shape.heads, 1)]
    keys, values = torch.randn(2, shape.requests, page, shape.kv_heads, shape.dim, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(shape.rows, device="cuda").repeat(shape.requests) + shape.seen
    starts = torch.arange(0, tokens + 1, shape.rows, device="cuda", dtype=torch.int32)
    table = torch.arange(shape.requests, device="cuda", dtype=torch.int32)[:, None]
    slots = torch.zeros(0, device="cuda", dtype=torch.int64)
    return torch.empty_like(new[0]), new[0], None, None, keys, values, slots, table, positions, starts, shape.window, 1.0


def microseconds(arguments: tuple[Any, ...], plan: Plan, compiles_alone: bool = False) -> float | None:
    """Of launches in a CUDA graph, eight at a time; None if the plan does not fit the GPU."""
    try:
        launch_planned(*(*arguments, plan))
        torch.cuda.synchronize()
        if compiles_alone:
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(8):
                launch_planned(*(*arguments, plan))
    except Exception:  # out of shared memory or registers, in several classes
        torch.cuda.synchronize()
        return None
    return median_seconds(graph.replay, 20) * 1e6 / 8


def candidates(shape: Shape) -> list[Plan]:
    """Plans worth a try in the shape's class."""
    group = shape.heads // shape.kv_heads
    if shape.rows > 8:
        sizes = ((64, 128), (32, 64, 128)) if shape.dim <= 256 else ((32, 64), (16, 32, 64))
        grid = itertools.product(*sizes, (1,), (4, 8), (1, 2) if shape.dim > 256 else (2,))
    else:
        rows = (16,) if shape.rows * group <= 16 else (16, 32)
        splits = (8, 16, 32, 64) if shape.requests == 1 else (1, 2, 4, 8, 16)
        grid = itertools.product(rows, (32, 64), splits, (2, 4, 8) if shape.requests > 1 else (2, 4), (2,))
    found: list[Plan] = [AttentionPlan(max(1, m // group), n, splits, warps, stages) for m, n, splits, warps, stages in grid]
    return found + [HopperPlan(splits) for splits in (1, 2, 4, 8, 16, 32) if is_hopper(torch.device("cuda", 0))]


def measure_decode(layer: str, requests: int, context: int, bandwidth: float) -> dict[str, Any]:
    heads, kv_heads, dim, window = LAYERS[layer]
    pages, reads, group = -(-context // 64), min(context, window or context), heads // kv_heads
    nbytes = 4 * requests * reads * kv_heads * dim
    layers = [
        (*torch.randn(2, requests * pages, 64, kv_heads, dim, device="cuda", dtype=torch.bfloat16),)
        for _ in range(max(3, min(16, int(120e6 / nbytes))))
    ]
    table = torch.randperm(requests * pages, device="cuda", dtype=torch.int32).view(requests, pages)
    positions = torch.full((requests,), context - 1, device="cuda")
    starts = torch.arange(requests + 1, device="cuda", dtype=torch.int32)
    slots, x = starts.new_zeros(0, dtype=torch.int64), torch.randn(1, requests, heads * dim, device="cuda").bfloat16()
    weight, out = torch.ones_like(x[0, 0]), torch.empty_like(x).view(1, requests, heads, dim)

    def run(keys: torch.Tensor, values: torch.Tensor, plan: Plan | None) -> None:
        q = rms_norm.launch(x, weight, 1e-6).view_as(out)
        if plan is not None:
            launch_planned(out, q, None, None, keys, values, slots, table, positions, starts, window, 1.0 / 16, plan)

    sizes = requests, requests, kv_heads, group, dim, pages * 64
    chosen: Plan = is_hopper(x.device) and hopper_plan(*sizes) or attention_plan(*sizes, window)
    block_q = max(1, 16 // group)
    plans: list[Plan] = [AttentionPlan(block_q, n, s, 4, 2) for n in (32, 64) for s in (2, 4, 8, 16, 32)]
    plans += [AttentionPlan(block_q, 64, s, 4, 3) for s in (2, 4, 8) if dim <= 256]
    plans += [HopperPlan(s) for s in (1, 2, 4, 8, 16, 32)] if is_hopper(x.device) else []
    plans = [chosen, *(plan for plan in plans if plan != chosen and requests * kv_heads * plan.splits <= 640)]
    with constants([weight]):
        *times, norm = quick_microseconds([partial(run, plan=plan) for plan in (*plans, None)], layers)
    found = sorted((round(us - norm, 2), list(plan)) for us, plan in zip(times, plans, strict=True))
    return {
        "shape": f"{layer}, decode {requests} at {context}", "floor_us": round(1e6 * nbytes / bandwidth, 2),
        "chosen_us": round(times[0] - norm, 2), "chosen": chosen, "best": found[:5],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="shapes whose name contains one of these, parted by |")
    parser.add_argument("--decode", action="store_true", help="few rows, as a step launches them")
    parser.add_argument("--compile", action="store_true", help="compile the plans, time nothing")
    arguments = parser.parse_args()
    shapes = [shape for shape in SHAPES if any(part in shape.name for part in arguments.only.split("|"))]
    if arguments.compile:
        for shape in shapes:
            given = inputs_of(shape)
            for plan in candidates(shape):
                microseconds(given, plan, compiles_alone=True)
        return
    bandwidth, rate = copy_bandwidth(), product_rate()
    rows = []
    if arguments.decode:
        shapes = []
        for layer, (requests, context) in itertools.product(LAYERS, itertools.product((1, 4, 8, 16, 30, 48, 80), (1024, 8000))):
            name = f"{layer}, decode {requests} at {context}"
            if any(part in name for part in arguments.only.split("|")):
                rows.append(measure_decode(layer, requests, context, bandwidth))
                print(json.dumps(rows[-1]), flush=True)
    for shape in shapes:
        given = inputs_of(shape)
        most = shape.rows + shape.seen
        sizes = shape.requests * shape.rows, shape.requests, shape.kv_heads, shape.heads // shape.kv_heads, shape.dim, most
        chosen = is_hopper(torch.device("cuda", 0)) and hopper_plan(*sizes) or attention_plan(*sizes, shape.window)
        timed = [(microseconds(given, plan), plan) for plan in [chosen, *candidates(shape)]]
        found = sorted(((us, plan) for us, plan in timed[1:] if us is not None), key=lambda one: one[0])
        keys = min(shape.window or most, most)
        seen = sum(min(i + 1, keys) for i in range(shape.rows)) if shape.seen == 0 else keys * shape.rows
        by_bytes = 4.0 * shape.requests * keys * shape.kv_heads * shape.dim / bandwidth
        by_flops = 4.0 * shape.requests * shape.heads * shape.dim * seen / rate
        row: dict[str, Any] = {
            "shape": shape.name,
            "floor_us": round(max(by_bytes, by_flops) * 1e6, 2),
            "chosen_us": timed[0][0],
            "chosen": chosen,
        }
        row["best"] = [(round(us, 2), list(plan)) for us, plan in found[:5]]
        rows.append(row)
        print(
            f"{shape.name:32} floor {row['floor_us']:8} chosen {timed[0][0]} {list(chosen)} best {row['best'][:3]}", flush=True
        )
    if arguments.out:
        about = {
            "machine": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "command": "python scripts/bench_attention.py",
        }
        arguments.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
