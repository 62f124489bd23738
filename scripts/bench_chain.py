"""Time the layers of a decode step as a chain of our ops in one CUDA graph, launched plainly and dependently.

    python scripts/bench_chain.py [--model E2B] [--rows 1,4,16,32,80] [--context 1024] [--out FILE]
    python scripts/bench_chain.py --normed [VARIANT ...]        # norms inside products, against each other
    python scripts/bench_chain.py --quick --device cpu          # few layers: does it run?

What a packed step runs between its embeddings and its head, without tracing or Inductor: seconds to start, so it is where a
kernel's launch or plan is tried. For models with per-layer inputs (E2B, E4B). Weights have their real size and are random,
as are keys and values: each request reads `context` of them. Each row says how many microseconds the graph's replay takes,
median, and the least that its bytes could take at this run's copy bandwidth; and in how many of 100 replays any bit of the
result differed from plain launches'.

--normed times chains in which norms are inside products, dependently launched, their replays in turn. A variant names what
is, joined by +: gate_up, ple, linear (which needs ple), or apart for nothing; behind a colon the plan of that product, a
VectorPlan: gate_up:16,512,3,4+ple. Without a list: NORMED. Each says its median, its kernels, what it is less than the first,
and how far its result is from the first's, as a share of that one's rms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile import ops
from gemma4_compile.bench.rates import copy_bandwidth, gpu_events, median_seconds
from gemma4_compile.geometry import geometry
from gemma4_compile.graphs.recorder import CudaRecorder
from gemma4_compile.hf.loading import random_model
from gemma4_compile.ops.attention import attention
from gemma4_compile.ops.dependent import constants
from gemma4_compile.ops.fusions.attention_qkv import attention_qkv
from gemma4_compile.ops.plans import VectorPlan

PAGE = 64
EPS = 1e-6
NORMED = ["apart", "gate_up", "ple", "ple+linear", "gate_up+ple+linear"]
NORMED += [f"gate_up:{plan}" for plan in ("4,256,6,2", "4,512,3,4", "16,512,3,4", "16,512,3,8")]
NORMED += [f"ple+linear:{plan}" for plan in ("2,512,3,4", "4,512,3,4", "8,512,3,4")]
PARTS = ("gate_up", "ple", "linear")


class Normed(NamedTuple):
    """Which products norm their input themselves, with the plans of those that are given one."""

    parts: dict[str, VectorPlan | None]

    @classmethod
    def parse(cls, variant: str) -> Normed:
        parts: dict[str, VectorPlan | None] = {}
        for part in variant.split("+") if variant != "apart" else ():
            name, _, plan = part.partition(":")
            if name not in PARTS or plan and name == "ple":
                raise ValueError(f"a variant is apart or of {', '.join(PARTS)}, ple without a plan, got {part!r}")
            parts[name] = VectorPlan(*map(int, plan.split(","))) if plan else None
        if "linear" in parts and "ple" not in parts:
            raise ValueError(f"linear norms what ple leaves, got {variant!r}; write ple+linear")
        return cls(parts)

    def run(self, part: str, op: Any, *args: Any) -> Any:
        plan = self.parts[part]
        return op(*args) if plan is None else op.launch(*args, plan=plan)


class Chain:
    """One decode step of so many requests through a model's layers."""

    def __init__(self, model: Any, rows: int, context: int):
        self.normed = Normed({})
        self.layers, self.config, self.rows = model.model.layers, model.config, rows
        self.shapes = geometry(model.config).layers
        self.final = model.model.norm.weight
        device, dtype = model.device, model.dtype
        pages = -(-context // PAGE)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype)

        self.hidden = normal(1, rows, model.config.hidden_size)
        self.inputs = normal(1, rows, len(self.layers), model.config.hidden_size_per_layer_input)
        dims = {shape.head_dim for shape in self.shapes}
        self.angles = {dim: (normal(1, rows, dim), normal(1, rows, dim)) for dim in dims}
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        for index, shape in enumerate(self.shapes):
            size = rows * pages, PAGE, shape.kv_heads, shape.head_dim
            self.kv[index] = self.kv[shape.kv_from] if shape.shares_kv else (normal(*size), normal(*size))
        self.table = torch.arange(rows * pages, device=device, dtype=torch.int32).view(rows, pages)
        self.slots = self.table[:, -1].long() * PAGE + (context - 1) % PAGE
        self.positions = torch.full((rows,), context - 1, device=device)
        self.starts = torch.arange(rows + 1, device=device, dtype=torch.int32)
        self.windows = [model.config.sliding_window if s.kind == "sliding_attention" else 0 for s in self.shapes]
        reads = [min(context, window or context) for window in self.windows]
        keys = sum(2 * rows * n * s.kv_heads * s.head_dim for n, s in zip(reads, self.shapes, strict=True))
        weights = sum(p.numel() for p in self.layers.parameters())
        self.bytes = dtype.itemsize * (keys + weights)

    def __call__(self) -> list[Tensor]:
        hidden, parts = self.hidden, self.normed.parts
        products: Sequence[Tensor] = self._products(0, ops.rms_norm(hidden, self.layers[0].input_layernorm.weight, EPS))
        for index, layer in enumerate(self.layers):
            mixed = ops.linear(self._attend(index, products).flatten(2), layer.self_attn.o_proj.weight)
            before, behind = layer.post_attention_layernorm.weight, layer.pre_feedforward_layernorm.weight
            gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
            if "gate_up" in parts:
                hidden, inner = self.normed.run("gate_up", ops.norm_gate_up, mixed, hidden, before, behind, gate, up, EPS)
            else:
                hidden, normed = ops.post_attention_norm(mixed, hidden, before, behind, EPS)
                inner = ops.gate_up(normed, gate, up)
            inner = ops.linear(inner, layer.mlp.down_proj.weight)
            ple = self.inputs[:, :, index], layer.per_layer_input_gate.weight, layer.per_layer_projection.weight
            last = index + 1 == len(self.layers)
            following = self.final if last else self.layers[index + 1].input_layernorm.weight
            tail = layer.post_per_layer_input_norm.weight, layer.layer_scalar, following
            if "ple" in parts:
                hidden, projected = ops.norm_ple(inner, hidden, layer.post_feedforward_layernorm.weight, *ple, EPS)
                if "linear" in parts and not last:
                    op, matrices = self._op_of_products(index + 1, normed=True)
                    hidden, *products = self.normed.run("linear", op, projected, hidden, *tail, *matrices, EPS)
                    continue
                hidden, normed = ops.feed_forward_tail_norm(projected, hidden, *tail, EPS)
            else:
                hidden = ops.feed_forward_tail(inner, hidden, layer.post_feedforward_layernorm.weight, None, EPS)
                hidden, normed = ops.ple_tail_norm(hidden, *ple, *tail, EPS)
            if not last:
                products = self._products(index + 1, normed)
        return [hidden, normed]

    def _op_of_products(self, index: int, normed: bool = False) -> tuple[Any, tuple[Tensor, ...]]:
        """The op of a layer's q, or q, k and v, and its matrices."""
        module = self.layers[index].self_attn
        if self.shapes[index].shares_kv:
            return ops.norm_linear if normed else ops.linear, (module.q_proj.weight,)
        matrices = module.q_proj.weight, module.k_proj.weight, module.v_proj.weight
        return ops.norm_linear_triple if normed else ops.linear_triple, matrices

    def _products(self, index: int, normed: Tensor) -> Sequence[Tensor]:
        op, matrices = self._op_of_products(index)
        products = op(normed, *matrices)
        return products if isinstance(products, tuple) else (products,)

    def _attend(self, index: int, products: Sequence[Tensor]) -> Tensor:
        module, shape = self.layers[index].self_attn, self.shapes[index]
        rest = *self.kv[index], self.slots, self.table, self.positions, self.starts, index, self.windows[index], 1.0
        cos, sin = self.angles[shape.head_dim]
        q, *key_and_value = (x.unflatten(2, (-1, shape.head_dim)) for x in products)
        if not key_and_value:
            return attention(ops.q_norm_rope(q, module.q_norm.weight, cos, sin, EPS), None, None, *rest)
        k, v = key_and_value
        return attention_qkv(q, k, v, module.q_norm.weight, module.k_norm.weight, cos, sin, EPS, *rest)


def recorded(chain: Chain, weights: list[Tensor] | None) -> tuple[Callable[[], None], list[Tensor]]:
    """The chain's graph and its results; dependent launches if the weights are given."""
    recorder = CudaRecorder(chain.hidden.device)
    with nullcontext() if weights is None else constants(weights):
        recorder.warm_up(chain)
        return recorder.record(chain)


def differing(replay: Callable[[], None], results: list[Tensor], wanted: list[Tensor]) -> int:
    """Of 100 replays, those with any other bit than wanted."""
    count = 0
    for _ in range(100):
        for result in results:
            result.zero_()
        replay()
        count += not all(map(torch.equal, results, wanted))
    return count


def measure(model: Any, rows: int, context: int, bandwidth: float) -> dict[str, Any]:
    chain = Chain(model, rows, context)
    row: dict[str, Any] = {"rows": rows, "context": context, "floor_us": round(1e6 * chain.bytes / bandwidth, 1)}
    wanted: list[Tensor] = []
    for name, weights in (("plain", None), ("dependent", list(model.parameters()) + list(model.buffers()))):
        replay, results = recorded(chain, weights)
        row[f"{name}_us"] = round(1e6 * median_seconds(replay, 50), 1)
        replay()
        wanted = wanted or [result.clone() for result in results]
        row[f"{name}_differing"] = differing(replay, results, wanted)
    return row


def measure_normed(model: Any, rows: int, context: int, variants: list[str], repeats: int = 60) -> list[dict[str, Any]]:
    """A row for each variant; their replays take turns."""
    chain, weights = Chain(model, rows, context), list(model.parameters()) + list(model.buffers())
    graphs = []
    for variant in variants:
        chain.normed = Normed.parse(variant)
        plain = [result.clone() for result in chain()]
        graphs.append((*recorded(chain, weights), plain))
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(repeats):
        for (replay, *_), series in zip(graphs, times, strict=True):
            series.append(median_seconds(replay, 1))
    found: list[dict[str, Any]] = []
    for variant, (replay, results, plain), series in zip(variants, graphs, times, strict=True):
        first = graphs[0][2][0].float()
        row: dict[str, Any] = {"variant": variant, "rows": rows, "context": context}
        row["us"] = round(1e6 * statistics.median(series), 1)
        row["less_us"] = round((found[0]["us"] if found else row["us"]) - row["us"], 1)
        row["kernels"] = len(gpu_events(replay))
        row["differing"] = differing(replay, results, plain)
        row["distance"] = round(((plain[0].float() - first).square().mean() / first.square().mean()).sqrt().item(), 5)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="E2B")
    parser.add_argument("--rows", type=lambda s: [int(n) for n in s.split(",")], default=[1, 4, 16, 32, 80])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--normed", nargs="*", metavar="VARIANT", help="time norms inside products")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for variant in args.normed or ():
        Normed.parse(variant)  # before the minutes that a model takes
    torch.set_grad_enabled(False)
    model = random_model(args.model, 6 if args.quick else None, args.device, vocab_size=512)
    if args.device == "cpu":
        chain = Chain(model, 2, 64)
        wanted = chain()
        for variant in NORMED[:5]:
            chain.normed = Normed.parse(variant)
            print("runs:", variant, "the same:", all(map(torch.equal, chain(), wanted)))
        return
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for count in args.rows:
        if args.normed is None:
            measured = [measure(model, count, args.context, bandwidth)]
        else:
            measured = measure_normed(model, count, args.context, args.normed or NORMED)
        rows += measured
        print(*map(json.dumps, measured), sep="\n", flush=True)
    if args.out:
        about = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bandwidth_tb": bandwidth / 1e12}
        args.out.write_text(json.dumps(about | {"model": args.model, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
