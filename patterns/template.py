"""Templates: small FX graphs with named parameters, and how one is found inside a larger graph.

Owns matching and instantiation. It knows nothing about Gemma, fusions or passes.

A template comes from an ordinary typed function (`trace`) or from Hugging Face's own code (`capture.py`). Annotations of the
function say what a parameter may stand for: `Tensor` a node of the graph, `float` or `int` a literal of the graph, `Any`
either, also a tuple of both (the shape argument of a `view`).

torch._inductor.pattern_matcher is not used: it works node by node after AOT, where one RMSNorm is up to nine nodes that look
different in each dtype, and it does not say why a site was left alone. `report()` has to.
"""

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, Tracer

Binding = dict[str, Any]


@dataclass(frozen=True)
class Template:
    """A traced function.

    graph        its operations; one placeholder for each parameter
    parameters   name -> Tensor | float | int | Any, see above
    outputs      the returned nodes; matching starts at the anchor, the first of them, or the operation that it is an item of
    source       file:line of the function, for reports
    """

    graph: Graph
    parameters: dict[str, Any]
    outputs: tuple[Node, ...]
    source: str

    @property
    def anchor(self) -> Node:
        first = self.outputs[0]
        whole = first.args[0] if first.target is operator.getitem else first
        return whole if isinstance(whole, Node) and whole.op != "placeholder" else first

    def __len__(self) -> int:
        return sum(node.op not in ("placeholder", "output") for node in self.graph.nodes)


@dataclass
class Match:
    """Where a template was found: `nodes` maps its operations, `binding` its parameters, to the graph searched."""

    template: Template
    nodes: dict[Node, Node] = field(default_factory=dict)
    binding: Binding = field(default_factory=dict)

    @property
    def outputs(self) -> tuple[Node, ...]:
        return tuple(self.nodes[output] for output in self.template.outputs)


@dataclass(frozen=True)
class Mismatch:
    """Why a template was not found at a node. `missing` counts the operations that did not agree, to rank near misses."""

    reason: str
    missing: int


def trace(function: Callable[..., Any]) -> Template:
    """The template of a function of tensors and literals, traced symbolically (no shapes, no values)."""
    graph = Tracer().trace(function)
    hints = inspect.get_annotations(function, eval_str=True)
    hints.pop("return", None)
    return from_graph(graph, hints, source_of(function))


