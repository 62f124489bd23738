"""Templates of Hugging Face's own code: capture a module or function with Dynamo, name its inputs and its literals.

A new transformers release that writes RMSNorm differently gives a different template, and raising goes on working.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from gemma4_compile.dynamo import own_code

from .functionalize import functionalize
from .template import Template, from_graph, source_of, substitute


def capture(
    function: Callable[..., Any],
    inputs: dict[str, Tensor],
    literals: dict[str, Any] | None = None,
    cut: Callable[[Node], bool] | None = None,
    source: Callable[..., Any] | None = None,
) -> Template:
    """The template of `function(*inputs.values())` as Dynamo sees it.

    inputs     name -> example tensor; also parameters that the function reads, matched by identity of the tensor
    literals   name -> the value that stands for it in the capture; choose one that nothing else equals, such as a prime
    cut        nodes that become parameters named as in `inputs` (by order): what computed them is not part of the template
    source     whose file:line the template reports; `function` unless given
    """
    graphs: list[tuple[GraphModule, Sequence[Any]]] = []

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append((gm, example_inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(own_code(function), backend=keep, fullgraph=True, dynamic=False)(*inputs.values())
    ((gm, example_inputs),) = graphs
    functionalize(gm.graph)
    return _name_inputs(gm.graph, example_inputs, inputs, literals or {}, cut, source_of(source or function))


def _name_inputs(
    graph: Graph, examples: Sequence[Any], inputs: dict[str, Tensor], literals: dict[str, Any], cut: Any, source: str
) -> Template:
    named = Graph()
    copies: dict[Node, Any] = {}
    parameters: dict[str, Any] = dict.fromkeys(inputs, Tensor) | {name: type(value) for name, value in literals.items()}
    created = {name: named.placeholder(name) for name in [*inputs, *literals]}
    by_value = {(type(value), value): created[name] for name, value in literals.items()}
    by_tensor = {id(value): name for name, value in inputs.items()}
    example_of = iter(examples)
    cuts = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            example = next(example_of)
            name = by_tensor.get(id(example))
            copies[node] = created[name] if name else None
        elif cut is not None and cut(node):
            copies[node] = created[next(cuts)]
        elif node.op == "output":
            named.output(substitute(node.args[0], copies, by_value))
        else:
            args, kwargs = substitute((node.args, node.kwargs), copies, by_value)
            copies[node] = named.create_node(node.op, node.target, args, kwargs, name=node.name)
    named.eliminate_dead_code()  # what fed a cut node
    return from_graph(named, parameters, source)
