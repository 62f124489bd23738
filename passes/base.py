"""PatternPass: what every pass needs done once. Find, guard, replace, keep metadata, remember what happened.

Invariants, as in PyTorch's fx_passes/README.md: a graph goes in and comes out that computes the same; `example_value`, the
module stack and the stack trace of replaced outputs are kept; no output aliases an input that did not before. Nodes that the
match did not cover are never erased: an in-place cache write without users must stay.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp import autocast_mode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from gemma4_compile.dynamo import first_line
from gemma4_compile.patterns.functionalize import memory_of, writes
from gemma4_compile.patterns.rewrite import Rewrite, module_path, short
from gemma4_compile.patterns.template import Match, Mismatch, find, instantiate, value_of

# Metadata that later passes, inspection and Inductor's provenance tracking read.
_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack")
_ORIGINS = "gemma4_origins"
_AUTOCAST = (autocast_mode._enter_autocast, autocast_mode._exit_autocast)


def origins_of(node: Node) -> tuple[str, ...]:
    """Names of the nodes of Dynamo's graph that a node stands for: its own, or those that the passes replaced by it."""
    return node.meta.get(_ORIGINS, (node.name,))


@dataclass(frozen=True)
class Site:
    """One place where a rewrite matched: `path` is the module of its first output, `source` the pattern's file:line.

    left     why the site was left to Inductor all the same, because the op does not pay there; empty where it was fused
    nodes    names of the nodes of Dynamo's graph in it"""

    fusion: str
    rewrite: str
    path: str
    source: str
    left: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Miss:
    """One place where a fusion was looked for and left alone; `missing` says how near the nearest pattern came, 0 is nearest,
    and `source` is the file:line of that pattern."""

    fusion: str
    path: str
    reason: str
    missing: int
    source: str = ""


@dataclass
class Record:
    """What one run of the pipeline did to one graph."""

    sites: list[Site] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def matched(self, fusion: str) -> list[Site]:
        return [site for site in self.sites if site.fusion == fusion]


class Pass(Protocol):
    """One named step of the pipeline."""

    @property
    def name(self) -> str: ...

    def __call__(self, graph: Graph, record: Record) -> None: ...


@dataclass(frozen=True)
class Done:
    """A legal match that was replaced: `nodes` of Dynamo's graph were in it."""

    nodes: tuple[str, ...]


@dataclass(frozen=True)
class PatternPass:
    """Apply the rewrites in order, each wherever it matches. A miss by all of them is recorded with the nearest reason.

    lowered   whether what nothing fuses becomes what it was: then an op may stand for inputs that it would not take, and the
              fusion that looks at it says why not
    """

    name: str
    rewrites: Callable[[], Sequence[Rewrite]]
    lowered: bool = False

    def __call__(self, graph: Graph, record: Record) -> None:
        nearest: dict[Node, Miss] = {}
        around = _Surroundings.of(graph)
        for rewrite in self.rewrites():
            anchor = rewrite.searched.anchor
            for node in [n for n in graph.nodes if n.op == anchor.op and n.target == anchor.target]:
                if node._erased:  # an earlier match of this sweep took it
                    continue
                path = module_path(node)
                outcome = self._try(graph, rewrite, node, around)
                if isinstance(outcome, Done):
                    site = Site(self.name, rewrite.name, path, rewrite.searched.source, nodes=outcome.nodes)
                    record.sites.append(site)
                    nearest.pop(node, None)
                elif node not in nearest or outcome.missing < nearest[node].missing:
                    nearest[node] = Miss(self.name, path, outcome.reason, outcome.missing, rewrite.searched.source)
        record.misses.extend(miss for node, miss in nearest.items() if not node._erased)

    def _try(self, graph: Graph, rewrite: Rewrite, node: Node, around: "_Surroundings") -> "Mismatch | Done":
        match = find(rewrite.searched, node)
        if isinstance(match, Mismatch):
            return match
        objection = rewrite.guard(match)
        if objection is not None:
            return Mismatch(objection, -1)
        if (reason := _unplain(match) or around.objection(match)) is not None:
            return Mismatch(reason, -1)
        return replace(graph, match, rewrite, check=not self.lowered)


