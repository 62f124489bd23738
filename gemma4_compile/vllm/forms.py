"""What vLLM writes otherwise than Hugging Face: further forms of the fusions, and the pipeline over vLLM's graph.

Rows are flat, gate and up are one matrix, as are Q, K and V, the router scales by the root first, and a rotation is written
out, by cosines that each layer looks up.
"""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace as changed
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from gemma4_compile.passes import Fusion, Pass, PatternPass, Record
from gemma4_compile.passes.lower import Lower
from gemma4_compile.passes.raise_ops import RAISE_GEGLU
from gemma4_compile.patterns import (
    feed_forward_tail,
    gate_up,
    linear,
    ple_inputs,
    ple_tail,
    post_attention_norms,
    qkv_norm_rope,
)
from gemma4_compile.patterns.linear import matrices
from gemma4_compile.patterns.rewrite import Rewrite, all_guards, one_element, same_dtype, same_shape, vectors_of_last_dim
from gemma4_compile.patterns.template import Match, value_of

from .constants import DropNothings, FoldConstants
from .norms import OrderSums

ops = torch.ops.gemma4
Norms = tuple[Pass, Pass]


def rotated(x: Tensor, cos: Tensor, sin: Tensor, rows: Any, dim: int) -> Tensor:
    """vLLM's rotary embedding in plain operations: x [T, H * D], cos and sin [T, D / 2]; all of a head turns."""
    shape = x.size()
    heads = x.view(rows, -1, dim)
    turned, rest = heads[..., :dim], heads[..., dim:]
    cosine, sine = cos.unsqueeze(-2), sin.unsqueeze(-2)
    low, high = torch.chunk(turned, 2, dim=-1)
    turned = torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)
    return torch.cat((turned, rest), dim=-1).reshape(shape)


def angles(half: Tensor) -> Tensor:
    """[1, T, D] of [T, D / 2]: as the ops, and Hugging Face, have them."""
    return torch.cat((half, half), dim=-1).unsqueeze(0)


