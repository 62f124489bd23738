"""vLLM's norm ops <-> the vocabulary that the fusions are written in.

`RaiseNorms` makes gemma4::rms_norm of vLLM's, and of those with a residual a sum and norms; what no fusion took `LowerNorms`
makes vLLM's op again, so that vLLM's own passes see what they would have seen. Norms that those are about to take stay.

vLLM's ops, by name, as this file needs no vLLM:
    rms_norm(x, weight?, epsilon, variance_size?)
    fused_add_rms_norm(x, residual, weight?, epsilon, variance_size?) -> (norm of the sum, sum)
    rms_norm_add_rms_norm(x, residual, weight?, weight of the second?, epsilon) -> the same of rms_norm(x)
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from gemma4_compile.passes.base import Record, evaluate, fake_mode_of, inherit
from gemma4_compile.patterns.template import value_of

_OPS = torch.ops.gemma4
_NORMS = (_OPS.rms_norm, _OPS.rms_norm_noscale)
# On a norm: which op of vLLM it came from. On a sum: that its operands were the other way round.
_FROM, _SWAPPED = "vllm_op", "vllm_swapped"
_QUANTIZED = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
_FAR = 16  # nodes between a norm and what it is quantized to; QuantFP8 in plain operations is nine


@dataclass(frozen=True)
class Wanted:
    """The norms that vLLM's own passes are to take: in front of a quantization, behind an all-reduce."""

    before_quantization: bool = False
    behind_all_reduce: bool = False

    def __call__(self, norm: Node) -> bool:
        return self.before_quantization and _is_quantized(norm) or self.behind_all_reduce and _is_reduced(norm)


@dataclass(frozen=True)
class RaiseNorms:
    wanted: Callable[[Node], bool] = Wanted()
    name: str = "vllm_norms"

    def __call__(self, graph: Graph, record: Record) -> None:
        for node in list(graph.nodes):
            expand = _RAISE.get(op_name(node))
            if expand is not None and not self.wanted(node):
                expand(graph, node)


@dataclass(frozen=True)
class LowerNorms:
    name: str = "vllm_lower"

    def __call__(self, graph: Graph, record: Record) -> None:
        for node in list(graph.nodes):
            if not node._erased and node.meta.get(_FROM) and node.target in _NORMS:
                _lower(graph, node)


@dataclass(frozen=True)
class OrderSums:
    """Of vLLM's norm + residual, residual + norm, the order that Hugging Face and the patterns have; `back` undoes it."""

    back: bool = False

    @property
    def name(self) -> str:
        return "vllm_sums_back" if self.back else "vllm_sums"

    def __call__(self, graph: Graph, record: Record) -> None:
        for node in graph.nodes:
            if node.target is not operator.add or len(node.args) != 2:
                continue
            if node.meta.pop(_SWAPPED, False) if self.back else _is_norm_and_residual(node):
                node.args = (node.args[1], node.args[0])
                if not self.back:
                    node.meta[_SWAPPED] = True


def op_name(node: Node) -> str:
    """`rms_norm` of vllm_ir.rms_norm.default; empty for what is no op of vLLM's IR."""
    return _name(node.target) if node.op == "call_function" and str(node.target).startswith("vllm_ir.") else ""


def _name(target: Any) -> str:
    return str(target).split(".")[1]


def _raise_norm(graph: Graph, node: Node) -> None:
    x, weight, eps, size = _arguments(node, 4)
    if size is None and _plain(x, weight):
        node.meta[_FROM] = node.target
        node.target, node.args = _norm(x, weight, eps)
        node.kwargs = {}


def _raise_add_norm(graph: Graph, node: Node) -> None:
    x, residual, weight, eps, size = _arguments(node, 5)
    if size is None and _plain(x, weight) and _plain(residual, None):
        with graph.inserting_before(node):
            total = graph.call_function(operator.add, (residual, x))
            normed = graph.call_function(*_norm(total, weight, eps))
        _replace(graph, node, normed, total)


def _raise_norm_add_norm(graph: Graph, node: Node) -> None:
    x, residual, weight, next_weight, eps = _arguments(node, 5)
    if _plain(x, weight) and _plain(residual, next_weight):
        with graph.inserting_before(node):
            first = graph.call_function(*_norm(x, weight, eps))
            total = graph.call_function(operator.add, (residual, first))
            normed = graph.call_function(*_norm(total, next_weight, eps))
        inherit(first, node)
        evaluate(first, fake_mode_of(node) or fake_mode_of(x))
        _replace(graph, node, normed, total)


_RAISE: dict[str, Callable[[Graph, Node], None]] = {
    "rms_norm": _raise_norm,
    "fused_add_rms_norm": _raise_add_norm,
    "rms_norm_add_rms_norm": _raise_norm_add_norm,
}


