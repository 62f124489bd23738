"""Split a graph at attention into pieces, so that equal layers give equal pieces.

A piece is what lies between two attention calls: weights and whatever else comes from outside are its inputs, so two layers
differ in nothing but what is passed in. Two things would make equal layers differ, and are taken care of here: a layer's slice
of the per-layer inputs, whose index is a constant (it moves to the piece that computes them), and where a view starts in memory
(left out of the comparison).
"""

import hashlib
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sympy import Symbol
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from gemma4_compile.ops.attention import attention_into
from gemma4_compile.ops.block_attention import block_attention_into
from gemma4_compile.ops.fusions.attention_qkv import attention_qkv_into
from gemma4_compile.passes.drop_unread import drop_unread


@dataclass(frozen=True)
class SplitPoint:
    """An op between pieces: what mixes rows, and writes pages.

    into    the same, written to a tensor given first
    """

    op: Any
    into: Callable[..., None]

    def argument(self, name: str) -> int:
        """The place of one of its arguments."""
        return [argument.name for argument in self.op._schema.arguments].index(name)


SPLIT_POINTS = {
    "attention": SplitPoint(torch.ops.gemma4.attention.default, attention_into),
    "attention_qkv": SplitPoint(torch.ops.gemma4.attention_qkv.default, attention_qkv_into),
    "block_attention": SplitPoint(torch.ops.gemma4.block_attention.default, block_attention_into),
}
_NAMES = {point.op.overloadpacket: name for name, point in SPLIT_POINTS.items()}
_IGNORED = (torch._C._log_api_usage_once,)


@dataclass
class Piece:
    """One stretch of the graph. `inputs` and `outputs` are nodes of the whole graph, `key` is equal for equal pieces."""

    module: GraphModule
    inputs: list[Node]
    outputs: list[Node]
    key: str


def split(graph: Graph) -> list[Piece | Node]:
    """The pieces and the calls of split points between them, in order. Raises ValueError for a graph that cannot be split."""
    drop_unread(graph)  # an output that nothing reads would make equal layers differ
    parts: list[list[Node] | Node] = [[]]
    home: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or isinstance(node.meta.get("example_value"), SymInt):
            continue  # sizes are computed from the inputs' by whoever runs the pieces
        if node.target in _IGNORED:
            continue
        if node.op not in ("call_function", "call_method"):
            raise ValueError(f"a graph must hold calls only to be split, got {node.op} {node.target}; report the model")
        if node.target in _NAMES:
            parts += [node, []]
            continue
        last: Any = parts[-1]
        home[node] = home.get(node.args[0], last) if _is_part(node) else last  # type: ignore[arg-type]
        home[node].append(node)
    return [part if isinstance(part, Node) else _piece(part) for part in parts if part]


def split_point_of(node: Node) -> str:
    """The name of the op that a part between pieces calls."""
    return _NAMES[node.target]  # type: ignore[index]


def _is_part(node: Node) -> bool:
    """One element of a tuple, or a view with a constant index: it goes where the whole is computed."""
    return node.target is operator.getitem and len(node.all_input_nodes) == 1


def _piece(nodes: list[Node]) -> Piece:
    inside = set(nodes)
    graph = Graph()
    copies: dict[Node, Node] = {}
    inputs: list[Node] = []

    def enter(source: Node) -> None:
        if source in copies or source in inside:
            return
        if source.op == "call_function" and isinstance(source.meta.get("example_value"), SymInt):
            for size in source.all_input_nodes:
                enter(size)
            copies[source] = graph.node_copy(source, lambda n: copies[n])
            return
        copies[source] = graph.placeholder(f"input_{len(inputs)}")
        copies[source].meta = dict(source.meta)
        inputs.append(source)

    for node in nodes:
        for source in node.all_input_nodes:
            enter(source)
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    graph.output(tuple(copies[node] for node in outputs))
    _placeholders_first(graph)
    graph.lint()
    return Piece(GraphModule(torch.nn.Module(), graph), inputs, outputs, _key(graph))


def _placeholders_first(graph: Graph) -> None:
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if node is not first:
            first.append(node)
        first = node


def _key(graph: Graph) -> str:
    """Of everything that a compiled piece depends on: operations, constants, and the metadata of what goes in and out."""
    numbers: dict[Node, int] = {}
    symbols: dict[Any, Symbol] = {}
    lines = []
    for node in graph.nodes:
        numbers[node] = len(numbers)
        args = _text((node.args, node.kwargs), numbers)
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        described = _describe(node.meta.get("example_value"), symbols) if node.op != "output" else ""
        lines.append(f"{node.op} {target} {args} {described}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _text(value: Any, numbers: dict[Node, int]) -> str:
    if isinstance(value, Node):
        return f"%{numbers[value]}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_text(v, numbers) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_text(v, numbers)}' for k, v in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step), numbers)}"
    return repr(value)


def _describe(value: Any, symbols: dict[Any, Symbol]) -> str:
    """Dtype, device, shape and strides, with symbols named in the order in which they appear; no storage offset."""
    if isinstance(value, Tensor):
        shape, strides = (_sizes(sizes, symbols) for sizes in (value.shape, value.stride()))
        return f"{value.dtype} {value.device} {shape} {strides}"
    if isinstance(value, (tuple, list)):
        return " ".join(_describe(v, symbols) for v in value)
    return _sizes([value], symbols) if isinstance(value, SymInt) else ""


def _sizes(sizes: Iterable[Any], symbols: dict[Any, Symbol]) -> str:
    named = []
    for size in sizes:
        if isinstance(size, SymInt):
            expression = size.node.expr
            for symbol in sorted(expression.free_symbols, key=str):
                symbols.setdefault(symbol, Symbol(f"n{len(symbols)}"))
            named.append(str(expression.xreplace(symbols)))
        else:
            named.append(str(size))
    return ",".join(named)
