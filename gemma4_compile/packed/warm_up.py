"""Compile the kernels of a program's ops while Inductor compiles its pieces.

Inductor leaves our ops to themselves: their Triton kernels would be compiled one after the other when the first step runs, ten
seconds and more for a whole model. Here each op is called once, in a thread, with tensors of the shapes that it will see in a
prompt and in a decode step; what it computes is dropped.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from itertools import chain
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from gemma4_compile.ops.dependent import constants
from gemma4_compile.ops.library import without_products

_THREADS = 8


class WarmUp:
    """Calls in threads of their own: much of what Triton does is done without Python's lock. Those of the first step begin at
    once; `join` waits for them, and lets the others begin.

    graph      after the passes: example values on its nodes
    examples   of its placeholders, weights among them
    names      id of an example -> ("input", name) for a step's inputs
    steps      inputs by name, of each kind of step; those behind the first are what CUDA graphs will hold
    """

    def __init__(
        self, graph: GraphModule, examples: Sequence[Any], names: Mapping[int, Any], steps: Sequence[Mapping[str, Tensor]]
    ):
        first, *self._others = [_calls(graph, examples, names, step) for step in steps]
        self._weights = [x for x in examples if isinstance(x, Tensor) and names[id(x)][0] == "weight"]
        self._threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
        self._running = [self._threads.submit(_call, *call) for call in first]

    def join(self) -> None:
        wait(self._running)
        for call in chain.from_iterable(self._others):
            self._threads.submit(_call, *call, self._weights)
        self._threads.shutdown(wait=False)


def _call(target: Any, arguments: Sequence[Any], recorded_with: Sequence[Tensor] | None = None) -> None:
    """As a CUDA graph would hold it if these weights are given. What goes wrong here, the first step will say, and where."""
    mode = nullcontext() if recorded_with is None else constants(recorded_with)
    with suppress(Exception), torch.no_grad(), without_products(), mode:
        target(*[argument() if callable(argument) else argument for argument in arguments])


def _calls(
    graph: GraphModule, examples: Sequence[Any], names: Mapping[int, Any], step: Mapping[str, Tensor]
) -> list[tuple[Any, list[Any]]]:  # fmt: skip
    """Each op of ours that the graph calls, once for each kind of arguments."""
    values: dict[Node, Any] = {}
    sizes: dict[Any, int] = {}
    placeholders = (node for node in graph.graph.nodes if node.op == "placeholder")
    for node, example in zip(placeholders, examples, strict=True):
        if not isinstance(example, Tensor):
            continue
        kind, name = names[id(example)]
        values[node] = step.get(name) if kind == "input" else example
        given = () if values[node] is None else values[node].shape
        for symbol, size in zip(node.meta["example_value"].shape, given, strict=False):
            if isinstance(symbol, SymInt):
                sizes[symbol.node.expr] = size

    def concrete(size: Any) -> int:
        return int(size.node.expr.subs(sizes)) if isinstance(size, SymInt) else size

    found: dict[Any, tuple[Any, list[Any]]] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or not str(node.target).startswith("gemma4."):
            continue
        arguments: list[Any] = []
        key: list[Any] = [str(node.target)]
        for argument in node.args:
            value = argument.meta.get("example_value") if isinstance(argument, Node) else argument
            if isinstance(value, Tensor):
                shape, strides = tuple(map(concrete, value.shape)), tuple(map(concrete, value.stride()))
                key.append((shape, strides, value.dtype))
                given = values.get(argument)  # type: ignore[arg-type]
                arguments.append(given if given is not None else _zeros(shape, strides, value.dtype, value.device))
            else:
                value = concrete(value)
                key.append(value)
                arguments.append(value)
        if node.kwargs or any(isinstance(a, Node) for a in arguments):
            continue
        found.setdefault(repr(key), (node.target, arguments))
    return list(found.values())


def _zeros(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    return lambda: torch.empty_strided(shape, strides, dtype=dtype, device=device).zero_()
