"""yoco: behind the last layer that owns keys and values, only the rows whose logits are wanted.

Layers that share KV add nothing to the pages, so a prompt's other rows are computed there for nothing. The gather of the wanted
rows stands before the head in Hugging Face's graph; it moves up to the first layer that shares, and everything between works on
those rows. Source: arXiv 2405.05254 (You Only Cache Once).

Legal where each operation in between treats rows one by one, and nothing but the head reads its results. Attention mixes rows,
but of keys: its queries are rows like any other.
"""

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor
from torch.fx import Graph, Node

from gemma4_compile.patterns.fusion import Fusion
from gemma4_compile.patterns.rewrite import module_path
from gemma4_compile.patterns.template import value_of

from .base import Miss, Record, Site, evaluate, fake_mode_of, inherit
from .shards import is_shard

_OPS = torch.ops.gemma4
_LAYER = re.compile(r"layers\.(\d+)")
_SOURCE = "passes/yoco.py"

# Arguments of the attention op that belong to keys (slots, table, visible) or say where rows begin (starts).
_SLOTS, _TABLE, _STARTS, _VISIBLE = 5, 6, 8, 12
_ROW_WISE = {
    torch._C._nn.linear, torch._C._nn.gelu, F.gelu, torch.pow, torch.tanh, operator.add, operator.sub, operator.mul,
    operator.truediv, operator.neg, _OPS.rms_norm, _OPS.rms_norm_noscale, _OPS.rope, _OPS.geglu, _OPS.route,
}  # fmt: skip
_OVER_RANKS = {
    "_c10d_functional.all_reduce",
    "_c10d_functional.wait_tensor",
}  # by name: a torch without distributed has neither
_ROW_WISE_METHODS = {
    "float", "to", "type_as", "pow", "view", "reshape", "transpose", "contiguous", "unsqueeze", "expand", "size",
}  # fmt: skip
_WHOLE = (slice(None), slice(0, None))
# Row-wise as a whole, though not each of their operations: tokens are sorted by expert and put back.
_ROW_WISE_MODULES = ("Gemma4TextRouter", "Gemma4TextExperts")


FUSION = Fusion(
    "yoco", "behind the last layer that owns KV, only the rows whose logits are wanted",
    lambda geometry: tuple(layer.site for layer in geometry.layers if layer.shares_kv)[:1],
)  # fmt: skip


class Objection(Exception):
    """Why the rows stay; `done` if there is nothing left to leave out."""

    def __init__(self, reason: str, done: bool = False):
        super().__init__(reason)
        self.done = done


@dataclass(frozen=True)
class Yoco:
    """Move the gather of the wanted rows up to the first layer that shares KV."""

    name: str = FUSION.name

    def __call__(self, graph: Graph, record: Record) -> None:
        boundary = _first_that_shares(graph)
        if boundary is None:
            return
        path = f"layers.{boundary}"
        try:
            _Rewrite(graph, boundary).apply()
        except Objection as objection:
            if objection.done:
                record.sites.append(Site(self.name, self.name, path, _SOURCE, left=str(objection)))
            else:
                record.misses.append(Miss(self.name, path, str(objection), 0, _SOURCE))
            return
        record.sites.append(Site(self.name, self.name, path, _SOURCE))


