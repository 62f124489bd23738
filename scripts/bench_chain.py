"""Time the layers of a decode step as a chain of our ops in one CUDA graph, launched plainly and dependently.

    python scripts/bench_chain.py [--model E2B] [--rows 1,4,16,32,80] [--context 1024] [--out FILE]
    python scripts/bench_chain.py --quick --device cpu          # few layers: does it run?

What a packed step runs between its embeddings and its head, without tracing or Inductor: seconds to start, so it is where a
kernel's launch or plan is tried. For models with per-layer inputs (E2B, E4B). Weights have their real size and are random,
as are keys and values: each request reads `context` of them. Each row says how many microseconds the graph's replay takes,
median, and the least that its bytes could take at this run's copy bandwidth; and in how many of 100 replays any bit of the
result differed from plain launches'.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile import ops
from gemma4_compile.bench.rates import copy_bandwidth, median_seconds
from gemma4_compile.geometry import geometry
from gemma4_compile.graphs.recorder import CudaRecorder
from gemma4_compile.hf.loading import random_model
from gemma4_compile.ops.attention import attention
from gemma4_compile.ops.dependent import constants
from gemma4_compile.ops.fusions.attention_qkv import attention_qkv

PAGE = 64
EPS = 1e-6


class Chain:
    """One decode step of so many requests through a model's layers."""

    def __init__(self, model: Any, rows: int, context: int):
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
        hidden = self.hidden
        normed = ops.rms_norm(hidden, self.layers[0].input_layernorm.weight, EPS)
        for index, (layer, shape) in enumerate(zip(self.layers, self.shapes, strict=True)):
            mixed = ops.linear(self._attend(index, layer.self_attn, shape, normed).flatten(2), layer.self_attn.o_proj.weight)
            before, behind = layer.post_attention_layernorm.weight, layer.pre_feedforward_layernorm.weight
            hidden, normed = ops.post_attention_norm(mixed, hidden, before, behind, EPS)
            inner = ops.gate_up(normed, layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
            inner = ops.linear(inner, layer.mlp.down_proj.weight)
            hidden = ops.feed_forward_tail(inner, hidden, layer.post_feedforward_layernorm.weight, None, EPS)
            following = self.layers[index + 1].input_layernorm.weight if index + 1 < len(self.layers) else self.final
            hidden, normed = ops.ple_tail_norm(
                hidden, self.inputs[:, :, index], layer.per_layer_input_gate.weight, layer.per_layer_projection.weight,
                layer.post_per_layer_input_norm.weight, layer.layer_scalar, following, EPS,
            )  # fmt: skip
        return [hidden, normed]

    def _attend(self, index: int, module: Any, shape: Any, normed: Tensor) -> Tensor:
        rest = *self.kv[index], self.slots, self.table, self.positions, self.starts, index, self.windows[index], 1.0
        cos, sin = self.angles[shape.head_dim]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (-1, shape.head_dim))

        if shape.shares_kv:
            q = heads(ops.linear(normed, module.q_proj.weight))
            return attention(ops.q_norm_rope(q, module.q_norm.weight, cos, sin, EPS), None, None, *rest)
        q, k, v = ops.linear_triple(normed, module.q_proj.weight, module.k_proj.weight, module.v_proj.weight)
        return attention_qkv(heads(q), heads(k), heads(v), module.q_norm.weight, module.k_norm.weight, cos, sin, EPS, *rest)


def recorded(chain: Chain, weights: list[Tensor] | None) -> tuple[Callable[[], None], list[Tensor]]:
    """The chain's graph and its results; dependent launches if the weights are given."""
    recorder = CudaRecorder(chain.hidden.device)
    with nullcontext() if weights is None else constants(weights):
        recorder.warm_up(chain)
        return recorder.record(chain)


def measure(model: Any, rows: int, context: int, bandwidth: float) -> dict[str, Any]:
    chain = Chain(model, rows, context)
    row: dict[str, Any] = {"rows": rows, "context": context, "floor_us": round(1e6 * chain.bytes / bandwidth, 1)}
    wanted: list[Tensor] = []
    for name, weights in (("plain", None), ("dependent", list(model.parameters()) + list(model.buffers()))):
        replay, results = recorded(chain, weights)
        row[f"{name}_us"] = round(1e6 * median_seconds(replay, 50), 1)
        replay()
        wanted = wanted or [result.clone() for result in results]
        differing = 0
        for _ in range(100):
            for result in results:
                result.zero_()
            replay()
            differing += not all(map(torch.equal, results, wanted))
        row[f"{name}_differing"] = differing
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="E2B")
    parser.add_argument("--rows", type=lambda s: [int(n) for n in s.split(",")], default=[1, 4, 16, 32, 80])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = random_model(args.model, 6 if args.quick else None, args.device, vocab_size=512)
    if args.device == "cpu":
        hidden, normed = Chain(model, 2, 64)()
        print("runs:", hidden.shape, normed.shape)
        return
    bandwidth = copy_bandwidth()
    rows = []
    for count in args.rows:
        rows.append(measure(model, count, args.context, bandwidth))
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        about = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bandwidth_tb": bandwidth / 1e12}
        args.out.write_text(json.dumps(about | {"model": args.model, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
