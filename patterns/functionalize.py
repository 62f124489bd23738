"""In-place arithmetic on a value that nothing reads afterwards, under this name or another, becomes plain arithmetic, so that
templates see one form.

Hugging Face writes `hidden_states *= layer_scalar` and `top_k_weights /= ...`, and adds the ranks' parts of a product up in
place: dist.all_reduce, which Dynamo writes as all_reduce, wait_tensor and copy_. AOT would functionalize them later; fusions
are found before. Everything else in place (KV cache writes) is left alone.
"""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from .template import value_of

FUNCTIONAL = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift"}
# Their results own their memory: writing to them cannot be seen through another name.
_FRESH = {operator.add, operator.sub, operator.mul, operator.truediv}
# By name: a torch without distributed has neither.
_ALL_REDUCE, _WAIT = "_c10d_functional.all_reduce", "_c10d_functional.wait_tensor"
# Methods that may hand on their input's memory: nobody sees it written to where they alone read it.
_VIEWS = {"to", "float", "type_as", "view", "reshape", "contiguous"}


def functionalize(graph: Graph) -> int:
    """Rewrite in place; returns how many nodes changed."""
    changed = 0
    names = aliases(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in FUNCTIONAL and _may_change(node, names):
            node.target = FUNCTIONAL[node.target]
            changed += 1
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target == "copy_" and _is_reduced_in_place(node):
            part, total = node.args
            graph.erase_node(node)
            part.replace_all_uses_with(total, delete_user_cb=lambda user: not _is_call(user, _ALL_REDUCE))
            changed += 1
    return changed


def _is_reduced_in_place(copy: Node) -> bool:
    """`part.copy_(wait_tensor(all_reduce(part, ...)))` where nothing but the all-reduce has read the part by then."""
    part, total = copy.args[0], copy.args[1]
    if copy.users or len(copy.args) != 2 or copy.kwargs or not isinstance(part, Node) or not _is_call(total, _WAIT):
        return False
    reduced: Any = total.args[0]  # type: ignore[union-attr]
    if not _is_call(reduced, _ALL_REDUCE) or reduced.args[0] is not part or not _owns_its_memory(part):
        return False
    return all(user in (reduced, copy) or copy < user for user in part.users)


def _is_call(node: Any, name: str) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and str(node.target) == name


def _owns_its_memory(node: Node) -> bool:
    """No other value of the graph, and no input, has this memory."""
    if node.op == "call_method" and node.target in _VIEWS:
        source: Any = node.args[0]
        return len(source.users) == 1 and _owns_its_memory(source)
    if node.op == "call_method":
        return node.target == "sum"
    return node.op == "call_function" and (
        node.target in _FRESH or node.target is torch._C._nn.linear or str(node.target).startswith("gemma4.")
    )


def memory_of(node: Node) -> int | None:
    """Which memory a node's value has; None where nothing is known."""
    value = value_of(node)
    try:
        return None if value is None else value.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # tensor subclasses
        return None


def aliases(graph: Graph) -> dict[int, list[Node]]:
    """Memory -> the nodes whose values have it, in order."""
    found: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if (memory := memory_of(node)) is not None:
            found.setdefault(memory, []).append(node)
    return found


def writes(node: Node) -> list[Node]:
    """The tensors that a node writes to, by what its name or its schema says."""
    if node.op == "call_method":
        name = str(node.target)
        written = name.endswith("_") and not name.endswith("__") or name == "__setitem__"
        return [n for n in node.args[:1] if isinstance(n, Node)] if written else []
    if node.op != "call_function":
        return []
    found = [n for n in (node.kwargs.get("out"),) if isinstance(n, Node)]
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        mutable = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        found += [n for i in mutable if i < len(node.args) and isinstance(n := node.args[i], Node)]
    name = getattr(node.target, "__name__", "")
    in_place = node.target is operator.setitem or name.endswith("_") and not name.endswith("__")
    if in_place or name in _IN_PLACE and node.target is getattr(operator, name, None):
        found += [n for n in node.args[:1] if isinstance(n, Node)]
    return found


def _may_change(node: Node, names: dict[int, list[Node]]) -> bool:
    target = node.args[0]
    if not isinstance(target, Node) or not _is_fresh(target):
        return False
    before, other = value_of(target), value_of(node.args[1])
    # `x *= y` keeps the dtype and shape of x where `x * y` may promote or broadcast.
    if before is not None and other is not None and (other.dtype != before.dtype or other.dim() > before.dim()):
        return False
    # Other nodes of this memory are views taken before, which must not be read after it, and what the write itself gives.
    seen = [target, *(n for n in names.get(memory_of(target) or 0, ()) if n < node)]
    return all(user is node or user < node for each in seen for user in each.users)


def _is_fresh(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:  # an output of a multi-output op such as topk, not a view of a tensor
        source = node.args[0]
        return isinstance(source, Node) and source.op == "call_function" and value_of(source) is None and _allocates(source)
    return node.target in _FRESH


def _allocates(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "topk"
