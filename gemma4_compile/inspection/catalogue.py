"""The fusion catalogue: each kernel call of a compiled graph with the layer, the ops and the model's lines that it computes.

Ties together what Inductor's code calls (wrapper_code), which post-grad nodes each call computes (Inductor's provenance), which
nodes of Dynamo's graph those came from (`from_node`), and which of those a pass replaced (the passes' own record).
"""

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from gemma4_compile.geometry import Geometry, LayerGeometry
from gemma4_compile.ops.library import OPS
from gemma4_compile.packed.split import SPLIT_POINTS
from gemma4_compile.passes import FUSIONS
from gemma4_compile.patterns.rewrite import module_path

from .capture import CompiledGraph, short_path
from .data import Kernel, Kind, Layer, Line
from .ownership import computed, stored
from .traffic import is_view, traffic
from .wrapper_code import Call, WrapperCode, op_of, read

_CACHE = re.compile(r"steps\.(\d+)\.")
_LAYER = re.compile(r"layers\.(\d+)")
_FUSION_OF = {op: name for name, fusion in FUSIONS.items() for op in fusion.ops}
# grouped_mm_fallback is transformers' own, on a CPU.
_GEMMS = {"mm", "addmm", "bmm", "baddbmm", "_mm_plus_mm", "bias_addmm", "_int_mm", "_scaled_mm", "_grouped_mm"}
_GEMMS |= {"mkl_linear", "_mkl_linear", "_linear_pointwise", "grouped_mm_fallback"}


def catalogue(graph: CompiledGraph, geometry: Geometry) -> tuple[Kernel, ...]:
    """The kernels of one compiled graph, in the order of the calls.

    Raises ValueError where Inductor's code has calls of kernels and none of them has provenance: nothing could be said of them.
    """
    code = read(graph.code)
    nodes = {node.name: node for node in graph.post_grad.graph.nodes}
    names = _names(graph)
    owners = [layer.index for layer in geometry.layers if not layer.shares_kv]
    owned = computed(code, nodes, graph.provenance)
    is_stored = stored(owned)
    kernels = [
        _kernel(index, call, code, own, graph, names, owners, functools.partial(is_stored, index))
        for index, (call, own) in enumerate(zip(code.calls, owned, strict=True))
    ]
    if kernels and not any(kernel.ops for kernel in kernels):
        raise ValueError("each kernel needs provenance, got none from Inductor; use a torch version that pyproject.toml admits")
    return tuple(kernels)


def _kernel(
    index: int,
    call: Call,
    code: WrapperCode,
    nodes: list[Node],
    graph: CompiledGraph,
    names: dict[str, str],
    owners: list[int],
    is_stored: Callable[[Node], bool],
) -> Kernel:
    nodes = [node for node in nodes if not is_view(node)] or nodes
    dynamo = _dynamo_nodes(nodes, graph)
    passed = {*call.reads, *call.writes} if call.name in code.kernels else None
    inputs, outputs = traffic(nodes, names, passed, is_stored)
    written = {value.name for value in outputs}
    paths = [_path(node, names, owners, _prefix(graph)) for node in nodes if node.name in written]
    paths = paths or [module_path(node) for node in nodes]
    kind = classify(call.name, call.name in code.kernels)
    lines = [graph.sources[name] for name in graph.sources if name in dynamo]
    return Kernel(
        index=index,
        name=call.name,
        kind=kind,
        fusion=_FUSION_OF.get(op_of(call.name), "") if kind == "ours" else "",
        layer=_last_layer(map(module_path, nodes)) if (first := _first_layer(paths)) is None else first,
        module=_common(paths),
        ops=tuple(dict.fromkeys(str(node.target) for node in nodes)),
        lines=_unique(lines or _own_lines(nodes, graph)),
        nodes=tuple(dynamo),
        inputs=inputs,
        outputs=outputs,
        bytes=sum(value.bytes for value in (*inputs, *outputs)),
        launches=1,
        microseconds=None,
        code=code.kernels.get(call.name) or (source_of(op_of(call.name)) if kind == "ours" else call.text),
    )


def classify(name: str, generated: bool) -> Kind:
    """The class of a kernel by its name in Inductor's code; `generated` where Inductor wrote it."""
    last = op_of(name)
    if generated:
        return "gemm" if name.startswith("triton_tem_") and "mm" in name else "inductor"
    if "attention" in last and "gemma4." not in name or last in SPLIT_POINTS:
        return "attention"
    if "gemma4." in name:
        return "ours"
    if "c10d" in name or "symm_mem" in name:
        return "collective"
    return "gemm" if last in _GEMMS else "other"


