"""lower: raised ops that no fusion took become Hugging Face's own subgraph again, so that Inductor fuses them its own way."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from gemma4_compile.patterns import geglu, rms_norm, rope, route
from gemma4_compile.patterns.template import Template, instantiate, value_of

from .base import Record, annotate, erase, origins_of

_OPS = torch.ops.gemma4
# raised op -> the captured subgraph, and the names of the op's arguments in it
_EXPANSIONS: dict[Any, tuple[Callable[[], Template], tuple[str, ...]]] = {
    _OPS.rms_norm: (lambda: rms_norm.captured(True), ("x", "weight", "eps")),
    _OPS.rms_norm_noscale: (lambda: rms_norm.captured(False), ("x", "eps")),
    _OPS.rope: (rope.captured, ("x", "cos", "sin")),
    _OPS.rope_2d: (rope.captured_2d, ("x", "cos", "sin")),
    _OPS.geglu: (geglu.captured, ("gate", "up")),
    _OPS.route: (route.captured, ("logits", "per_expert_scale", "top_k")),
}


@dataclass(frozen=True)
class Lower:
    """Expand every raised op, except those named in `keep`: a raised op that is a fusion of its own (`route`, `geglu`)."""

    keep: frozenset[str] = frozenset()
    name: str = "lower"

    def __call__(self, graph: Graph, record: Record) -> None:
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _EXPANSIONS and str(node.target).split(".")[-1] not in self.keep:
                expand(graph, node)


def expand(graph: Graph, node: Node) -> None:
    """Replace one raised op by the subgraph that it stands for."""
    captured, names = _EXPANSIONS[node.target]
    template = captured()
    binding = dict(zip(names, node.args, strict=True))
    if node.target in (_OPS.rope, _OPS.rope_2d):
        value = value_of(node)
        assert value is not None, "raise checks head_dim, so the shape is known"
        half = value.shape[-1] // 2
        binding |= {"half": half} if node.target is _OPS.rope else {"half": half // 2, "part": half}
    with graph.inserting_before(node):
        created, outputs = instantiate(template, binding, graph)
    if len(outputs) == 1:
        outputs[0].meta.update(node.meta)
        node.replace_all_uses_with(outputs[0])
    else:
        for item in list(node.users):
            assert item.target is operator.getitem, "ops with several outputs are read by getitem"
            new = outputs[item.args[1]]  # type: ignore[index]
            new.meta.update(item.meta)
            item.replace_all_uses_with(new)
            graph.erase_node(item)
    annotate(created, node, origins_of(node))
    erase(graph, [node])
