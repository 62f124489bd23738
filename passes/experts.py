"""experts: count the experts that came as one op, and take away what says why others did not.

The op comes into the graph through transformers' experts interface (gemma4_compile/hf/experts.py), not by a pattern."""

from typing import Any

import torch
from torch.fx import Graph, Node

from gemma4_compile.hf.experts import PREFIX, REPLACED, SOURCE
from gemma4_compile.patterns.fusion import Fusion, layers_with_experts
from gemma4_compile.patterns.rewrite import module_path

from .base import Miss, Record, Site, origins_of

_OPS = torch.ops.gemma4
_OTHER = (
    f"the model's own experts implementation is none of {', '.join(REPLACED)}; call model.set_experts_implementation"
    f"({REPLACED[0]!r}), or {PREFIX + REPLACED[0]!r} for a torch.compile of your own"
)


# With more tokens than pay (plans.experts_plan), the op's products are torch's grouped ones, as Inductor's are.
FUSION = Fusion(
    "experts", "the routed experts: both products, gelu_tanh(gate) * up, weighted sum", layers_with_experts, ops=("experts",)
)


class Experts:
    """The routed experts of each layer with experts: a site, or a miss with its reason."""

    name = FUSION.name

    def __call__(self, graph: Graph, record: Record) -> None:
        seen: set[str] = set()
        for node in list(graph.nodes):
            path = module_path(node)
            if node.target in _targets("experts"):
                record.sites.append(Site(self.name, "experts", path, SOURCE, nodes=origins_of(node)))
                seen.add(path)
            elif node.target in _targets("leave_experts"):
                states, reason = node.args
                record.misses.append(Miss(self.name, path, str(reason), -1, SOURCE))
                seen.add(path)
                node.replace_all_uses_with(states)
                graph.erase_node(node)
        for path in dict.fromkeys(module_path(node) for node in graph.nodes if of_experts(node)):
            if path not in seen:
                record.misses.append(Miss(self.name, path, _OTHER, -1, SOURCE))


def _targets(name: str) -> tuple[Any, ...]:
    packet = getattr(_OPS, name)
    return packet, packet.default


def of_experts(node: Node) -> bool:
    """Whether a module of Gemma 4's experts made the node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return False
    kind = list(stack.values())[-1][1]
    return str(getattr(kind, "__name__", kind)).split(".")[-1] == "Gemma4TextExperts"
