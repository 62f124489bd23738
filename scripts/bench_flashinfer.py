"""Time our attention kernel against FlashInfer's fa2 over the same pages, and compare what they compute.

    python scripts/bench_flashinfer.py [--out FILE]

Needs flashinfer-python, which compiles a module a head size at its first use. Milliseconds, medians over replays of a graph
of eight calls, for both. FlashInfer's `plan()` runs on the host for each step; it is timed apart: what a graph has captured of
it is the plan of one step's lengths, which is why a decode step of the engine cannot hold the wrapper.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile.bench.rates import median_seconds
from gemma4_compile.ops.attention import launch_planned
from scripts.bench_attention import LAYERS

PAGE = 64
# Requests of so many new tokens behind so many earlier ones.
BATCHES = {
    "prefill 8192": (1, 8192, 0), "prefill 8 x 1024": (8, 1024, 0), "end of a prompt": (1, 1192, 5808),
    "decode 32": (32, 1, 1024), "decode 80": (80, 1, 1500), "verify 32": (32, 4, 1024),
}  # fmt: skip


class Step(NamedTuple):
    """One layer's attention: arguments of launch_planned behind `out`, and of FlashInfer's plan()."""

    out: torch.Tensor
    ours: tuple[Any, ...]
    plan: tuple[Any, ...]
    options: dict[str, Any]


def step_of(requests: int, new: int, seen: int, heads: int, kv_heads: int, dim: int, window: int) -> Step:
    """Random keys and values in scattered pages; q is scaled so that the softmax is not one key's."""
    pages = -(-(new + seen) // PAGE)
    shape = (requests * pages, PAGE, kv_heads, dim)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(1, requests * new, heads, dim, device="cuda", dtype=torch.bfloat16) * dim**-0.5
    table = torch.randperm(requests * pages, device="cuda").view(requests, pages).int()
    starts = torch.arange(requests + 1, device="cuda", dtype=torch.int32) * new
    positions = torch.arange(seen, seen + new, device="cuda").repeat(requests)
    slots = torch.zeros(0, device="cuda", dtype=torch.int64)
    first_pages = torch.arange(requests + 1, dtype=torch.int32) * pages
    last = torch.full((requests,), new + seen - (pages - 1) * PAGE, dtype=torch.int32)
    ours = (q, None, None, keys, values, slots, table, positions, starts, window, 1.0)
    plan = (starts.cpu(), first_pages, table.flatten().cpu(), last, heads, kv_heads, dim, PAGE)
    options = {
        "causal": True, "window_left": window - 1 if window else -1, "sm_scale": 1.0, "q_data_type": q.dtype,
        "kv_data_type": q.dtype,
    }  # fmt: skip
    return Step(torch.empty_like(q), ours, plan, options)


def compare(step: Step) -> dict[str, float]:
    """Milliseconds of both, of one plan(), and the relative difference of the results."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    wrapper = BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", backend="fa2"
    )
    q, _, _, keys, values, *_ = step.ours
    theirs = torch.empty_like(q[0])
    wrapper.plan(*step.plan, **step.options)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        wrapper.plan(*step.plan, **step.options)
    planned = (time.perf_counter() - start) / 5

    def attend() -> None:
        launch_planned(step.out, *step.ours)

    def attend_by_flashinfer() -> None:
        wrapper.run(q[0], (keys, values), out=theirs)

    attend()
    attend_by_flashinfer()
    difference = (step.out[0].double() - theirs.double()).norm() / step.out.double().norm()
    found = {"difference": difference.item(), "plan_ms": 1e3 * planned}
    for name, function in (("ours_ms", attend), ("flashinfer_ms", attend_by_flashinfer)):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(8):
                function()
        found[name] = median_seconds(graph.replay, 20) * 1e3 / 8
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    print("| layer | batch | ours ms | FlashInfer ms | FlashInfer / ours | plan() ms | difference |\n" + "|---" * 7 + "|")
    for layer, geometry in LAYERS.items():
        for batch, sizes in BATCHES.items():
            found = compare(step_of(*sizes, *geometry))
            rows.append({"layer": layer, "batch": batch} | found)
            ratio = found["flashinfer_ms"] / found["ours_ms"]
            print(
                f"| {layer} | {batch} | {found['ours_ms']:.4f} | {found['flashinfer_ms']:.4f} | **{ratio:.2f}** | "
                f"{found['plan_ms']:.2f} | {found['difference']:.1e} |",
                flush=True,
            )
    if arguments.out:
        import flashinfer

        about = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "flashinfer": flashinfer.__version__}
        about["command"] = "python scripts/bench_flashinfer.py"
        arguments.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
