"""Time the products of ops/fusions/linear.py by each plan against cuBLAS, at the sizes of the real models.

    python scripts/bench_linear.py [--rows 1,2,3,4,8,32] [--out FILE]
    python scripts/bench_linear.py --hopper [--rows 4,16,30,64,80,128] [--models E2B] [--out FILE]
    python scripts/bench_linear.py --table benchmarks/linear-h200.json
    python scripts/bench_linear.py --ple [--rows 3,4,8,16,30,64,80,128] [--out FILE]      # the two products of a PLE tail

One row: the products of one launch, cuBLAS's for the same (a launch a matrix; with geglu's kernel where gated), and each
plan, in microseconds. Medians over replays of CUDA graphs, which alternate; the weights rotate through more than the L2.
`product_plan` is made of these numbers, and tests/ops/test_measured.py holds it to them.

--hopper: the kernel of ops/fusions/linear_hopper.py by several plans. As in a step a norm stands in front of each product, and
launches are dependent: norm and product together are what is timed, also with cuBLAS and with the plan of other GPUs.

--ple: both products of a PLE tail and what is between them, launched dependently, by cuBLAS, by the kernels without tensor
cores up to 32 rows, and by several plans with them; then the gate and the projection alone. `difference`: the largest of any
plan's results from cuBLAS's, as a share of the largest result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile.bench.rates import median_seconds
from gemma4_compile.ops.dependent import constants
from gemma4_compile.ops.fusions.geglu import launch_geglu
from gemma4_compile.ops.fusions.linear import launch_products
from gemma4_compile.ops.fusions.ple_dot import launch_gate_dot, launch_projection_dot
from gemma4_compile.ops.fusions.ple_tail import launch_gate, launch_planned, launch_projection
from gemma4_compile.ops.plans import (
    PROCESSORS,
    DotPlan,
    HopperProductsPlan,
    PleDotPlan,
    PlePlan,
    VectorPlan,
    ple_plan,
    product_plan,
)
from gemma4_compile.ops.rms_norm import rms_norm
from scripts.bench_ops import microseconds

# (model, product) -> rows of each matrix, width, gated
PRODUCTS: dict[tuple[str, str], tuple[tuple[int, ...], int, bool]] = {
    ("E2B", "q, k, v"): ((2048, 256, 256), 1536, False),
    ("E2B", "q, k, v, full"): ((4096, 512, 512), 1536, False),
    ("E2B", "q"): ((2048,), 1536, False),
    ("E2B", "q, full"): ((4096,), 1536, False),
    ("E2B", "o"): ((1536,), 2048, False),
    ("E2B", "o, full"): ((1536,), 4096, False),
    ("E2B", "gate, up"): ((6144, 6144), 1536, True),
    ("E2B", "gate, up, wide"): ((12288, 12288), 1536, True),
    ("E2B", "down"): ((1536,), 6144, False),
    ("E2B", "down, wide"): ((1536,), 12288, False),
    ("E2B", "PLE projection"): ((8960,), 1536, False),
    ("E2B", "head"): ((262144,), 1536, False),
    ("E4B", "q, k, v"): ((2048, 512, 512), 2560, False),
    ("E4B", "q"): ((2048,), 2560, False),
    ("E4B", "o"): ((2560,), 2048, False),
    ("E4B", "o, full"): ((2560,), 4096, False),
    ("E4B", "gate, up"): ((10240, 10240), 2560, True),
    ("E4B", "down"): ((2560,), 10240, False),
    ("26B-A4B", "q, k, v"): ((4096, 2048, 2048), 2816, False),
    ("26B-A4B", "q, k, full"): ((8192, 1024), 2816, False),
    ("26B-A4B", "o"): ((2816,), 4096, False),
    ("26B-A4B", "o, full"): ((2816,), 8192, False),
    ("26B-A4B", "gate, up"): ((2112, 2112), 2816, True),
    ("26B-A4B", "down"): ((2816,), 2112, False),
    ("26B-A4B", "router"): ((128,), 2816, False),
    ("31B", "q, k, v"): ((8192, 4096, 4096), 5376, False),
    ("31B", "o"): ((5376,), 8192, False),
    ("31B", "gate, up"): ((21504, 21504), 5376, True),
    ("31B", "down"): ((5376,), 21504, False),
}
VECTOR = [VectorPlan(2, 512, 3, 4), VectorPlan(2, 512, 4, 4), VectorPlan(1, 1024, 2, 4), VectorPlan(4, 256, 6, 2)]
VECTOR += [VectorPlan(4, 256, 4, 2), VectorPlan(1, 512, 3, 4), VectorPlan(2, 256, 11, 4), VectorPlan(4, 256, 11, 4)]
DOT = [(64, 128, 1, 4, 4), (16, 128, 4, 4, 4), (16, 64, 4, 4, 4), (16, 64, 4, 4, 6), (16, 256, 1, 1, 4), (64, 64, 1, 4, 6)]
DOT_OF_MANY = [(64, 128, 1, 4, 4), (16, 128, 4, 4, 4), (64, 64, 1, 4, 6)]  # above 16 rows
ROTATE_BYTES = 300e6
PLE = {"E2B": (1536, 256), "E4B": (2560, 256)}  # hidden, per-layer input
PLE_DOT = [(8, 16, 8, 8, 4, 4), (8, 8, 4, 8, 4, 2), (16, 16, 8, 16, 2, 4), (16, 8, 8, 16, 2, 2)]


def plans_for(rows: int, gated: bool) -> list[VectorPlan | DotPlan]:
    vector = [plan for plan in VECTOR if plan.outputs > 1 or not gated] if rows <= 4 else []
    return [*vector, *(DotPlan(16 if rows <= 16 else 32, *plan) for plan in (DOT if rows <= 16 else DOT_OF_MANY) if rows > 1)]


def hopper_plans(rows: int, counts: tuple[int, ...], width: int, gated: bool) -> list[HopperProductsPlan]:
    """Tiles of all sizes, whole or shared by as many programs as there are processors for. Steps of other numbers of columns
    were slower in a first run."""
    plans, tokens = [], 64 if rows <= 64 else 128
    for outputs in (32, 64, 128, 256) if gated else (16, 32, 64, 128):
        block = 256 if outputs == 16 and rows <= 64 else 128 if outputs <= 32 or rows <= 64 else 64
        of_tile = outputs // 2 if gated else outputs
        tiles = -(-counts[0] // of_tile) if gated else sum(-(-count // of_tile) for count in counts)
        splits = min(PROCESSORS // tiles, width // (2 * block), 12)
        if 24 <= tiles <= (PROCESSORS if outputs < 64 else 20 * PROCESSORS):
            plans.append(HopperProductsPlan(tokens, outputs, 1, block))
        if splits > 1 and outputs >= 64 or splits == 2:
            plans.append(HopperProductsPlan(tokens, outputs, splits, block))
    return plans


def by_cublas(x: Tensor, *weights: Tensor, gated: bool) -> Any:
    products = [F.linear(x, weight) for weight in weights]
    return launch_geglu(*products) if gated else products


def by_plan(x: Tensor, *weights: Tensor, gated: bool, plan: VectorPlan | DotPlan | HopperProductsPlan) -> list[Tensor]:
    return launch_products(x, weights, gated, plan)


def measure(token_counts: list[int]) -> list[dict[str, Any]]:
    found = []
    for (model, product), (counts, width, gated) in PRODUCTS.items():
        copies = max(2, min(40, int(ROTATE_BYTES // (2 * sum(counts) * width))))
        sets = [
            [(0.02 * torch.randn(n, width, device="cuda", dtype=torch.float32)).bfloat16() for n in counts]
            for _ in range(copies)
        ]
        for rows in token_counts:
            x = torch.randn(1, rows, width, device="cuda").bfloat16()
            plans = plans_for(rows, gated)
            functions: list[Callable[..., Any]] = [
                partial(by_cublas, gated=gated),
                *(partial(by_plan, gated=gated, plan=plan) for plan in plans),
            ]
            cublas, *times = microseconds(functions, [(x, *weights) for weights in sets], repeats=7)
            row = {"model": model, "product": product, "matrices": counts, "width": width, "gated": gated, "rows": rows}
            row["cublas_us"] = round(cublas, 3)
            row["plans_us"] = {str(list(plan)): round(time, 3) for plan, time in zip(plans, times, strict=True)}
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def behind_norm(x: Tensor, *weights: Tensor, norm: Tensor, then: Callable[..., Any]) -> Any:
    return then(rms_norm.launch(x, norm, 1e-6), *weights)


def as_one(products: Tensor | list[Tensor]) -> Tensor:
    return torch.cat(list(products), dim=-1).float() if isinstance(products, list) else products.float()


def quick_microseconds(functions: list[Callable[..., Any]], arguments: list[tuple[Tensor, ...]]) -> list[float]:
    """As microseconds, for hundreds of functions: torch.cuda.graph gives all free memory back before each capture."""
    graphs, stream, pool = [], torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function(*arguments[0])
            stream.synchronize()
            graphs.append(torch.cuda.CUDAGraph())
            graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")
            for args in arguments:
                function(*args)
            graphs[-1].capture_end()
        times = [[median_seconds(graph.replay, 1) for graph in graphs] for _ in range(10)]
    return [1e6 * statistics.median(series[3:]) / len(arguments) for series in zip(*times, strict=True)]


def measure_hopper(token_counts: list[int], models: list[str], products: list[str] | None) -> list[dict[str, Any]]:
    """As measure, a norm and a product at a time, launched dependently."""
    found = []
    for (model, product), (counts, width, gated) in PRODUCTS.items():
        if model not in models or products and product not in products:
            continue
        copies = max(2, min(24, int(ROTATE_BYTES // (2 * sum(counts) * width))))
        sets = [
            [(0.02 * torch.randn(n, width, device="cuda", dtype=torch.float32)).bfloat16() for n in counts]
            for _ in range(copies)
        ]
        norm = torch.ones(width, device="cuda", dtype=torch.bfloat16)
        for rows in token_counts:
            x = torch.randn(1, rows, width, device="cuda").bfloat16()
            others = product_plan(rows, len(counts), sum(counts), width, gated, 2)
            plans = hopper_plans(rows, counts, width, gated)
            functions: list[Callable[..., Any]] = [partial(by_cublas, gated=gated)]
            functions += [partial(by_plan, gated=gated, plan=plan) for plan in [*([others] if others else []), *plans]]
            timed: list[Callable[..., Any]] = [
                partial(behind_norm, norm=norm, then=function) for function in (*functions, lambda x, *_: x)
            ]
            with constants([norm, *(weight for weights in sets for weight in weights)]):
                cublas, *times, alone = quick_microseconds(timed, [(x, *weights) for weights in sets])
            row = {"model": model, "product": product, "matrices": counts, "width": width, "gated": gated, "rows": rows}
            row |= {"cublas_us": round(cublas, 3), "norm_us": round(alone, 3)}
            row["others_us"] = round(times.pop(0), 3) if others else None
            row["plans_us"] = {str(list(plan)): round(time, 3) for plan, time in zip(plans, times, strict=True)}
            wanted, *results = [as_one(function(x, *sets[0])) for function in functions]
            row["difference"] = max((result - wanted).abs().max().item() for result in results) / wanted.abs().max().item()
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def ple_alone(plan: PlePlan | PleDotPlan) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its gate, and its projection of some gated inputs."""
    dots = isinstance(plan, PleDotPlan)
    gate, projection = (launch_gate_dot, launch_projection_dot) if dots else (launch_gate, launch_projection)
    return (
        lambda x, inputs, first, _: gate(x, inputs, first, plan),  # type: ignore[arg-type]
        lambda _, inputs, __, second: projection(inputs, second, plan),  # type: ignore[arg-type]
    )


