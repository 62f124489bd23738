"""In-place arithmetic on a value that nothing reads afterwards becomes plain arithmetic, so that templates see one form.

Hugging Face writes `hidden_states *= layer_scalar` and `top_k_weights /= ...`. AOT would functionalize them later; fusions are
found before. Everything else in place (KV cache writes) is left alone.
"""

import operator

from torch.fx import Graph, Node

from .template import value_of

FUNCTIONAL = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
# Their results own their memory: writing to them cannot be seen through another name.
_FRESH = {operator.add, operator.sub, operator.mul, operator.truediv}


def functionalize(graph: Graph) -> int:
    """Rewrite in place; returns how many nodes changed."""
    changed = 0
    for node in graph.nodes:
        if node.op == "call_function" and node.target in FUNCTIONAL and _may_change(node):
            node.target = FUNCTIONAL[node.target]
            changed += 1
    return changed


def _may_change(node: Node) -> bool:
    target = node.args[0]
    if not isinstance(target, Node) or not _is_fresh(target):
        return False
    before, other = value_of(target), value_of(node.args[1])
    # `x *= y` keeps the dtype and shape of x where `x * y` may promote or broadcast.
    if before is not None and other is not None and (other.dtype != before.dtype or other.dim() > before.dim()):
        return False
    return all(user is node or user < node for user in target.users)


def _is_fresh(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:  # an output of a multi-output op such as topk, not a view of a tensor
        source = node.args[0]
        return isinstance(source, Node) and source.op == "call_function" and value_of(source) is None and _allocates(source)
    return node.target in _FRESH


def _allocates(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "topk"
