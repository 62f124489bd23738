"""drop_unread: views and casts that nothing reads go, such as those of the keys that a layer shares.

As second readers they would keep a fusion from a value, and as outputs of pieces they would make equal layers differ.
"""

import operator
from dataclasses import dataclass

from torch.fx import Graph

from .base import Record


@dataclass(frozen=True)
class DropUnread:
    name: str = "drop_unread"

    def __call__(self, graph: Graph, record: Record) -> None:
        drop_unread(graph)


def drop_unread(graph: Graph) -> None:
    """Nothing that writes goes: in-place methods end in an underscore."""
    for node in reversed(graph.nodes):
        is_pure = node.op == "call_method" and not str(node.target).endswith("_") or node.target is operator.getitem
        if is_pure and not node.users:
            graph.erase_node(node)
