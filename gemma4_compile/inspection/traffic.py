"""Bytes that a kernel must move: each input read once and each output written once, whatever it really does.

A view moves nothing, an expanded dimension is read once, a gather reads the rows it returns and not the table, a scatter
writes the rows it is given.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .data import Value

# op -> the argument that it gathers from
_GATHERS = {
    "aten.embedding.default": 0,
    "aten.index.Tensor": 0,
    "aten.index_select.default": 0,
    "aten.gather.default": 0,
    "gemma4.ple_inputs.default": 1,
}
# op -> the argument that it writes into its first
_SCATTERS = {
    "aten.index_put.default": 2,
    "aten.index_put_.default": 2,
    "aten.index_copy.default": 3,
    "aten.slice_scatter.default": 1,
    "aten.select_scatter.default": 1,
    "aten.scatter.src": 3,
}
_WRITES_FIRST = {*_SCATTERS, "aten.copy_.default"}
_GROUPED = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}


def size_of(value: Any) -> int:
    """A size as a number: what it is in the inspected call, where it may vary."""
    if isinstance(value, int):
        return value
    hint = getattr(value.node, "hint", None)
    return int(hint) if hint is not None else 1


def value_of(node: Node) -> Tensor | None:
    """The fake tensor of a post-grad node."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def is_view(node: Node) -> bool:
    """Whether a node only looks at memory another way."""
    if node.op != "call_function":
        return False
    if node.target is torch.ops.aten._unsafe_view.default or getattr(node.target, "__name__", "") == "getitem":
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def base_of(node: Node) -> Node:
    """The node whose memory a view looks at; outputs of an op with several stay what they are."""
    while is_view(node) and not _is_output(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def readers(node: Node) -> set[Node]:
    """Who reads a node, directly or through views."""
    found: set[Node] = set()
    for user in node.users:
        found |= readers(user) if is_view(user) else {user}
    return found


def _is_output(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def traffic(
    nodes: Iterable[Node],
    names: dict[str, str],
    passed: set[str] | None = None,
    stored: Callable[[Node], bool] | None = None,
) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    """(inputs, outputs) of a kernel that computes these nodes of the post-grad graph.

    names     placeholder -> what it is to the model
    passed    placeholders that the kernel is given, where that is known: it reads no other
    stored    whether a node has to be written, where that is known; else what anything outside reads is
    """
    inside = {node for node in nodes if not is_view(node) or _is_output(node)}
    for node in list(inside):  # outputs of an op with several come with it
        inside |= {user for user in node.users if _is_output(user)}
    reads: dict[Node, dict[Node, int]] = {}
    writes: dict[Node, int] = {}
    for node in inside:
        target = str(node.target)
        for position, source in _tensor_arguments(node):
            base = base_of(source)
            if base in inside or position == 0 and target in _WRITES_FIRST:
                continue
            if passed is not None and base.op == "placeholder" and base.name not in passed:
                continue
            views = reads.setdefault(base, {})
            gathered = _GATHERS.get(target) == position
            views[source] = _bytes_read(node, target, position, source) + (views.get(source, 0) if gathered else 0)
        if not is_view(node) or _is_output(node):
            moved = _written(node)
            if moved and (_leaves(node, inside) if stored is None or _is_output(node) else stored(node)):
                writes[node] = moved
    inputs = tuple(
        _value(base, names, min(sum(views.values()), _nbytes(base) or sum(views.values()))) for base, views in reads.items()
    )
    return inputs, tuple(_value(node, names, moved) for node, moved in writes.items())


def _tensor_arguments(node: Node) -> list[tuple[int, Node]]:
    """(position, node) of each tensor that a node reads, also from lists. Post-grad graphs pass tensors by place, but for a few
    optional ones, which are counted after those."""
    found: list[tuple[int, Node]] = []
    for position, argument in enumerate([*node.args, *node.kwargs.values()]):
        for item in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(item, Node) and (value_of(item) is not None):
                found.append((position, item))
    return found


def _bytes_read(node: Node, target: str, position: int, source: Node) -> int:
    if _GATHERS.get(target) == position:
        return _nbytes(node)
    whole = _nbytes(source)
    if target in _GROUPED and position == 1:
        rows, experts = value_of(node.args[0]), value_of(source)  # type: ignore[arg-type]
        if rows is not None and experts is not None and experts.dim() == 3:
            # No more experts than rows can be asked for.
            return whole * min(size_of(rows.shape[0]), size_of(experts.shape[0])) // max(size_of(experts.shape[0]), 1)
    if target == "gemma4.experts.default" and position in (3, 4):
        pairs, experts = value_of(node.args[1]), value_of(source)  # type: ignore[arg-type]
        if pairs is not None and experts is not None:
            named = size_of(pairs.shape[0]) * size_of(pairs.shape[1])
            return whole * min(named, size_of(experts.shape[0])) // max(size_of(experts.shape[0]), 1)
    return whole


def _written(node: Node) -> int:
    target = str(node.target)
    if target == "aten.copy_.default" and isinstance(node.args[1], Node):
        source = base_of(node.args[1])
        updated = str(source.target) in _SCATTERS and base_of(source.args[0]) is base_of(node.args[0])  # type: ignore[arg-type]
        return _written(source) if updated else _nbytes(node)
    if target in _SCATTERS:
        written = node.args[_SCATTERS[target]]
        return _nbytes(written) if isinstance(written, Node) else 0
    return _nbytes(node)


def _leaves(node: Node, inside: set[Node]) -> bool:
    """Whether something outside reads a node; writing to memory of another is read always."""
    return str(node.target) == "aten.copy_.default" or bool(readers(node) - inside)


def _nbytes(node: Node) -> int:
    value = value_of(node)
    if value is None:
        return 0
    sizes = [size_of(size) for size, stride in zip(value.shape, value.stride(), strict=True) if not _is_zero(stride)]
    return math.prod(sizes) * value.element_size()


def _is_zero(stride: Any) -> bool:
    return isinstance(stride, int) and stride == 0


def _value(node: Node, names: dict[str, str], moved: int) -> Value:
    value = value_of(node)
    assert value is not None
    shape = tuple(size_of(size) for size in value.shape)
    return Value(names.get(node.name, node.name), shape, str(value.dtype).removeprefix("torch."), moved)
