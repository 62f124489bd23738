"""Compile one step and keep everything that can be seen on the way: graphs, passes, Inductor's code, what each node came from.

The caches are off here. A graph found in Inductor's cache has neither a post-grad graph nor provenance, and an inspection must
not depend on what ran before.
"""

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.fx import Graph, GraphModule, Node

import gemma4_compile
from gemma4_compile.backend import Backend
from gemma4_compile.passes import Pass, Record, run
from gemma4_compile.passes.base import origins_of
from gemma4_compile.passes.experts import of_experts
from gemma4_compile.patterns.rewrite import module_path

from .data import Line

_NUMBER = re.compile(r"_\d+$")
_INSPECTING = {"fx_graph_cache": False, "trace.provenance_tracking_level": 1, "triton.cudagraphs": False}
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \w+\n\s*(?P<code>.*)')
_PACKAGE = Path(gemma4_compile.__file__).parent


@dataclass
class CompiledGraph:
    """One graph, from Dynamo's to Inductor's code.

    stages       (name, readable code): "dynamo", each pass, "post_grad"
    record       what the passes did
    sources      node of Dynamo's graph -> the line of the model that it came from; program order
    origins      node of the graph that the passes left -> nodes of Dynamo's graph that it stands for
    parameters   what each placeholder is to the model, in order: model.layers.0.mlp.gate_proj.weight
    post_grad    the graph that Inductor wrote code for
    code         the Python module that Inductor wrote
    provenance   kernel:handle in that code -> nodes of the post-grad graph
    """

    stages: list[tuple[str, str]]
    record: Record
    sources: dict[str, Line]
    origins: dict[str, tuple[str, ...]]
    parameters: list[str]
    post_grad: GraphModule
    code: str
    provenance: dict[str, list[str]]


@dataclass
class Recorder(Backend):
    """The backend with the given passes, every graph recorded and no cache asked."""

    steps: Sequence[Pass] = ()
    options: dict[str, Any] = field(default_factory=dict)
    graphs: list[CompiledGraph] = field(default_factory=list)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        _name_alike(gm.graph)
        stages = [("dynamo", _readable(gm))]
        sources = {node.name: line for node in gm.graph.nodes if (line := _line(node))}
        parameters = [_parameter(node) for node in gm.graph.nodes if node.op == "placeholder"]
        record = run(self.steps, gm.graph, lambda name: stages.append((name, _readable(gm))))
        gm.recompile()
        self.records.append(record)
        origins = {node.name: origins_of(node) for node in gm.graph.nodes}

        def inner(post_grad: GraphModule, *args: Any, **kwargs: Any) -> Any:
            compiled: Any = compile_fx_inner(post_grad, *args, **kwargs)
            provenance = json.loads(compiled.inductor_provenance_mapping_str or "{}")
            self.graphs.append(
                CompiledGraph(
                    [*stages, ("post_grad", _readable(post_grad))],
                    record,
                    sources,
                    origins,
                    parameters,
                    post_grad,
                    compiled.source_code,
                    provenance.get("cppCodeToPost", {}),
                )
            )
            return compiled

        options = {**self.config.inductor, **self.options, **_INSPECTING}
        with functorch_config.patch(enable_autograd_cache=False), self.progress(f"compiling {len(gm.graph.nodes)} nodes"):
            call: Any = compile_fx(gm, example_inputs, inner_compile=inner, config_patches=options)  # type: ignore[arg-type]
        return call


def _name_alike(graph: Graph) -> None:
    """Give nodes the names that they had if no experts were there. The experts are our op or Hugging Face's subgraph; of all
    else, the graphs of two variants are compared by name."""
    counts: Counter[str] = Counter()
    kept = {node for node in graph.nodes if node.op in ("placeholder", "get_attr", "output")}
    taken = {node.name for node in kept}
    for node in graph.nodes:
        if node in kept:
            continue
        base = _NUMBER.sub("", node.name)
        base = f"experts_{base}" if of_experts(node) else base
        name = base
        while name in taken:
            counts[base] += 1
            name = f"{base}_{counts[base]}"
        node.name = name
        taken.add(name)
    graph._graph_namespace._used_names |= taken  # the passes' own nodes get others


def _readable(gm: GraphModule) -> str:
    return gm.print_readable(print_output=False)


def _line(node: Node) -> Line | None:
    """The innermost line of the model that made a node; lines of this package, such as the cache's, where there is no other."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if not frames:
        return None
    of_model = [frame for frame in frames if _PACKAGE not in Path(frame["file"]).parents]
    frame = (of_model or frames)[-1]
    return Line(short_path(frame["file"]), int(frame["line"]), frame["code"].strip(), module_path(node))


def short_path(file: str) -> str:
    """A source file from its package on, without the machine's folders."""
    for root in ("site-packages/", "dist-packages/"):
        if root in file:
            return file.split(root)[-1]
    path = Path(file)
    if _PACKAGE.parent in path.parents:
        return path.relative_to(_PACKAGE.parent).as_posix()
    module = inspect.getmodulename(file)
    return f"{path.parent.name}/{module}.py" if module else path.name


_PART = re.compile(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]")
_PLUMBING = {"_modules", "_parameters", "_buffers", "module"}


def _parameter(placeholder: Node) -> str:
    """L['module']._modules['model']._parameters['weight'] as model.weight; the node's name where Dynamo kept no source."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    if source is None:
        return placeholder.name
    name = source.name() if callable(source.name) else source.name  # a method up to torch 2.11
    parts = [next(part for part in found if part) for found in _PART.findall(name.removeprefix("L"))]
    return ".".join(part for part in parts if part not in _PLUMBING) or placeholder.name