def _replace(graph: Graph, node: Node, normed: Node, total: Node) -> None:
    """An op with the outputs (normed, total) by the two."""
    normed.meta[_FROM] = node.target
    for new in (total, normed):
        inherit(new, node)
        evaluate(new, fake_mode_of(node) or fake_mode_of(new))
    for item in list(node.users):
        assert item.target is operator.getitem, "ops with several outputs are read by getitem"
        new = (normed, total)[item.args[1]]  # type: ignore[index]
        new.meta = {**item.meta, **new.meta}
        item.replace_all_uses_with(new)
        graph.erase_node(item)
    graph.erase_node(node)


def _lower(graph: Graph, node: Node) -> None:
    origin = node.meta.pop(_FROM)
    x, *rest = node.args
    weight, eps = (rest[0] if node.target is _OPS.rms_norm else None), rest[-1]
    name = _name(origin)
    if name == "rms_norm":
        node.target, node.args = origin, (x, weight, eps, None)
        return
    assert isinstance(x, Node)
    first = _first_norm(x) if name == "rms_norm_add_rms_norm" else None
    if x.target is not operator.add or name == "rms_norm_add_rms_norm" and first is None:  # a fusion took a part of it
        node.target, node.args = torch.ops.vllm_ir.rms_norm.default, (x, weight, eps, None)
        return
    residual, added = x.args
    packet = getattr(torch.ops.vllm_ir, name)
    if first is not None:
        first_weight = first.args[1] if first.target is _OPS.rms_norm else None
        arguments = (first.args[0], residual, first_weight, weight, eps)
    else:
        arguments = (added, residual, weight, eps, None)
    with graph.inserting_before(x):
        # Not the overload that may write to its arguments: by now an op of ours may read them.
        pair = graph.call_function(packet.default, arguments)
        items = [graph.call_function(operator.getitem, (pair, i)) for i in (0, 1)]
    inherit(pair, node)
    pair.meta["example_value"] = (node.meta.get("example_value"), x.meta.get("example_value"))
    for old, new in ((node, items[0]), (x, items[1])):
        new.meta.update(old.meta)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    if first is not None:
        graph.erase_node(first)


def _first_norm(total: Node) -> Node | None:
    """The norm in a sum `residual + norm` that nothing else reads."""
    first = total.args[1] if total.target is operator.add else None
    return first if isinstance(first, Node) and first.target in _NORMS and len(first.users) == 1 else None


def _norm(x: Node, weight: Node | None, eps: float) -> tuple[Any, tuple[Any, ...]]:
    """Target and arguments of the norm in our vocabulary."""
    return (_OPS.rms_norm_noscale, (x, eps)) if weight is None else (_OPS.rms_norm, (x, weight, eps))


def _plain(x: Any, weight: Any) -> bool:
    """Of one dtype, and the weight as long as a row: what vLLM's op takes beyond that, ours does not."""
    value, other = value_of(x), value_of(weight)
    if value is None or weight is None:
        return value is not None
    return other is not None and other.dtype == value.dtype and other.dim() == 1 and other.shape[0] == value.shape[-1]


def _is_norm_and_residual(node: Node) -> bool:
    first, second = (getattr(argument, "target", None) for argument in node.args)
    return first in _NORMS and isinstance(node.args[1], Node) and second not in _NORMS


def _arguments(node: Node, count: int) -> tuple[Any, ...]:
    """Positional, as vLLM passes them; those at the end may be left out."""
    assert not node.kwargs, "vLLM calls its IR by position"
    return (*node.args, *[None] * (count - len(node.args)))


def _is_reduced(norm: Node) -> bool:
    x = norm.args[0]
    while isinstance(x, Node) and x.op == "call_method" and x.target in ("view", "reshape"):
        x = x.args[0]
    return isinstance(x, Node) and "all_reduce" in str(x.target)


def _is_quantized(norm: Node) -> bool:
    """Whether what is computed of the norm, before the next product or norm, is of a quantized dtype."""
    pending, seen = [(norm, 0)], {norm}
    while pending:
        node, far = pending.pop()
        if node is not norm and ("quant" in str(node.target) or any(t.dtype in _QUANTIZED for t in _tensors(node))):
            return True
        ends = node is not norm and (node.target is torch._C._nn.linear or op_name(node) != "" or node.target in _NORMS)
        if far < _FAR and not ends:
            pending += [(user, far + 1) for user in node.users if user not in seen]
            seen |= set(node.users)
    return False


def _tensors(node: Node) -> Iterator[Tensor]:
    value = node.meta.get("example_value", node.meta.get("val"))
    return (v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Tensor))
