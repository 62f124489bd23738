"""Inputs of vLLM's graph, as patterns look for them.

A buffer that holds a number of the config becomes that number, as in Hugging Face's model: the ops of some fusions take it as
one. `weight.data`, and a cast to the dtype that a weight has, become the weight: as operations in front of the second norm of a
fusion they would stand behind the place of the fused op.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from gemma4_compile.geometry import Geometry
from gemma4_compile.passes.base import Record
from gemma4_compile.patterns.template import value_of


def known(geometry: Geometry) -> dict[str, float]:
    """How the name of such an input ends -> its number."""
    return {
        "root_size": geometry.hidden**-0.5,  # of the router
        "per_layer_projection_scale": geometry.hidden**-0.5,
        "per_layer_input_scale": 2**-0.5,
    }


@dataclass(frozen=True)
class FoldConstants:
    """
    numbers     how an input's name ends -> what it holds, before it was rounded to the input's dtype
    given       what the graph is called with, in the order of its inputs, where that is known: one that holds another
                number stays
    """

    numbers: Mapping[str, float]
    given: Sequence[Any] = field(default=(), repr=False)
    name: str = "vllm_constants"

    def __call__(self, graph: Graph, record: Record) -> None:
        inputs = graph.find_nodes(op="placeholder")
        given = dict(zip(inputs, self.given, strict=True)) if self.given else {}
        for node in inputs:
            number = next((value for end, value in self.numbers.items() if str(node.target).strip("_").endswith(end)), None)
            value = value_of(node)
            if number is not None and value is not None and value.numel() == 1:
                number = rounded(number, value.dtype)
                if _holds(given.get(node), number):
                    _fold(node, number)


@dataclass(frozen=True)
class DropNothings:
    """`weight.data` and casts that change nothing."""

    name: str = "vllm_nothings"

    def __call__(self, graph: Graph, record: Record) -> None:
        for node in graph.nodes:
            if _is_data(node) or _changes_nothing(node):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                graph.erase_node(node)


def rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=torch.float64).to(dtype))


def _holds(tensor: Any, number: float) -> bool:
    if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        return True  # not known: vLLM's source says what its buffers hold
    return abs(float(tensor) - number) <= torch.finfo(tensor.dtype).eps * abs(number)


def _fold(buffer: Node, number: float) -> None:
    """The number for the buffer, in products with it."""
    for user in list(buffer.users):
        if user.target is operator.mul:
            user.args = tuple(number if argument is buffer else argument for argument in user.args)
        elif _cast_to(user) is not None:
            _fold(user, rounded(number, _cast_to(user)))  # type: ignore[arg-type]
            if not user.users:
                user.graph.erase_node(user)


def _cast_to(node: Node) -> torch.dtype | None:
    plain = node.op == "call_method" and node.target == "to" and len(node.args) == 2 and not node.kwargs
    return node.args[1] if plain and isinstance(node.args[1], torch.dtype) else None


def _is_data(node: Node) -> bool:
    data = getattr(torch._C._autograd, "_get_data_attr", None)
    return node.op == "call_function" and node.target is data and node.args[0].op == "placeholder"  # type: ignore[union-attr]


def _changes_nothing(node: Node) -> bool:
    value, dtype = value_of(node.args[0]) if node.args else None, _cast_to(node)
    return value is not None and dtype == value.dtype