def search_qkv(
    qkv: Tensor, sizes: Any, q_heads: Any, kv_heads: Any, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, rows: Any, dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parts = qkv.split(sizes, dim=-1)
    q = ops.rms_norm(parts[0].unflatten(-1, q_heads), q_weight, eps).flatten(-2, -1)
    k = ops.rms_norm(parts[1].unflatten(-1, kv_heads), k_weight, eps).flatten(-2, -1)
    v = ops.rms_norm_noscale(parts[2].unflatten(-1, kv_heads), eps).flatten(-2, -1)
    return rotated(q, cos, sin, rows, dim), rotated(k, cos, sin, rows, dim), v


def replace_qkv(
    qkv: Tensor, sizes: Any, q_heads: Any, kv_heads: Any, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, rows: Any, dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parts = qkv.split(sizes, dim=-1)
    q = parts[0].unflatten(-1, q_heads).unsqueeze(0)
    k = parts[1].unflatten(-1, kv_heads).unsqueeze(0)
    v = parts[2].unflatten(-1, kv_heads).unsqueeze(0)
    q, k, v = ops.qkv_norm_rope(q, k, v, q_weight, k_weight, angles(cos), angles(sin), eps)
    return q.squeeze(0).flatten(-2, -1), k.squeeze(0).flatten(-2, -1), v.squeeze(0).flatten(-2, -1)


def search_q(q: Tensor, q_heads: Any, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, rows: Any, dim: int) -> Tensor:
    return rotated(ops.rms_norm(q.unflatten(-1, q_heads), q_weight, eps).flatten(-2, -1), cos, sin, rows, dim)


def replace_q(q: Tensor, q_heads: Any, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, rows: Any, dim: int) -> Tensor:
    q = ops.q_norm_rope(q.unflatten(-1, q_heads).unsqueeze(0), q_weight, angles(cos), angles(sin), eps)
    return q.squeeze(0).flatten(-2, -1)


def search_norms(
    x: Tensor, residual: Tensor, weight: Tensor, feed_forward_weight: Tensor, router_scale: Tensor, router_root: float,
    expert_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    hidden = residual + ops.rms_norm(x, weight, eps)
    router_in = ops.rms_norm_noscale(hidden, eps) * router_root * router_scale
    return hidden, ops.rms_norm(hidden, feed_forward_weight, eps), router_in, ops.rms_norm(hidden, expert_weight, eps)


def replace_norms(
    x: Tensor, residual: Tensor, weight: Tensor, feed_forward_weight: Tensor, router_scale: Tensor, router_root: float,
    expert_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    hidden, feed_forward_in, router_in, expert_in = ops.post_attention_norms(
        x, residual, weight, feed_forward_weight, router_scale, router_root, expert_weight, eps
    )
    return hidden, feed_forward_in, router_in, expert_in


def search_ple_gather(
    input_ids: Tensor, table: Tensor, embed_scale: Tensor, projection: Tensor, norm_weight: Tensor, projection_scale: float,
    combine_scale: float, eps: float, rows: Any, layers: Any, width: Any,
) -> Tensor:  # fmt: skip
    token_inputs = (F.embedding(input_ids, table) * embed_scale).reshape(rows, layers, width)
    projected = (projection * projection_scale).reshape(rows, layers, width)
    return (token_inputs + ops.rms_norm(projected, norm_weight, eps)) * combine_scale


def replace_ple_gather(
    input_ids: Tensor, table: Tensor, embed_scale: Tensor, projection: Tensor, norm_weight: Tensor, projection_scale: float,
    combine_scale: float, eps: float, rows: Any, layers: Any, width: Any,
) -> Tensor:  # fmt: skip
    return ops.ple_inputs(input_ids, table, embed_scale, projection, norm_weight, projection_scale, combine_scale, eps)


def search_ple(
    token_inputs: Tensor, projection: Tensor, norm_weight: Tensor, projection_scale: float, combine_scale: float, eps: float,
    rows: Any, layers: Any, width: Any,
) -> Tensor:  # fmt: skip
    projected = (projection * projection_scale).reshape(rows, layers, width)
    return (token_inputs + ops.rms_norm(projected, norm_weight, eps)) * combine_scale


def replace_ple(
    token_inputs: Tensor, projection: Tensor, norm_weight: Tensor, projection_scale: float, combine_scale: float, eps: float,
    rows: Any, layers: Any, width: Any,
) -> Tensor:  # fmt: skip
    return ops.ple_combine(token_inputs, projection, norm_weight, projection_scale, combine_scale, eps)


def search_gate_up(x: Tensor, weight: Tensor, width: int) -> Tensor:
    both = F.linear(x, weight, None)
    return ops.geglu(both[..., :width], both[..., width:])


def replace_gate_up(x: Tensor, weight: Tensor, width: int) -> Tensor:
    return ops.gate_up(x, weight[:width], weight[width:])


def halves(match: Match) -> str | None:
    """Gate and up are as large as each other."""
    weight, width = value_of(match.binding["weight"]), match.binding["width"]
    return None if weight is not None and weight.shape[0] == 2 * width else f"weight must be [2 * {width}, K]"


def rotary_shapes(match: Match) -> str | None:
    """cos and sin are [T, D / 2] of heads of D, and turn all of it."""
    cos, sin, weight = (value_of(match.binding[name]) for name in ("cos", "sin", "q_weight"))
    dim = match.binding["dim"]
    assert cos is not None and sin is not None and weight is not None
    fits = cos.dim() == sin.dim() == 2 and 2 * cos.shape[1] == 2 * sin.shape[1] == dim == weight.shape[0]
    return None if fits else f"cos must be [T, {dim} / 2]"


def of_the_tables_dtype(match: Match) -> str | None:
    """The op rounds the scale to the table's dtype, which vLLM does not."""
    table, scale = value_of(match.binding["table"]), value_of(match.binding["embed_scale"])
    assert table is not None and scale is not None
    return None if table.dtype == scale.dtype else f"embed_scale is {scale.dtype}, the table is {table.dtype}"


@cache
def _qkv() -> tuple[Rewrite, ...]:
    def inputs(alone: bool) -> dict[str, Any]:
        rotary = {name: torch.randn(6, 4) for name in ("cos", "sin")} | {"eps": 1e-6, "rows": 6, "dim": 8}
        common = rotary | {"q_weight": torch.rand(8) + 0.5, "q_heads": (4, 8)}
        if alone:
            return common | {"q": torch.randn(6, 32)}
        return common | {"qkv": torch.randn(6, 64), "sizes": [32, 16, 16], "kv_heads": (2, 8), "k_weight": torch.rand(8) + 0.5}

    both = all_guards(same_dtype("qkv", "q_weight", "k_weight", "cos", "sin"), rotary_shapes)
    alone = all_guards(same_dtype("q", "q_weight", "cos", "sin"), rotary_shapes)
    return (
        Rewrite("qkv_norm_rope", search_qkv, replace_qkv, lambda: inputs(False), both),
        Rewrite("q_norm_rope", search_q, replace_q, lambda: inputs(True), alone),  # last: the q of the other looks like this
    )


@cache
def _norms() -> tuple[Rewrite, ...]:
    vectors = ("weight", "feed_forward_weight", "router_scale", "expert_weight")
    guard = all_guards(same_dtype("x", "residual", *vectors), same_shape("x", "residual"), vectors_of_last_dim("x", *vectors))

    def inputs() -> dict[str, Any]:
        rows = {name: torch.randn(5, 16) for name in ("x", "residual")}
        return rows | {name: torch.rand(16) + 0.5 for name in vectors} | {"router_root": 0.25, "eps": 1e-6}

    return (Rewrite("post_attention_norms", search_norms, replace_norms, inputs, guard), *post_attention_norms.rewrites()[1:])


@cache
def _ple_inputs() -> tuple[Rewrite, ...]:
    gather = all_guards(same_dtype("table", "projection", "norm_weight"), one_element("embed_scale"), of_the_tables_dtype)
    combine = all_guards(
        same_dtype("token_inputs", "projection", "norm_weight"),
        same_shape("token_inputs", "reshape"),
        vectors_of_last_dim("token_inputs", "norm_weight"),
    )

    def inputs(gathered: bool) -> dict[str, Any]:
        common = {
            "projection": torch.randn(6, 40), "norm_weight": torch.rand(8) + 0.5, "projection_scale": 0.25,
            "combine_scale": 2.0**-0.5, "eps": 1e-6, "rows": 6, "layers": 5, "width": 8,
        }  # fmt: skip
        if not gathered:
            return {"token_inputs": torch.randn(6, 5, 8)} | common
        return {
            "input_ids": torch.randint(11, (6,)),
            "table": torch.randn(11, 40),
            "embed_scale": torch.tensor(8**0.5),
        } | common

    return (
        Rewrite("ple_inputs", search_ple_gather, replace_ple_gather, lambda: inputs(True), gather),
        Rewrite("ple_combine", search_ple, replace_ple, lambda: inputs(False), combine),
    )


@cache
def _gate_up() -> tuple[Rewrite, ...]:
    guard = all_guards(same_dtype("x", "weight"), matrices("weight"), halves)

    def inputs() -> dict[str, Any]:
        return {"x": torch.randn(6, 16), "weight": torch.randn(48, 16), "width": 24}

    return (Rewrite("gate_up", search_gate_up, replace_gate_up, inputs, guard),)


def _as_vllm(fusion: Fusion, rewrites: Callable[[], Sequence[Rewrite]]) -> Fusion:
    return changed(fusion, rewrites=rewrites)


# In the order in which they are looked for: that of passes/__init__.py, for its reasons.
FUSIONS: dict[str, Fusion] = {
    fusion.name: fusion
    for fusion in (
        _as_vllm(qkv_norm_rope.FUSION, _qkv),
        _as_vllm(post_attention_norms.FUSION, _norms),
        _as_vllm(ple_inputs.FUSION, _ple_inputs),
        ple_tail.FUSION,
        feed_forward_tail.FUSION,
        _as_vllm(gate_up.FUSION, _gate_up),
        linear.FUSION,
    )
}
# Quantized models have their own products, and their own fusions around those.
PRODUCTS = frozenset({gate_up.FUSION.name, linear.FUSION.name})
ROTARY = frozenset({qkv_norm_rope.FUSION.name})


class ShareAngles:
    """The cosines and sines that the rotations of many layers read, computed once.

    vLLM's layers of a kind look them up in one table, each for itself: cheap within a kernel, a kernel more beside an op."""

    name = "vllm_angles"

    def __call__(self, graph: Graph, record: Record) -> None:
        first: dict[str, Node] = {}
        for node in graph.nodes:
            if node.target in (ops.qkv_norm_rope, ops.q_norm_rope):
                for angle in node.args[-3:-1]:
                    assert isinstance(angle, Node)
                    if (same := first.setdefault(_made_of(angle), angle)) is not angle:
                        node.replace_input_with(angle, same)
        for node in reversed(graph.nodes):
            if not node.users and _is_step(node):
                graph.erase_node(node)


def _is_step(node: Node) -> bool:
    """Of a lookup: pure, and cheap as part of another kernel."""
    if node.op == "call_method":
        return node.target in ("flatten", "index_select", "chunk", "unsqueeze")
    return node.op == "call_function" and node.target in (torch.cat, operator.getitem)


def _made_of(node: Node) -> str:
    """What a node computes of the graph's inputs, as text; of other operations than a lookup's, its own name."""
    if not _is_step(node):
        return node.name
    arguments = torch.fx.map_arg((node.args, node.kwargs), _made_of)
    return f"{node.target}{arguments}"


def pipeline(
    enabled: Collection[str], numbers: Mapping[str, float], norms: Norms, given: Sequence[Any] = ()
) -> tuple[Pass, ...]:
    """raise -> fuse -> lower over vLLM's graph.

    numbers, given   of FoldConstants
    norms            the step that raises vLLM's norms, and the one that lowers what is left of them"""
    raised, lowered = norms
    return (
        raised,  # first: vLLM's own implementation has casts that change nothing
        DropNothings(),
        FoldConstants(numbers, given),
        OrderSums(),
        RAISE_GEGLU,
        *(PatternPass(fusion.name, fusion.rewrites) for fusion in FUSIONS.values() if fusion.name in enabled),
        ShareAngles(),
        OrderSums(back=True),
        lowered,
        Lower(),
    )