class _Rewrite:
    def __init__(self, graph: Graph, boundary: int):
        self.graph = graph
        calls = _attention_calls(graph, boundary)
        if not _is(_query_rows(calls[boundary - 1]), _query_rows(calls[boundary])):
            raise Objection("transformers leaves the other rows out of this graph itself", done=True)
        self.selection, self.rows = _selection(graph, calls[max(calls)])
        self.mode = fake_mode_of(self.selection)
        states: Any = self.selection.args[0]
        self.total = _shape(states)[1]
        self.tail = _tail(graph, boundary, self.selection)
        self.keys = _key_chains(self.tail)

    def apply(self) -> None:
        self._check()
        crossing = [node for node in self._inputs() if self._row_dims(node)]
        taken = {node: self._take(node) for node in crossing}
        wanted = self._wanted()
        bounds: dict[Node, Node] = {}
        sizes: dict[Node, Any] = {}
        for node in self.tail:
            kept = self._key_arguments(node)

            def swapped(old: Node, kept: frozenset[Node] = kept) -> Any:
                if old in kept:
                    return old
                return taken[old] if old in taken else self._size(old, wanted, sizes)

            node.args, node.kwargs = torch.fx.map_arg((node.args, node.kwargs), swapped)
            if node.target is _OPS.attention:
                starts: Any = node.args[_STARTS]
                if starts not in bounds:
                    bounds[starts] = self._bounds(starts)
                node.args = (*node.args[:_STARTS], bounds[starts], *node.args[_STARTS + 1 :])
        for node in sorted(self.tail):
            before = node.meta.pop("example_value", None)
            evaluate(node, self.mode)
            self._compare(node, before, wanted)
        self.selection.replace_all_uses_with(self.selection.args[0])  # type: ignore[arg-type]
        self.graph.erase_node(self.selection)

    def _check(self) -> None:
        for node in self.tail:
            if node not in self.keys and not (_is_row_wise(node) and self._keeps_rows_apart(node)):
                raise Objection(f"{node.name} ({node.target}) of {module_path(node)} is not known to treat rows one by one")
            for user in node.users:
                if user not in self.tail and user is not self.selection:
                    raise Objection(_who_asks(node, user))
            if node.target is _OPS.attention and not isinstance(self.rows, Node):
                raise Objection("a packed batch needs its wanted rows as an index tensor; pass them as logits_to_keep")
        if isinstance(self.rows, Node) and self.rows.op != "placeholder" and not self.rows < min(self.tail):
            raise Objection(f"the wanted rows ({self.rows.name}) are computed behind {module_path(min(self.tail))}")
        for value in self._inputs():
            if len(self._row_dims(value)) > 1:
                raise Objection(f"{value.name} {list(_shape(value))} has no single dimension of rows")

    def _keeps_rows_apart(self, node: Node) -> bool:
        """Rows are one dimension, before and after; they are neither picked one by one, nor features of what the operation sums
        over."""
        read = [n for n in node.all_input_nodes if n not in self._key_arguments(node) and self._row_dims(n)]
        if read and isinstance(value_of(node), Tensor) and not self._keeps_one_dimension(node):
            return False
        if node.target is F.scaled_dot_product_attention:
            return not node.kwargs.get("is_causal") and len(node.args) < 6  # it counts queries from the first
        sources = [n for n in node.all_input_nodes if any(_is(size, self.total) for size in _shape(n))]
        if node.target is operator.getitem and sources and _shape(node):
            return any(_is(size, self.total) for size in _shape(node))
        summing = node.target in (torch._C._nn.linear, _OPS.rms_norm, _OPS.rms_norm_noscale)
        return not (summing and any(_is(_shape(n)[-1], self.total) for n in sources if n in self.tail))

    def _inputs(self) -> list[Node]:
        """Tensors from before the tail that it reads, other than keys."""
        read = (n for node in self.tail for n in node.all_input_nodes if n not in self._key_arguments(node))
        return [node for node in dict.fromkeys(read) if node not in self.tail and isinstance(value_of(node), Tensor)]

    def _take(self, value: Node) -> Node:
        """The wanted rows of a value that enters the tail."""
        index = (*[slice(None)] * self._row_dims(value)[0], self.rows)
        return self._insert(value, operator.getitem, (value, index))

    def _row_dims(self, value: Node) -> list[int]:
        """Dimensions of rows. The last one of a mask is keys, that of states is features, however many there are."""
        shape = _shape(value)
        return [i for i in range(len(shape) if len(shape) <= 2 else len(shape) - 1) if _is(shape[i], self.total)]

    def _keeps_one_dimension(self, value: Node) -> bool:
        """Rows, or rows of a batch as one: what mixes them makes two of them, or a part of one."""
        shape = _shape(value)
        sizes = [size for size in (shape if len(shape) <= 2 else shape[:-1]) if _mentions(size, self.total)]
        return len(sizes) == 1 and not _mentions_expression(_expression(sizes[0]) / _expression(self.total), self.total)

    def _bounds(self, starts: Node) -> Node:
        """Where each request's rows begin among the wanted ones, which ascend."""
        return self._insert(starts, torch.searchsorted, (self.rows, starts), {"out_int32": True})

    def _insert(self, value: Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Any = None) -> Node:
        start = min(self.tail)
        sources = [value, *([self.rows] if isinstance(self.rows, Node) else [])]
        late = [node for node in sources if not node < start]
        with self.graph.inserting_after(max(late)) if late else self.graph.inserting_before(start):
            node = self.graph.call_function(target, args, kwargs)
        inherit(node, start)
        evaluate(node, self.mode)
        return node

    def _wanted(self) -> Any:
        """How many rows are wanted: a node, or 1 where the last row is."""
        if not isinstance(self.rows, Node):
            return 1
        value = value_of(self.rows)
        assert value is not None, "Dynamo leaves a value on its inputs"
        for node in self.graph.nodes:
            size = node.meta.get("example_value")
            if node.op == "placeholder" and isinstance(size, SymInt) and _is(size, value.shape[0]):
                return node
        if isinstance(value.shape[0], int):
            return value.shape[0]
        return self._insert(self.rows, torch.ops.aten.sym_size.int, (self.rows, 0))

    def _size(self, node: Node, wanted: Any, sizes: dict[Node, Any]) -> Any:
        """A size that is computed from the number of rows, computed from that of the wanted ones."""
        size = node.meta.get("example_value")
        if not isinstance(size, SymInt) or node in self.tail:
            return node
        if node not in sizes:
            if _is(size, self.total):
                sizes[node] = wanted
            elif node.op != "call_function" or not _mentions(size, self.total):
                sizes[node] = node
            else:
                args = torch.fx.map_arg(node.args, lambda n: self._size(n, wanted, sizes))
                sizes[node] = self._insert(node, node.target, args)  # type: ignore[arg-type]
        return sizes[node]

    def _key_arguments(self, node: Node) -> frozenset[Node]:
        """Arguments that are not rows, though one of their dimensions may have as many elements."""
        if node in self.keys:
            return frozenset(node.all_input_nodes)
        if node.target is _OPS.attention:
            kept = (node.args[i] for i in (_SLOTS, _TABLE, _STARTS, _VISIBLE) if i < len(node.args))
            return frozenset(n for n in kept if isinstance(n, Node))
        if node.target is F.scaled_dot_product_attention:
            return frozenset(n for n in node.args[1:3] if isinstance(n, Node))
        return frozenset()

    def _compare(self, node: Node, before: Any, wanted: Any) -> None:
        """Other shapes than those of the wanted rows would be an error of this pass."""
        after = node.meta.get("example_value")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or node in self.keys:
            return
        rows = wanted.meta["example_value"] if isinstance(wanted, Node) else wanted
        for old, new in zip(before.shape, after.shape, strict=True):
            expected = rows if _is(old, self.total) else old
            assert _is(new, expected) or _mentions(old, self.total), f"{node.name}: {before.shape} became {after.shape}"


