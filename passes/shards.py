"""shards: a rank's part of a weight is taken before anything is computed, where transformers has divided the model.

It stands where the weight is first read, behind much of what a fused op has to stand before: a fusion of several projections
would not find its later weights there.
"""

from dataclasses import dataclass

from torch.fx import Graph, Node

from .base import Record


@dataclass(frozen=True)
class Shards:
    name: str = "shards"

    def __call__(self, graph: Graph, record: Record) -> None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        for node in reversed(list(graph.nodes)):
            if is_shard(node):
                inputs[-1].append(node)


def is_shard(node: Node) -> bool:
    """A rank's part of a weight."""
    return node.op == "call_method" and node.target == "to_local" and node.all_input_nodes[0].op == "placeholder"