@functools.cache
def source_of(op: str) -> str:
    """Source of an op's kernels and launchers, those that it shares with other ops too."""
    found: dict[str, str] = {}
    pending: list[Any] = [inspect.unwrap(OPS[op].launch)]
    while pending:
        function = pending.pop()
        function = getattr(function, "fn", function)  # the Python under triton.jit
        if not inspect.isfunction(function) or not function.__module__.startswith("gemma4_compile.ops."):
            continue
        path = short_path(function.__code__.co_filename)
        if f"{path} {function.__name__}" not in found and not path.endswith("/library.py"):
            found[f"{path} {function.__name__}"] = f"# {path}\n{inspect.getsource(function)}"
            pending += [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    return "\n".join(found.values())


def _dynamo_nodes(nodes: Iterable[Node], graph: CompiledGraph) -> dict[str, None]:
    """Names of the nodes of Dynamo's graph that post-grad nodes came from."""
    found: dict[str, None] = {}
    for node in nodes:
        pending = list(node.meta.get("from_node") or ())
        while pending:
            source = pending.pop()
            if source.name in graph.origins:
                found |= dict.fromkeys(graph.origins[source.name])
            pending.extend(source.from_node or ())
    return found


def _own_lines(nodes: Iterable[Node], graph: CompiledGraph) -> list[Line]:
    """Where Inductor lost the way back: the lines of the modules that the nodes say they ran in."""
    paths = {module_path(node) for node in nodes} - {""}
    return [line for line in graph.sources.values() if line.module in paths][:1]


def _names(graph: CompiledGraph) -> dict[str, str]:
    """Placeholder of the post-grad graph -> parameter path, where the two graphs have the same placeholders."""
    placeholders = [node.name for node in graph.post_grad.graph.nodes if node.op == "placeholder"]
    return dict(zip(placeholders, graph.parameters, strict=True)) if len(placeholders) == len(graph.parameters) else {}


def _path(node: Node, names: dict[str, str], owners: list[int], prefix: str) -> str:
    """The module of a node. AOT's copies into graph inputs have none: those into a cache belong to its layer."""
    target = node.args[0] if str(node.target) == "aten.copy_.default" else None
    found = _CACHE.match(names.get(target.name, "")) if isinstance(target, Node) else None
    return f"{prefix}layers.{owners[int(found.group(1))]}.self_attn" if found else module_path(node)


def _prefix(graph: CompiledGraph) -> str:
    """What stands before `layers.N` in this model's paths: `model.`, or nothing where the text model itself was compiled."""
    paths = (line.module for line in graph.sources.values())
    return next((path[: found.start()] for path in paths if (found := _LAYER.search(path))), "model.")


def _layers(paths: Iterable[str]) -> list[int]:
    return [int(found.group(1)) for path in paths if (found := _LAYER.search(path))]


def _first_layer(paths: Iterable[str]) -> int | None:
    """Of a kernel's outputs: over the boundary of two layers it belongs to the one that it ends."""
    return min(_layers(paths), default=None)


def _last_layer(paths: Iterable[str]) -> int | None:
    """Of all that it computes, where its outputs are in no layer: the last layer's tail ends in the model's norm."""
    return max(_layers(paths), default=None)


def _common(paths: list[str]) -> str:
    """The longest dotted prefix of all paths."""
    parts = [path.split(".") for path in paths if path]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def _unique(lines: Iterable[Line]) -> tuple[Line, ...]:
    return tuple({(line.file, line.line, line.module): line for line in lines}.values())


def layers_of(geometry: Geometry) -> tuple[Layer, ...]:
    """The decoder layers with the kind of each."""
    return tuple(Layer(layer.index, _label(layer, geometry)) for layer in geometry.layers)


def _label(layer: LayerGeometry, geometry: Geometry) -> str:
    parts = [layer.kind.removesuffix("_attention")]
    if layer.shares_kv:
        parts.append(f"shares KV of layer {layer.kv_from}")
    if geometry.experts:
        parts.append("experts")
    return ", ".join(parts)


@dataclass(frozen=True)
class LayerCount:
    """Launches of one layer by class."""

    layer: int | None
    counts: Counter[str]

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def count_by_layer(kernels: Iterable[Kernel]) -> list[LayerCount]:
    """Launches a layer, layers in order; what belongs to no layer comes last."""
    found: dict[int | None, Counter[str]] = {}
    for kernel in kernels:
        found.setdefault(kernel.layer, Counter())[kernel.kind] += kernel.launches
    return [LayerCount(layer, found[layer]) for layer in sorted(found, key=lambda n: (n is None, n or 0))]