def _is_attention(node: Node) -> bool:
    return node.op == "call_function" and node.target in (_OPS.attention, F.scaled_dot_product_attention)


def _layer(node: Node) -> int:
    found = _LAYER.search(module_path(node))
    return int(found.group(1)) if found else -1


def _first_that_shares(graph: Graph) -> int | None:
    """The first layer without a projection for keys; None if all have one."""
    layers = {_layer(node) for node in graph.nodes} - {-1}
    owners = {_layer(node) for node in graph.nodes if ".self_attn.k_proj" in module_path(node)}
    return min(layers - owners, default=None) if owners else None


def _attention_calls(graph: Graph, boundary: int) -> dict[int, Node]:
    """layer -> its attention call. The layer before the boundary has one, and each from there on."""
    calls = {_layer(node): node for node in graph.nodes if _is_attention(node)}
    if any(layer not in calls for layer in range(boundary - 1, max(_layer(node) for node in graph.nodes) + 1)):
        (output,) = (node for node in graph.nodes if node.op == "output")
        shared = (node for node in output.all_input_nodes if _layer(node) >= boundary)
        asked = next((node for node in shared if "self_attn" in module_path(node)), None)
        if asked is not None:
            raise Objection(_who_asks(asked, output))
        raise Objection("attention is written out as several operations; load the model with attn_implementation='sdpa'")
    return calls


def _query_rows(call: Node) -> Any:
    """How many rows attend: q is [1, N, heads, dim] for our op, [batch, heads, N, dim] for SDPA."""
    query: Any = call.args[0]
    return _shape(query)[1 if call.target is _OPS.attention else 2]