@dataclass(frozen=True)
class _Surroundings:
    """What of a graph decides about a match beside the match itself.

    written    nodes that write in place, with the memory that they write to; None where it is not known
    autocast   whether operations may compute in another dtype than that of their inputs
    """

    written: tuple[tuple[Node, int | None], ...]
    autocast: bool

    @classmethod
    def of(cls, graph: Graph) -> "_Surroundings":
        written = tuple((node, memory) for node in graph.nodes for memory in map(memory_of, writes(node)))
        autocast = torch._C._is_any_autocast_enabled() or any(node.target in _AUTOCAST for node in graph.nodes)
        return cls(written, autocast)

    def objection(self, match: Match) -> str | None:
        return self._written_amid(match) or self._cast(match)

    def _written_amid(self, match: Match) -> str | None:
        """Operations may not be moved over a write to what they read or give. They all move to where the first output is."""
        inside = sorted(match.nodes.values())
        between = [(node, memory) for node, memory in self.written if not node._erased and inside[0] < node < inside[-1]]
        if not between:
            return None
        nodes = {*inside, *(n for value in match.binding.values() for n in _nodes(value))}
        touched = {memory_of(node) for node in nodes}
        for node, memory in between:
            if memory is None or memory in touched:
                return f"{node.name} writes to what the op would read, or gives, amid it"
        return None

    def _cast(self, match: Match) -> str | None:
        """An op computes in the dtype of its inputs; of matched operations autocast may have cast some."""
        fake_mode = fake_mode_of(match.outputs[0]) if self.autocast else None
        if fake_mode is None:
            return None
        for node in sorted(match.nodes.values()):
            if (recorded := value_of(node)) is None:
                continue
            with torch._C._DisableAutocast():
                plain = compute(node, fake_mode)
            if plain.dtype != recorded.dtype:
                return f"autocast makes {node.name} {short(recorded.dtype)}, of {short(plain.dtype)}"
        return None


def replace(graph: Graph, match: Match, rewrite: Rewrite, check: bool = True) -> "Mismatch | Done":
    """Put the replacement before the first output; a Mismatch says why there is no such place, or, if that is checked, in what
    it would differ."""
    first, fake_mode = min(match.outputs), fake_mode_of(match.outputs[0])
    for name, value in match.binding.items():
        late = next((n for n in _nodes(value) if not n < first), None)
        if late is not None:
            reason = f"{name} ({late.name}) is computed after {first.name}, where the fused op has to stand"
            return Mismatch(reason, -1)
    with graph.inserting_before(first):
        created, outputs = instantiate(rewrite.replacement, match.binding, graph)
    if check and fake_mode is not None and (wrong := _differs(created, outputs, match, fake_mode)) is not None:
        for node in reversed(created):
            graph.erase_node(node)
        return Mismatch(wrong, -1)
    for old, new in zip(match.outputs, outputs, strict=True):
        new.meta.update(old.meta)
        old.replace_all_uses_with(new)
    kept = counterparts(created, match)
    origins = _origins(node for node in match.nodes.values() if node not in kept.values())
    for node in created:
        annotate([node], match.outputs[0], origins_of(kept[node]) if node in kept else origins)
    erase(graph, match.nodes.values())
    return Done(origins)


def _unplain(match: Match) -> str | None:
    """Weights that are quantized, or divided, are tensors of classes that know PyTorch's operations and not ours."""
    for name, value in match.binding.items():
        for node in _nodes(value):
            kind = type(value_of(node))
            if not issubclass(kind, (FakeTensor, type(None))) and kind is not torch.Tensor:
                return f"{name} is a {kind.__name__}, and the op takes plain tensors"
    return None


