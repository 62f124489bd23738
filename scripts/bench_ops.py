"""Time every gemma4 op against Inductor's code for the same subgraph, at the sizes of the real models.

    python scripts/bench_ops.py [--quick] [--ops route,ple_tail] [--tokens 1,8] [--out FILE]
    python scripts/bench_ops.py --table benchmarks/ops-h200.json

One row: our kernel, torch.compile of the reference (static shapes), and the floor, in microseconds an instance. All are
medians over replays of CUDA graphs that hold many instances on rotating buffers; ours and Inductor's replays alternate.
The floor is the bytes that must move (each input read once, each output written once) over the copy bandwidth that the
same run measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile.bench.rates import copy_bandwidth
from gemma4_compile.ops import OPS
from gemma4_compile.ops.examples import Sizes, example

E2B = Sizes(hidden=1536, q_heads=8, kv_heads=1, head_dim=256, intermediate=6144, layers=35)
E4B = Sizes(hidden=2560, q_heads=8, kv_heads=2, head_dim=256, intermediate=10240, layers=42)
MOE = Sizes(hidden=2816, q_heads=16, kv_heads=8, head_dim=256, intermediate=2112)
DENSE = Sizes(hidden=5376, q_heads=32, kv_heads=16, head_dim=256, intermediate=21504)
E2B_FULL = Sizes(hidden=1536, q_heads=8, kv_heads=1, head_dim=512)
E4B_FULL = Sizes(hidden=2560, q_heads=8, kv_heads=2, head_dim=512)
MOE_FULL = Sizes(hidden=2816, q_heads=16, kv_heads=2, head_dim=512, shared_kv=True)
DENSE_FULL = Sizes(hidden=5376, q_heads=32, kv_heads=4, head_dim=512, shared_kv=True)
TOWER = Sizes(hidden=768, q_heads=12, kv_heads=12, head_dim=64)  # E2B, E4B
LARGE_TOWER = Sizes(hidden=1152, q_heads=16, kv_heads=16, head_dim=72)  # 26B-A4B, 31B
EDGE = {"E2B": E2B, "E4B": E4B}
ALL = {**EDGE, "26B-A4B": MOE, "31B": DENSE}
FULL = {"E2B full": E2B_FULL, "E4B full": E4B_FULL}
CASES: dict[str, dict[str, Sizes]] = {
    "route": {"26B-A4B": MOE},
    "ple_tail_norm": EDGE,
    "ple_tail": {"E2B": E2B},
    "qkv_norm_rope": {**ALL, **FULL, "26B-A4B full": MOE_FULL, "31B full": DENSE_FULL},
    "qkv_norm_rope_2d": {"tower of 768": TOWER, "tower of 1152": LARGE_TOWER},
    "qkv_norm_rope_2d_clipped": {"tower of 768": TOWER},
    "q_norm_rope": {**EDGE, **FULL},
    "post_attention_norm": {**EDGE, "31B": DENSE},
    "post_attention_norms": {"26B-A4B": MOE},
    "feed_forward_tail": EDGE,
    "feed_forward_tail_norm": {"31B": DENSE},
    "moe_feed_forward_tail": {"26B-A4B": MOE},
    "moe_feed_forward_tail_norm": {"26B-A4B": MOE},
    "ple_inputs": EDGE,
    "ple_combine": {"E2B": E2B},
    "geglu": {"E2B": E2B, "31B": DENSE},
    "rms_norm": ALL,
    "rms_norm_noscale": {"26B-A4B": MOE},
    "rope": {"E2B": E2B},
}
TOKENS = (1, 8, 64, 512, 8192)
# Where a plan changes or a range ends between those.
MORE_TOKENS = {
    "ple_tail_norm": (16, 32, 128, 2048),
    "ple_tail": (16, 2048),
    "qkv_norm_rope_2d": (2304, 32768),
    "qkv_norm_rope_2d_clipped": (2304, 32768),
    "q_norm_rope": (16, 128, 2048),
    "geglu": (128, 2048),
}
ROTATE_BYTES = 120e6  # more than twice the L2 of an H200


def tensors(values: Any) -> Iterator[Tensor]:
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, Tensor):
            yield value


def must_move(op: str, args: tuple, outputs: Any) -> int:
    """Bytes of one call: every distinct input once (only the gathered rows of a table), every output once."""
    inputs = {t.data_ptr(): t.numel() * t.element_size() for t in tensors(args)}
    if op == "ple_inputs":
        ids, table = args[:2]
        inputs[table.data_ptr()] = ids.numel() * table.shape[1] * table.element_size()
    return sum(inputs.values()) + sum(t.numel() * t.element_size() for t in tensors(outputs))


def capture(function: Callable, arguments: list[tuple]) -> tuple[torch.cuda.CUDAGraph, list]:
    """One CUDA graph of function over every set of arguments; its outputs stay alive, so no two share memory."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for args in arguments[:2]:
            function(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = []
    with torch.cuda.graph(graph):
        kept.extend(function(*args) for args in arguments)
    return graph, kept


def microseconds(functions: list[Callable], arguments: list[tuple], repeats: int = 15) -> list[float]:
    """Median time of one instance of each function, their replays alternating."""
    graphs = [capture(function, arguments) for function in functions]
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 3):
        for (graph, _), series in zip(graphs, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 3:
                series.append(begin.elapsed_time(end) * 1e3 / len(arguments))
    return [statistics.median(series) for series in times]


def launches(function: Callable, args: tuple) -> int:
    from torch.profiler import ProfilerActivity, profile

    function(*args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function(*args)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def case_arguments(op: str, sizes: Sizes, tokens: int) -> tuple[list[tuple], int]:
    """Sets of arguments that rotate through more than the L2 where a graph of 64 instances can, and bytes a call."""
    first = example(op, sizes, tokens, torch.bfloat16, "cuda")
    size = must_move(op, first, OPS[op].launch(*first))
    count = int(min(64, max(20 if tokens <= 512 else 4, ROTATE_BYTES // size)))
    sets = [first]
    for _ in range(count - 1):
        args = example(op, sizes, tokens, torch.bfloat16, "cuda")
        sets.append(args if op != "ple_inputs" else (args[0], first[1], *args[2:]))  # one table for all
    return sets, size


def run(ops: list[str], token_counts: tuple[int, ...] | None) -> dict[str, Any]:
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s", file=sys.stderr)
    rows = []
    for op in ops:
        for model, sizes in CASES[op].items():
            for tokens in token_counts or sorted({*TOKENS, *MORE_TOKENS.get(op, ())}):
                torch._dynamo.reset()
                compiled = torch.compile(OPS[op].reference, dynamic=False, fullgraph=True)
                sets, size = case_arguments(op, sizes, tokens)
                ours, inductor = microseconds([OPS[op].launch, compiled], sets)
                row = {
                    "op": op,
                    "model": model,
                    "tokens": tokens,
                    "ours_us": round(ours, 3),
                    "inductor_us": round(inductor, 3),
                    "floor_us": round(size / bandwidth * 1e6, 3),
                    "launches": launches(OPS[op].launch, sets[0]),
                    "inductor_launches": launches(compiled, sets[0]),
                    "instances": len(sets),
                }
                rows.append(row)
                print(line(row), flush=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "dtype": "bfloat16",
        "copy_bandwidth_TB_per_s": round(bandwidth / 1e12, 3),
        "command": "python scripts/bench_ops.py",
        "rows": rows,
    }


def line(row: dict[str, Any]) -> str:
    ours, inductor = (
        f"{row['ours_us']:8.2f} ({row['launches']})",
        f"{row['inductor_us']:8.2f} ({row['inductor_launches']})",
    )
    gain = row["inductor_us"] / row["ours_us"]
    return (
        f"{row['op']:27} {row['model']:13} {row['tokens']:5} ours us {ours}  inductor {inductor}  x{gain:5.2f}"
        f"  floor {row['floor_us']:7.2f}"
    )


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/fusions.md: a row an op and model, a column a token count, `ours / Inductor = gain`."""
    counts = sorted({row["tokens"] for row in result["rows"]})
    table: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        table.setdefault((row["op"], row["model"]), {})[row["tokens"]] = row
    lines = [
        "| op | model | launches | " + " | ".join(str(count) for count in counts) + " | floor at 8192 |",
        "|---" * (4 + len(counts)) + "|",
    ]
    for (op, model), cells in table.items():
        texts = [
            f"{cell['ours_us']:.2f} / {cell['inductor_us']:.2f} = **{cell['inductor_us'] / cell['ours_us']:.2f}**"
            if (cell := cells.get(count))
            else ""
            for count in counts
        ]
        first, last = cells[counts[0]], cells[counts[-1]]
        changed = f"{first['inductor_launches']} -> {first['launches']}"
        lines.append(f"| `{op}` | {model} | {changed} | " + " | ".join(texts) + f" | {last['floor_us']:.1f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tokens 1 and 512 only")
    parser.add_argument("--ops", default=",".join(CASES), help="comma-separated names")
    parser.add_argument("--tokens", default=None, help="comma-separated token counts")
    parser.add_argument("--out", type=Path, default=None, help="write the rows as JSON")
    parser.add_argument("--table", type=Path, default=None, help="print this JSON as Markdown; measures nothing")
    options = parser.parse_args()
    if options.table:
        print(markdown(json.loads(options.table.read_text())))
        return 0
    if not torch.cuda.is_available():
        print("bench_ops needs a CUDA GPU; none is visible", file=sys.stderr)
        return 2
    ops = options.ops.split(",")
    unknown = [op for op in ops if op not in CASES]
    if unknown:
        print(f"no such op: {unknown}; choose from {sorted(CASES)}", file=sys.stderr)
        return 2
    token_counts = tuple(int(t) for t in options.tokens.split(",")) if options.tokens else None
    with torch.no_grad():
        result = run(ops, (1, 512) if options.quick else token_counts)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