def measure_ple(token_counts: list[int]) -> list[dict[str, Any]]:
    found = []
    for model, (width, p) in PLE.items():
        copies = int(ROTATE_BYTES // (12 * width * p))
        layers = [
            tuple((0.02 * torch.randn(*size, device="cuda")).bfloat16() for size in ((p, width), (width, p)))
            for _ in range(copies)
        ]
        for rows in token_counts:
            x, inputs = (torch.randn(rows, n, device="cuda").bfloat16() for n in (width, p))
            without = ple_plan(rows, width, p, 4)  # as for fp32
            plans: list[PlePlan | PleDotPlan] = [without] if isinstance(without, PlePlan) else []
            plans += [PleDotPlan(*plan) for plan in PLE_DOT]
            functions: list[Callable[..., Any]] = [partial(launch_planned, plan=plan) for plan in (None, *plans)]
            wanted, *results = (function(x, inputs, *layers[0]).float() for function in functions)
            functions += [lambda x, _, first, __: F.linear(x, first), lambda _, inputs, __, second: F.linear(inputs, second)]
            functions += [alone for plan in plans for alone in ple_alone(plan)]
            with constants([weight for layer in layers for weight in layer]):
                times = [round(t, 3) for t in quick_microseconds(functions, [(x, inputs, *layer) for layer in layers])]
            names = ["cublas", *(f"{'dot' if isinstance(plan, PleDotPlan) else 'vector'} {list(plan)}" for plan in plans)]
            alone = times[len(names) :]
            row = {"model": model, "rows": rows, "us": dict(zip(names, times, strict=False))}
            row["gate_us"], row["projection_us"] = (dict(zip(names, alone[i::2], strict=True)) for i in range(2))
            row["difference"] = max(((result - wanted).abs().max() / wanted.abs().max()).item() for result in results)
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def chosen(row: dict[str, Any]) -> float:
    """What product_plan's choice took; KeyError if it was not measured."""
    plan = product_plan(row["rows"], len(row["matrices"]), sum(row["matrices"]), row["width"], row["gated"], 2)
    return row["cublas_us"] if plan is None else row["plans_us"][str(list(plan))]


def chosen_on_hopper(row: dict[str, Any]) -> float:
    """The same of a row of measure_hopper, with the norm in front; KeyError if that plan was not measured."""
    plan = product_plan(row["rows"], len(row["matrices"]), sum(row["matrices"]), row["width"], row["gated"], 2, hopper=True)
    if isinstance(plan, HopperProductsPlan):
        return row["plans_us"][str(list(plan))]
    return row["cublas_us"] if plan is None else row["others_us"]


def markdown(rows: list[dict[str, Any]], chosen: Callable[[dict[str, Any]], float] = chosen) -> str:
    """The tables of docs/fusions.md: `ours / cuBLAS = gain`, or cuBLAS's time where it is left to it."""
    counts = sorted({row["rows"] for row in rows})
    table: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        ours, cublas = (time - row.get("norm_us", 0) for time in (chosen(row), row["cublas_us"]))
        cell = f"{ours:.2f} / {cublas:.2f} = **{cublas / ours:.2f}**" if ours != cublas else f"{cublas:.2f}, cuBLAS"
        table.setdefault((row["model"], row["product"]), {})[row["rows"]] = cell
    lines = ["| model | product | " + " | ".join(map(str, counts)) + " |", "|---" * (2 + len(counts)) + "|"]
    lines += [f"| {m} | {p} | " + " | ".join(cells.get(n, "") for n in counts) + " |" for (m, p), cells in table.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], help="default: 1,2,3,4,8,32")
    parser.add_argument("--hopper", action="store_true", help="time Hopper's kernel, behind a norm")
    parser.add_argument("--products", type=lambda text: text.split(";"), help="separated by ;")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["E2B", "E4B", "26B-A4B", "31B"])
    parser.add_argument("--ple", action="store_true", help="the products of a PLE tail")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--table", type=Path, help="print this JSON as Markdown; measures nothing")
    options = parser.parse_args()
    if options.table:
        print(markdown(json.loads(options.table.read_text())["rows"]))
        return
    with torch.no_grad():
        if options.hopper:
            rows = measure_hopper(options.rows or [4, 16, 30, 64, 80, 128], options.models, options.products)
        elif options.ple:
            rows = measure_ple(options.rows or [3, 4, 8, 16, 30, 64, 80, 128])
        else:
            rows = measure(options.rows or [1, 2, 3, 4, 8, 32])
    if options.out:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": __import__("triton").__version__}
        options.out.write_text(json.dumps(about | {"dtype": "bfloat16", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