def _differs(created: Sequence[Node], outputs: Sequence[Node], match: Match, fake_mode: Any) -> str | None:
    """Why what was created is not what was matched: it takes other inputs, or gives other shapes or dtypes."""
    try:
        for node in created:
            evaluate(node, fake_mode)
    except Exception as error:  # an op says what it wants; what else its fake may raise says the same, worse
        return first_line(error)
    for old, new in zip(match.outputs, outputs, strict=True):
        wanted, given = value_of(old), value_of(new)
        if wanted is None:
            continue
        if given is None or given.dtype != wanted.dtype or not statically_known_true(sym_eq(given.shape, wanted.shape)):
            described = "nothing" if given is None else f"{short(given.dtype)} {list(given.shape)}"
            return f"the op would give {described}, not {short(wanted.dtype)} {list(wanted.shape)}"
    return None


def _origins(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for node in sorted(nodes) for name in origins_of(node)))


def counterparts(created: Sequence[Node], match: Match) -> dict[Node, Node]:
    """New node -> the matched node that did the very same: a projection in front of a fused norm is not part of the fusion."""
    found: dict[Node, Node] = {}
    for new in created:
        arguments = torch.fx.map_arg((new.args, new.kwargs), lambda n: found.get(n, n))
        for old in match.nodes.values():
            if (old.op, old.target) == (new.op, new.target) and (old.args, old.kwargs) == arguments:
                found[new] = old
                break
    return found


def annotate(created: Iterable[Node], origin: Node, origins: tuple[str, ...]) -> None:
    """New nodes come from where the replaced one came from, stand for the nodes named in `origins`, and get a fake value where
    Dynamo left some: AOT's cache refuses a graph with a method call on a value that it does not know."""
    fake_mode = fake_mode_of(origin)
    for node in created:
        inherit(node, origin)
        node.meta[_ORIGINS] = origins
        if "example_value" not in node.meta:
            evaluate(node, fake_mode)


def inherit(node: Node, origin: Node) -> None:
    """The module stack and the trace of another node, where it has none."""
    node.meta.update({key: origin.meta[key] for key in _KEPT if key in origin.meta and key not in node.meta})


def fake_mode_of(node: Node) -> Any:
    """The mode of the fake tensors around a node; None if there are none."""
    modes = (getattr(value_of(n), "fake_mode", None) for n in [node, *node.all_input_nodes])
    return next((mode for mode in modes if mode is not None), None)


def evaluate(node: Node, fake_mode: Any) -> None:
    """Compute a node's fake value from those of its inputs; without a mode nothing happens."""
    if fake_mode is not None:
        node.meta["example_value"] = compute(node, fake_mode)


def compute(node: Node, fake_mode: Any) -> Any:
    """A node's fake value, of those of its inputs."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("example_value"))
    # As Dynamo runs nodes: without the Python dispatcher, torch 2.11's linear takes a symbolic size for what it is now, and
    # every length compiles anew. Dynamo has made the guards that this code needs: nothing here may add one.
    guards = fake_mode.shape_env.suppress_guards() if fake_mode.shape_env is not None else nullcontext()
    with fake_mode, torch.no_grad(), enable_python_dispatcher(), guards:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def erase(graph: Graph, nodes: Iterable[Node]) -> None:
    """Erase the matched nodes that nothing reads any more, last first."""
    for node in sorted(nodes, reverse=True):
        if not node.users:
            graph.erase_node(node)


def _nodes(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    return [n for v in value for n in _nodes(v)] if isinstance(value, (tuple, list)) else []


def run(pipeline: Iterable[Pass], graph: Graph, after: Callable[[str], None] = lambda name: None) -> Record:
    """Run the steps in order; the record says what matched, what did not and how long each took.

    after    called with the name of each step when it is done, for those who look on"""
    record = Record()
    for step in pipeline:
        start = time.perf_counter()
        step(graph, record)
        record.seconds[step.name] = record.seconds.get(step.name, 0.0) + time.perf_counter() - start
        after(step.name)
    graph.lint()
    return record
