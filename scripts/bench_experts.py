"""Time the routed experts of 26B-A4B by each plan against Hugging Face's grouped_mm, compiled by Inductor.

    python scripts/bench_experts.py [--tokens 1,8,80] [--out FILE]
    python scripts/bench_experts.py --table benchmarks/experts-h100.json
    TRITON_INTERPRET=1 python scripts/bench_experts.py --small        the script itself, at tiny sizes on the CPU

For each token count first the error against fp64, ours and Hugging Face's; then medians over replays of CUDA graphs, which
alternate, in microseconds a layer. A graph goes through the weights of several layers and through other routes in each: none
of it stays in the L2. Plans are of two products, up and down: each is varied with the other as it is, then the best of both
are tried together. The floor is the larger of two: the bytes of the experts that the routes name, over the copy bandwidth of
the same run, and the FLOPs over the rate of a large bf16 product. `experts_plan` is made of these numbers, and
tests/ops/test_measured.py holds it to them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from gemma4_compile.ops.fusions.experts import run_plan
from gemma4_compile.ops.gluon import is_hopper
from gemma4_compile.ops.library import INTERPRETED
from gemma4_compile.ops.plans import HopperTilesPlan, PairPlan, TiledPlan, TilePlan, VectorPlan, experts_plan

SMALL = "--small" in sys.argv
Plan = PairPlan | TiledPlan | HopperTilesPlan | None
HIDDEN, EXPERTS, TOP_K, INNER, LAYERS = (24, 6, 2, 16, 2) if SMALL else (2816, 128, 8, 704, 4)
TOKENS = [1, 5] if SMALL else [1, 2, 4, 8, 16, 32, 64, 80, 128, 256, 1024, 8192]
DTYPE, DEVICE = (torch.float32, "cpu") if SMALL else (torch.bfloat16, "cuda")  # the interpreter's dot is wrong for bf16
PAIR_UP = [(4, 256, 11, 4), (2, 256, 11, 2), (4, 256, 11, 2), (2, 512, 6, 4), (4, 256, 6, 4), (8, 256, 4, 4), (8, 128, 11, 4)]
PAIR_DOWN = [(2, 64, 11, 4), (1, 64, 11, 2), (1, 64, 11, 1), (4, 64, 11, 4), (1, 128, 6, 4), (2, 128, 6, 4), (1, 256, 3, 4)]
FEW_UP = [(64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 6), (128, 64, 4, 4), (128, 128, 8, 3), (64, 256, 4, 3), (128, 64, 4, 6)]
FEW_DOWN = [(64, 64, 4, 4), (64, 64, 4, 6), (128, 64, 4, 4), (128, 64, 8, 4), (64, 128, 4, 3), (128, 128, 8, 3)]
MANY = [(128, 64, 8, 4), (128, 64, 4, 4), (128, 64, 8, 3), (256, 64, 8, 3), (64, 64, 4, 4)]
if SMALL:
    PAIR_UP, PAIR_DOWN, FEW_UP, FEW_DOWN, MANY = [(4, 16, 2, 1)], [(2, 8, 2, 1)], [(32, 16, 4, 2)], [(16, 16, 4, 2)], []


def choices(tokens: int) -> list[tuple[Callable[..., Any], list[Any], list[Any]]]:
    """(plan of up and down, plans of up, plans of down) for each way that may win at this token count."""
    found: list[tuple[Callable[..., Any], list[Any], list[Any]]] = []
    if tokens <= 8:
        found.append((PairPlan, [VectorPlan(*plan) for plan in PAIR_UP], [VectorPlan(*plan) for plan in PAIR_DOWN]))
    if tokens >= 2:
        for rows in (16, 32, 64, 128):
            spread = tokens * TOP_K / EXPERTS  # pairs of one expert
            if rows == 16 and spread <= 32 or rows > 16 and rows / 4 <= spread <= 8 * rows:
                up, down = (FEW_UP, FEW_DOWN) if rows <= 32 else (MANY, MANY)
                found.append((partial(TiledPlan, rows), [TilePlan(*plan) for plan in up], [TilePlan(*plan) for plan in down]))
    return found


def varied(tokens: int) -> list[Plan]:
    plans: list[Plan] = [experts_plan(tokens, TOP_K, EXPERTS, DTYPE, HIDDEN, INNER)]
    for make, ups, downs in choices(tokens):
        plans += [make(up, downs[0]) for up in ups] + [make(ups[0], down) for down in downs[1:]]
    if tokens >= 64 and not SMALL:
        plans += [None, HopperTilesPlan()] if is_hopper(torch.device(DEVICE, 0)) else [None]
    return list(dict.fromkeys(plans))


def name(plan: Plan) -> str:
    if plan is None or isinstance(plan, HopperTilesPlan):
        return "vendor" if plan is None else "hopper"
    way = f"tiles of {plan.rows}" if isinstance(plan, TiledPlan) else "pairs"
    return f"{way}, up {list(plan.up)}, down {list(plan.down)}"


def matrices() -> tuple[Tensor, Tensor]:
    """The weights of a layer."""
    shapes = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    gate_up, down = (torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_(std=shape[-1] ** -0.5) for shape in shapes)
    return gate_up, down


def routed(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """States, and routes to distinct experts."""
    x = torch.randn(tokens, HIDDEN, device=DEVICE).to(DTYPE)
    indices = torch.rand(tokens, EXPERTS, device=DEVICE).argsort(-1)[:, :TOP_K].contiguous()
    return x, indices, torch.rand(tokens, TOP_K, device=DEVICE).softmax(-1)


def hugging_face() -> Callable[..., Tensor]:
    """Gemma4TextExperts with grouped_mm, as a function of its inputs and weights."""
    config = Gemma4TextConfig(hidden_size=HIDDEN, num_experts=EXPERTS, moe_intermediate_size=INNER, enable_moe_block=True)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Gemma4TextExperts(config)

    def forward(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(module, parameters, (x, indices, weights))

    return forward


def exact(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """In fp64, an expert at a time."""
    out = x.new_zeros(x.shape, dtype=torch.float64)
    for expert in indices.unique().tolist():
        token, place = (indices == expert).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ gate_up[expert].double().T).chunk(2, dim=-1)
        product = (F.gelu(gate, approximate="tanh") * up) @ down[expert].double().T
        out.index_add_(0, token, product * weights[token, place, None].double())
    return out


def errors(plans: list[Plan], plain: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> dict[str, float]:
    """Largest error against fp64, of Hugging Face and of each plan, over a few hundred of the tokens."""
    x, indices, weights, *layer = arguments
    some = slice(None, None, max(1, x.shape[0] // 256))
    wanted = exact(x[some], indices[some], weights[some], *layer)

    def largest(result: Tensor) -> float:
        return (result[some].double() - wanted).abs().max().item()

    return {"Hugging Face": largest(plain(*arguments))} | {name(p): largest(run_plan(p, *arguments)) for p in plans}


def microseconds(functions: list[Callable[..., Any]], arguments: list[tuple], repeats: int = 9) -> list[float]:
    if not SMALL:
        from scripts.bench_ops import microseconds as of_graphs

        return of_graphs(functions, arguments, repeats)
    times = []
    for function in functions:
        begin = time.perf_counter()
        for each in arguments:
            function(*each)
        times.append((time.perf_counter() - begin) * 1e6 / len(arguments))
    return times


def measure(
    tokens: int, layers: list[tuple[Tensor, Tensor]], working: list[Plan], rates: tuple[float, float]
) -> dict[str, Any]:
    """A row of the result: times and errors of all plans, and of grouped_mm."""
    plain = hugging_face()
    torch._dynamo.reset()
    compiled = plain if SMALL else torch.compile(plain, dynamic=False, fullgraph=True)
    count = len(layers) * (3 if tokens <= 16 else 1)
    sets = [(*routed(tokens), *layers[i % len(layers)]) for i in range(count)]
    plans = [plan for plan in varied(tokens) if plan in working]
    found = errors(plans, plain, sets[0])
    for plan in plans:
        if found[name(plan)] > 1.5 * found["Hugging Face"] + 1e-6:
            print(f"WRONG at {tokens} tokens: {name(plan)} has error {found[name(plan)]:.3g}", file=sys.stderr)

    baseline, *times = microseconds([compiled, *(partial(run_plan, plan) for plan in plans)], sets)
    taken = dict(zip(plans, times, strict=True))
    for make, ups, downs in choices(tokens):  # the best of each product, together
        best = make(
            min((up for up in ups if make(up, downs[0]) in taken), key=lambda up: taken[make(up, downs[0])], default=ups[0]),
            min((d for d in downs if make(ups[0], d) in taken), key=lambda d: taken[make(ups[0], d)], default=downs[0]),
        )
        if best not in taken and make(ups[0], downs[0]) in taken:
            taken[best] = microseconds([partial(run_plan, best)], sets)[0]
            found |= errors([best], plain, sets[0])
    named = statistics.mean(each[1].unique().numel() for each in sets)
    bytes_read, flops = named * 3 * INNER * HIDDEN * DTYPE.itemsize, 6.0 * tokens * TOP_K * INNER * HIDDEN
    return {
        "tokens": tokens,
        "experts": round(named, 1),
        "grouped_mm_us": round(baseline, 2),
        "floor_us": round(max(bytes_read / rates[0], flops / rates[1]) * 1e6, 2),
        "plans_us": {name(plan): round(t, 2) for plan, t in sorted(taken.items(), key=lambda item: item[1])},
        "errors": {key: float(f"{value:.3g}") for key, value in found.items()},
    }


def compiles(plan: Plan, layer: tuple[Tensor, Tensor]) -> bool:
    """Whether a plan fits the GPU; half a second a kernel."""
    try:
        run_plan(plan, *routed(2), *layer)
        if not SMALL:
            torch.cuda.synchronize()
    except Exception as error:  # a plan that does not compile is a result too
        print(f"{name(plan)}: {type(error).__name__} {str(error)[:150]}", file=sys.stderr)
        return False
    return True


def chosen(row: dict[str, Any]) -> float:
    """What experts_plan's choice took; KeyError if it was not measured."""
    return row["plans_us"][name(experts_plan(row["tokens"], TOP_K, EXPERTS, DTYPE, HIDDEN, INNER))]


