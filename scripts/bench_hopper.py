"""Time Hopper's own kernels beside what runs elsewhere: attention and experts of many tokens; products: bench_linear.py.

    python scripts/bench_hopper.py [--only attention,experts] [--out FILE]

Each row: microseconds in a CUDA graph of what the plans of other GPUs launch (our Triton kernels, torch's grouped product),
of what Hopper's plan launches, and the floor: the bytes of weights or of keys and values at this run's copy bandwidth
or the FLOPs at the rate of its large product, whichever takes longer. `difference` is the largest between the two results,
beside the largest result. A graph goes through several layers' weights, more than the L2 cache holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile.bench.rates import copy_bandwidth, median_seconds, product_rate
from gemma4_compile.ops.attention import AttentionPlan, attention_plan, launch_planned
from gemma4_compile.ops.attention_hopper import HopperPlan, hopper_plan
from gemma4_compile.ops.fusions.experts import run_plan
from gemma4_compile.ops.plans import HopperTilesPlan, experts_plan

PAGE = 64
LAYERS = {  # query heads, KV heads, head size, window
    "E2B full": (8, 1, 512, 0), "E2B sliding": (8, 1, 256, 512), "E4B full": (8, 2, 512, 0),
    "26B-A4B full": (16, 2, 512, 0), "26B-A4B sliding": (16, 8, 256, 1024),
    "31B full": (32, 4, 512, 0), "31B sliding": (32, 16, 256, 1024),
}  # fmt: skip
BATCHES = {  # requests, new rows of each, keys before them, head size or None for all
    "prompt of 8000": (1, 8000, 0, 512), "2048 behind 30000": (1, 2048, 30000, 512), "256 behind 2000": (1, 256, 2000, 512),
    "30 prompts of 100": (30, 100, 0, 512), "decode 16 at 1024": (16, 1, 1023, 512), "decode 32 at 1536": (32, 1, 1535, 512),
    "decode 80 at 200": (80, 1, 199, None), "decode 80 at 1536": (80, 1, 1535, None),
    "verify 80 x 4 at 1536": (80, 4, 1532, None),
}  # fmt: skip


class Rates(NamedTuple):
    bandwidth: float
    product: float

    def floor(self, nbytes: float, flops: float) -> float:
        return 1e6 * max(nbytes / self.bandwidth, flops / self.product)


def graphed(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one of the calls, which a CUDA graph makes one after the other."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_seconds(graph.replay, 20) * 1e6 / len(calls)


def normal(*size: int, std: float = 1.0) -> Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16) * std


def row(kind: str, shape: str, floor: float, times: list[float], results: list[Tensor]) -> dict[str, Any]:
    (before, after), (wanted, got) = times, results
    difference, largest = (wanted.float() - got.float()).abs().max().item(), wanted.float().abs().max().item()
    numbers = {"floor_us": floor, "before_us": before, "us": after}
    return {
        "kind": kind,
        "shape": shape,
        **{k: round(v, 2) for k, v in numbers.items()},
        "difference": difference,
        "largest": largest,
    }


def attention(rates: Rates) -> Iterator[dict[str, Any]]:
    for layer, (heads, kv_heads, dim, window) in LAYERS.items():
        for batch, (requests, rows, seen, only) in BATCHES.items():
            if only not in (None, dim):
                continue
            most, tokens = rows + seen, requests * rows
            pages = -(-most // PAGE)
            keys, values = normal(2, requests * pages, PAGE, kv_heads, dim)
            table = torch.randperm(requests * pages, device="cuda", dtype=torch.int32).view(requests, pages)
            positions = torch.arange(rows, device="cuda").repeat(requests) + seen
            starts = torch.arange(0, tokens + 1, rows, device="cuda", dtype=torch.int32)
            q, slots = normal(1, tokens, heads, dim, std=0.4 * (512 / dim) ** 0.5), starts.new_zeros(0, dtype=torch.int64)
            group = heads // kv_heads
            before = attention_plan(tokens, requests, kv_heads, group, dim, pages * PAGE, window)
            after = hopper_plan(tokens, requests, kv_heads, group, dim, pages * PAGE)
            if after is None:
                continue
            plans: list[AttentionPlan | HopperPlan] = [before, after]
            results = [torch.zeros_like(q) for _ in range(2)]
            given = q, None, None, keys, values, slots, table, positions, starts, window, 1.0
            times = [
                graphed([partial(launch_planned, out, *given, plan)] * 4) for out, plan in zip(results, plans, strict=True)
            ]
            pairs = sum(min(p + 1, window or p + 1) for p in range(seen, most)) * requests
            nbytes = 4.0 * requests * min(most, window + rows if window else most) * kv_heads * dim
            yield row("attention", f"{layer}, {batch}", rates.floor(nbytes, 4.0 * heads * dim * pairs), times, results)


def experts(rates: Rates) -> Iterator[dict[str, Any]]:
    hidden, inner, count, top_k = 2816, 704, 128, 8
    layers = [(normal(count, 2 * inner, hidden, std=0.02), normal(count, hidden, inner, std=0.02)) for _ in range(2)]
    for tokens in (1024, 2048, 4096, 8000):
        x, weights = normal(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
        indices = torch.rand(tokens, count, device="cuda").argsort(-1)[:, :top_k].contiguous()
        plans = [experts_plan(tokens, top_k, count, x.dtype, hidden, inner, hopper) for hopper in (False, True)]
        times = [graphed([partial(run_plan, plan, x, indices, weights, *layer) for layer in layers]) for plan in plans]
        results = [run_plan(plan, x, indices, weights, *layers[0]) for plan in plans]
        floor = rates.floor(2.0 * sum(w.numel() for w in layers[0]), 6.0 * tokens * top_k * hidden * inner)
        yield row("experts", f"26B-A4B, {tokens} tokens", floor, times, results)


def taken(row: dict[str, Any]) -> bool:
    """Whether Hopper's plan for a row is one of its own kernels."""
    name, _, rest = row["shape"].partition(", ")
    if row["kind"] == "attention":
        (heads, kv_heads, dim, _), (requests, rows, seen, _) = LAYERS[name], BATCHES[rest]
        return hopper_plan(requests * rows, requests, kv_heads, heads // kv_heads, dim, rows + seen) is not None
    return isinstance(experts_plan(int(rest.split()[0]), 8, 128, torch.bfloat16, 2816, 704, True), HopperTilesPlan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="attention,experts")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    rates = Rates(copy_bandwidth(), product_rate())
    rows = []
    for part in (attention, experts):
        if part.__name__ in args.only.split(","):
            for found in part(rates):
                print(
                    "{kind:10} {shape:36} floor {floor_us:8} before {before_us:8} now {us:8} {difference:.3f}".format(**found),
                    flush=True,
                )
                rows.append(found)
    if args.out:
        about = {
            "machine": torch.cuda.get_device_name(), "torch": torch.__version__, "command": "python scripts/bench_hopper.py",
            "copy_bandwidth_TB_per_s": round(rates.bandwidth / 1e12, 3), "product_TFLOP_per_s": round(rates.product / 1e12, 1),
        }  # fmt: skip
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