def _selection(graph: Graph, last: Node) -> tuple[Node, Any]:
    """The gather behind the last layer, and its index: a node, or a slice that takes the last row."""
    depth = _layer(last)
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node.target is not operator.getitem or not last < node or _layer(node) == depth:
            continue
        index = node.args[1]
        if not isinstance(index, tuple) or len(index) != 3 or index[0] != slice(None) or index[2] != slice(None):
            continue
        source: Any = node.args[0]
        rows: Any = index[1]
        total = _shape(source)[1]
        if total == 1:
            raise Objection("there is one row, and nothing to leave out", done=True)
        if isinstance(total, int):
            raise Objection(f"the number of rows, {total}, is a constant of this graph; compile it for any number")
        indices = value_of(rows) if isinstance(rows, Node) else None
        if indices is not None and indices.dim() == 1 and indices.dtype in (torch.int32, torch.int64) and indices.shape[0] != 0:
            return node, rows
        if rows == slice(-1, None):
            return node, rows
        if isinstance(rows, slice) and rows in _WHOLE:
            break
        raise Objection(f"the wanted rows are {rows}; logits_to_keep must be 1 or a tensor of row indices")
    raise Objection("the caller asks for full-sequence logits, or the head is outside of this graph; pass logits_to_keep to it")


def _tail(graph: Graph, boundary: int, selection: Node) -> dict[Node, None]:
    """What is computed from the boundary layer's first node to the selection, in order."""
    tail: dict[Node, None] = {}
    for node in graph.nodes:
        if node is selection:
            break
        if is_shard(node):  # as a weight does, it comes from outside
            continue
        if node.op in ("call_function", "call_method") and (
            _layer(node) >= boundary or any(source in tail for source in node.all_input_nodes)
        ):
            tail[node] = None
    # A layer's slice of the per-layer inputs is taken before it: gather once, then slice.
    for node in reversed(graph.nodes):
        is_view = node.target is operator.getitem and value_of(node) is not None
        if is_view and node not in tail and node.users and all(user in tail for user in node.users):
            tail[node] = None
    return dict.fromkeys(sorted(tail))


def _key_chains(tail: Iterable[Node]) -> set[Node]:
    """Nodes that only keys and values go through on their way to SDPA, and the keys and values that enter the tail."""
    nodes = set(tail)
    chains: set[Node] = set()
    for call in nodes:
        if call.target is not F.scaled_dot_product_attention:
            continue
        pending = [node for node in call.args[1:3] if isinstance(node, Node)]
        while pending:
            node = pending.pop()
            if node not in chains and isinstance(value_of(node), Tensor):
                chains.add(node)
                pending += node.all_input_nodes if node in nodes else []
    return chains


def _is_row_wise(node: Node) -> bool:
    if _is_attention(node):
        return True
    stack = node.meta.get("nn_module_stack") or {}
    if any(str(getattr(kind, "__name__", kind)).split(".")[-1] in _ROW_WISE_MODULES for _, kind in stack.values()):
        return True
    if node.op == "call_method":
        return node.target in _ROW_WISE_METHODS
    if node.target is operator.getitem:
        return _keeps_rows(node)
    return node.target in _ROW_WISE or str(node.target) in _OVER_RANKS


def _keeps_rows(node: Node) -> bool:
    """A part of a tuple, or of a tensor's later dimensions."""
    index = node.args[1]
    if isinstance(index, int):
        return value_of(node.args[0]) is None
    return isinstance(index, tuple) and (index[0] is Ellipsis or all(part in _WHOLE for part in index[:2]))


def _who_asks(node: Node, user: Node) -> str:
    path = module_path(node)
    if path.endswith("router"):
        what = "router logits"
    elif "self_attn" in path:
        what = "attentions"
    else:
        what = "hidden states"
    return f"the caller asks for {what} of all rows: {user.name} reads {node.name} of {path}"


def _shape(node: Node) -> tuple[Any, ...]:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, SymInt) else size


def _is(size: Any, other: Any) -> bool:
    """Equal as expressions: `==` could add a guard."""
    return bool(_expression(size) == _expression(other))


def _mentions(size: Any, symbol: Any) -> bool:
    return isinstance(size, SymInt) and _mentions_expression(size.node.expr, symbol)


def _mentions_expression(expression: Any, symbol: Any) -> bool:
    return bool(expression.free_symbols & _expression(symbol).free_symbols)