def table(rows: list[dict[str, Any]]) -> str:
    """For docs/fusions.md."""
    lines = ["| tokens | experts read | ours | grouped_mm | gain | floor | best measured |", "|---" * 7 + "|"]
    for row in rows:
        best = next(iter(row["plans_us"]))
        ours, plain = chosen(row), row["grouped_mm_us"]
        fastest = "ours" if row["plans_us"][best] == ours else f"{row['plans_us'][best]:.1f}: {best}"
        lines.append(
            f"| {row['tokens']} | {row['experts']:.0f} | {ours:.1f} | {plain:.1f} | **{plain / ours:.2f}** | "
            f"{row['floor_us']:.1f} | {fastest} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=TOKENS)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--table", type=Path, help="print this JSON as Markdown; measures nothing")
    parser.add_argument("--small", action="store_true", help="tiny sizes under Triton's interpreter: times mean nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["rows"]))
        return
    if SMALL != INTERPRETED:
        parser.error("--small and TRITON_INTERPRET=1 go together, got one of them; set both or none")
    start = time.perf_counter()
    with torch.no_grad():
        layers = [matrices() for _ in range(LAYERS)]
        tried = dict.fromkeys(plan for tokens in options.tokens for plan in varied(tokens))
        working = [plan for plan in tried if compiles(plan, layers[0])]
        print(f"{len(working)} plans compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        rates = (1e9, 1e9) if SMALL else _rates()
        rows = []
        for tokens in options.tokens:
            rows.append(measure(tokens, layers, working, rates))
            print(f"{tokens} tokens after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    if options.out:
        about = {} if SMALL else {"gpu": torch.cuda.get_device_name(), "triton": __import__("triton").__version__}
        about |= {"torch": torch.__version__, "dtype": str(DTYPE).removeprefix("torch.")}
        about |= {"copy_bandwidth_TB_per_s": round(rates[0] / 1e12, 3), "product_TFLOP_per_s": round(rates[1] / 1e12)}
        options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def _rates() -> tuple[float, float]:
    from gemma4_compile.bench.rates import copy_bandwidth, product_rate

    return copy_bandwidth(), product_rate()


if __name__ == "__main__":
    main()
