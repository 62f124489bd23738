"""Which nodes of the post-grad graph each call really computes.

Inductor's provenance is too generous. A library call names the nodes that its arguments were folded from; a generated kernel
that fills one argument of a library call names the nodes of all its arguments, and one that writes to a buffer in place names
what that buffer held before. The calls themselves say better: a buffer that a library call takes as its n-th argument holds the
n-th argument of that call's node, and what a kernel reads it does not compute.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from .traffic import base_of, is_view, readers
from .wrapper_code import Call, WrapperCode, op_of


def computed(code: WrapperCode, nodes: Mapping[str, Node], provenance: Mapping[str, list[str]]) -> list[list[Node]]:
    """The nodes of each call, in graph order.

    nodes         of the post-grad graph by name, in order
    provenance    call key -> names of nodes, as Inductor tells it
    """
    order = {node: place for place, node in enumerate(nodes.values())}
    named = [{nodes[name] for name in provenance.get(call.key, ()) if name in nodes} for call in code.calls]
    library = {i: _of_name(call, named[i]) for i, call in enumerate(code.calls) if call.name not in code.kernels}
    uses = _Uses.of(code, library)
    holds: dict[str, Node] = {}  # buffer -> what is in it now
    result = []
    for i, call in enumerate(code.calls):
        if i in library:
            own = library[i]
            holds |= dict.fromkeys(call.writes, own[0]) if len(own) == 1 else {}
        else:
            taken = _generated(i, call, named[i] - uses.called, named[i] & uses.called, uses, holds)
            own = sorted(taken, key=order.__getitem__)
        result.append(own)
    return result


def stored(owned: list[list[Node]]) -> Callable[[int, Node], bool]:
    """Whether call number i has to write a node to memory: someone outside reads it who does not compute it again."""
    sets = [set(own) for own in owned]
    owners: dict[Node, list[int]] = defaultdict(list)
    for i, own in enumerate(owned):
        for node in own:
            owners[node].append(i)

    def is_stored(i: int, node: Node) -> bool:
        if str(node.target) == "aten.copy_.default":  # into memory of another
            return True
        return any(all(node not in sets[j] for j in owners[reader]) for reader in readers(node) - sets[i])

    return is_stored


@dataclass
class _Uses:
    """called: nodes of library calls; arguments: buffer -> (call, node that it must hold then); writers: buffer -> calls."""

    called: set[Node] = field(default_factory=set)
    arguments: dict[str, list[tuple[int, Node]]] = field(default_factory=lambda: defaultdict(list))
    writers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, code: WrapperCode, library: Mapping[int, list[Node]]) -> "_Uses":
        found = cls()
        for i, call in enumerate(code.calls):
            for buffer in call.writes:
                found.writers[buffer].append(i)
            own = library.get(i, [])
            found.called |= set(own)
            if len(own) == 1:
                for given, argument in zip(call.arguments, own[0].args, strict=False):
                    if given and isinstance(argument, Node):
                        found.arguments[given].append((i, base_of(argument)))
        return found

    def target(self, buffer: str, writer: int) -> Node | None:
        """What a library call expects in a buffer that call number `writer` fills, if one reads it before it is filled anew."""
        until = min((i for i in self.writers[buffer] if i > writer), default=None)
        after = (node for i, node in self.arguments[buffer] if i > writer and (until is None or i <= until))
        return next(after, None)


def _generated(i: int, call: Call, claimed: set[Node], callers: set[Node], uses: _Uses, holds: dict[str, Node]) -> set[Node]:
    expected = {buffer: uses.target(buffer, i) for buffer in call.writes}
    targets = {buffer: node for buffer, node in expected.items() if node is not None and node in claimed}
    read = {holds[b] for b in call.reads if b in holds} - set(targets.values())
    if call.writes and len(targets) == len(call.writes):
        own = _ancestors(targets.values(), claimed, read)
    else:
        arguments = {base_of(n) for caller in callers for n in caller.all_input_nodes}
        own = _without(claimed, (arguments & claimed) - set(targets.values()) | read & claimed)
        if all(map(is_view, own)):  # then what it fills is an argument that the call takes by name, as SDPA does its mask
            own = _ancestors(arguments & claimed, claimed, read)
    own = own or claimed
    left = [node for node in own if _is_read_outside(node, own)]
    holds |= targets
    if len(call.writes) == len(left) == 1:
        holds[call.writes[0]] = left[0]
    return own


def _ancestors(ends: Iterable[Node], within: set[Node], stop: set[Node]) -> set[Node]:
    """The ends and what they are computed from, without the nodes in `stop` and what is behind them."""
    found: set[Node] = set()
    pending = list(ends)
    while pending:
        node = pending.pop()
        if node in found or node in stop:
            continue
        found.add(node)
        pending += [base for n in node.all_input_nodes if (base := base_of(n)) in within]
    return found


def _without(claimed: set[Node], dropped: set[Node]) -> set[Node]:
    """What is left when some nodes, and those that only they need, are taken away."""
    left = claimed - dropped
    gone = set(dropped)
    while unneeded := {node for node in left if (who := readers(node)) and who <= gone}:
        left -= unneeded
        gone |= unneeded
    return left


def _is_read_outside(node: Node, own: set[Node]) -> bool:
    return not is_view(node) and bool(readers(node) - own)


def _of_name(call: Call, nodes: set[Node]) -> list[Node]:
    """The nodes that a library call is named after: aten.mm.default for extern_kernels.mm; all of them if none is."""
    op = op_of(call.name)
    return [node for node in nodes if op_of(f"torch.ops.{node.target}") == op] or list(nodes)