def from_graph(graph: Graph, parameters: dict[str, Any], source: str) -> Template:
    """A template over an existing graph whose placeholders carry the parameters' names."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    results = output.args[0]
    outputs = tuple(results) if isinstance(results, (tuple, list)) else (results,)
    return Template(graph, parameters, outputs, source)


def source_of(function: Callable[..., Any]) -> str:
    """file:line of a function, the file relative to the package or library that it belongs to."""
    path = inspect.getsourcefile(function) or "?"
    parts = path.replace("\\", "/").split("/")
    keep = next((i for i in range(len(parts) - 1, -1, -1) if parts[i] in ("patterns", "transformers", "vllm")), len(parts) - 1)
    return f"{'/'.join(parts[keep:])}:{inspect.getsourcelines(function)[1]}"


def find(template: Template, node: Node) -> Match | Mismatch:
    """The template with its anchor at `node`, or the reason of the nearest miss.

    Operations inside the template that are not outputs may have no users outside: they would have to stay."""
    search = _Search(template)
    for match in search.complete(Match(template), [(template.anchor, node)]):
        inside = set(match.nodes.values())
        outputs = set(match.outputs)
        stray = next(((n, u) for n in inside - outputs for u in n.users if u not in inside), None)
        if stray is None:
            return match
        search.miss(len(match.nodes), f"{stray[0].name} is also used by {stray[1].name}")
    return search.nearest


class _Search:
    """Depth-first search with backtracking; templates are small, so each match is copied rather than unwound."""

    def __init__(self, template: Template):
        self.template = template
        self.nearest = Mismatch("no node to start from", len(template) + 1)

    def miss(self, depth: int, reason: str) -> None:
        missing = len(self.template) - depth
        if missing < self.nearest.missing:
            self.nearest = Mismatch(reason, missing)

    def complete(self, match: Match, pending: list[tuple[Any, Any]]) -> Iterator[Match]:
        """All matches that extend `match` by the pairs (of template, of graph) in `pending` and the unreached outputs."""
        while pending:
            expected, actual = pending.pop()
            if not self._unify(match, expected, actual, pending):
                return
        open_node = next((n for n in self.template.graph.nodes if self._reachable(match, n)), None)
        if open_node is None:
            yield match
            return
        bound = next(self._value(match, a) for a in open_node.all_input_nodes if isinstance(self._value(match, a), Node))
        taken = set(match.nodes.values())
        candidates = [u for u in bound.users if u.target == open_node.target and u.op == open_node.op and u not in taken]
        if not candidates:
            self.miss(len(match.nodes), f"no {_name(open_node)} uses {bound.name}")
        for candidate in candidates:
            branch = Match(match.template, dict(match.nodes), dict(match.binding))
            yield from self.complete(branch, [(open_node, candidate)])

    def _reachable(self, match: Match, node: Node) -> bool:
        if node.op in ("placeholder", "output") or node in match.nodes:
            return False
        return any(isinstance(self._value(match, a), Node) for a in node.all_input_nodes)

    @staticmethod
    def _value(match: Match, node: Node) -> Any:
        return match.binding.get(str(node.target)) if node.op == "placeholder" else match.nodes.get(node)

    def _unify(self, match: Match, expected: Any, actual: Any, pending: list[tuple[Any, Any]]) -> bool:
        depth = len(match.nodes)
        if isinstance(expected, Node) and expected.op == "placeholder":
            return self._bind(match, str(expected.target), actual)
        if isinstance(expected, Node):
            if not isinstance(actual, Node):
                self.miss(depth, f"expected {_name(expected)}, found the literal {actual!r}")
                return False
            if expected in match.nodes:
                same = match.nodes[expected] is actual
                if not same:
                    self.miss(depth, f"expected {match.nodes[expected].name}, found {actual.name}")
                return same
            if (expected.op, expected.target) != (actual.op, actual.target):
                self.miss(depth, f"expected {_name(expected)}, found {_name(actual)} ({actual.name})")
                return False
            expected_arguments, actual_arguments = _arguments(expected), _arguments(actual)
            if actual in match.nodes.values():
                self.miss(depth, f"{actual.name} would be matched twice")
                return False
            match.nodes[expected] = actual
            # What is not passed is None: torch's builtins have no signature to ask for their defaults.
            keys = expected_arguments.keys() | actual_arguments.keys()
            pending.extend((expected_arguments.get(k), actual_arguments.get(k)) for k in sorted(keys, key=str))
            return True
        if isinstance(expected, (tuple, list)):
            if not isinstance(actual, (tuple, list)) or len(expected) != len(actual):
                self.miss(depth, f"expected {len(expected)} items, found {actual!r}")
                return False
            pending.extend(zip(expected, actual, strict=True))
            return True
        if isinstance(expected, slice):
            if not isinstance(actual, slice):
                self.miss(depth, f"expected a slice, found {actual!r}")
                return False
            pending.extend((getattr(expected, f), getattr(actual, f)) for f in ("start", "stop", "step"))
            return True
        if isinstance(actual, Node) or type(expected) is not type(actual) or expected != actual:
            self.miss(depth, f"expected {expected!r}, found {actual!r}")
            return False
        return True

    def _bind(self, match: Match, name: str, actual: Any) -> bool:
        kind = self.template.parameters[name]
        accepted = {Tensor: isinstance(actual, Node), float: isinstance(actual, float), Any: True}
        accepted[int] = isinstance(actual, int) and not isinstance(actual, bool)
        if not accepted[kind]:
            self.miss(len(match.nodes), f"{name} must be a {getattr(kind, '__name__', kind)}, found {actual!r}")
            return False
        if name in match.binding and match.binding[name] != actual:
            self.miss(len(match.nodes), f"{name} is {match.binding[name]!r} and {actual!r}: both must be the same")
            return False
        match.binding[name] = actual
        return True


def _arguments(node: Node) -> dict[str | int, Any]:
    """All arguments by name or position. Python functions may be called either way, with or without their defaults."""
    if inspect.isfunction(node.target):
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return {name: value for name, value in bound.arguments.items()}  # noqa: C416 (for the type of the keys)
    arguments: dict[str | int, Any] = dict(enumerate(node.args))
    return arguments | dict(node.kwargs)


def _name(node: Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target)).split(".")[-1]


def instantiate(template: Template, binding: Binding, graph: Graph) -> tuple[list[Node], list[Node]]:
    """Copy the template's operations to the graph's insertion point: (all new nodes, the nodes of its outputs)."""
    copies: dict[Node, Any] = {}
    for node in template.graph.nodes:
        if node.op == "placeholder":
            copies[node] = binding[str(node.target)]
        elif node.op != "output":
            copies[node] = graph.create_node(node.op, node.target, *substitute((node.args, node.kwargs), copies))
    return [c for n, c in copies.items() if n.op != "placeholder"], [copies[o] for o in template.outputs]


def substitute(value: Any, copies: dict[Node, Any], literals: dict[Any, Any] | None = None) -> Any:
    """An argument with its nodes replaced by `copies`, and numbers by `literals`, whose keys are (type, number).

    Not torch.fx.map_arg: a parameter may stand for a tuple, which map_arg would not splice into the arguments."""
    if isinstance(value, Node):
        return copies[value]
    if isinstance(value, (tuple, list)):
        items = [substitute(v, copies, literals) for v in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {k: substitute(v, copies, literals) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(substitute(v, copies, literals) for v in (value.start, value.stop, value.step)))
    return literals.get((type(value), value), value) if literals and isinstance(value, (int, float)) else value


def value_of(node: Any) -> Any:
    """The fake tensor that Dynamo or AOT recorded for a node, or None."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None
