"""Plain Inductor beside ours: what each fusion replaced, counted in the two compiled graphs and not looked up in a table."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from gemma4_compile.passes import Record

from .data import FusionRow, Kernel

NOT_FUSED = "(other work)"  # the row of the kernels that compute, also or only, what no fusion took


def fusions(record: Record, names: Iterable[str], plain: tuple[Kernel, ...], ours: tuple[Kernel, ...]) -> tuple[FusionRow, ...]:
    """A row for each fusion in `names` that took sites, and one for the rest; the rows add up to the whole of both graphs.

    Both graphs start from the same graph of Dynamo's. A kernel counts for a fusion if fusions took all the nodes that it is the
    first to compute: one that also writes the KV cache, say, is not saved, as that work needs a kernel still. What Inductor
    computes again in a later kernel says nothing of that kernel's purpose. Over several fusions, the most nodes decide.
    """
    matched = [(name, site) for name in names for site in record.matched(name) if not site.left]
    taken: dict[str, str] = {}
    held: dict[str, int] = {}  # node -> nodes of the site that holds it, if that site has a kernel of ours
    for name, site in matched:  # a later fusion may take an earlier one's site, whole, or what its op leaves of it
        mine = [node for node in site.nodes if held.get(node, len(site.nodes)) >= len(site.nodes)]
        taken |= dict.fromkeys(mine, name)
        if any(kernel.fusion == name and set(site.nodes) <= set(kernel.nodes) for kernel in ours):
            held |= dict.fromkeys(mine, len(site.nodes))
    sites = Counter({name: 0 for name, _ in matched})
    for name, site in matched:
        sites[name] += any(taken[node] == name for node in site.nodes)
    before, after = _shares(plain, taken), _shares(ours, taken)
    measured = all(kernel.microseconds is not None for kernel in ours)
    rows = []
    for name in (*sites, NOT_FUSED):
        old, new = before[name], after[name]
        rows.append(
            FusionRow(
                name,
                sites[name],
                sum(kernel.launches for kernel in old),
                sum(kernel.launches for kernel in new),
                _time(old, measured),
                _time(new, measured),
            )
        )
    return tuple(rows)


def _shares(kernels: Iterable[Kernel], taken: dict[str, str]) -> dict[str, list[Kernel]]:
    found: dict[str, list[Kernel]] = defaultdict(list)
    seen: set[str] = set()
    for kernel in kernels:
        votes = Counter(taken.get(node, NOT_FUSED) for node in set(kernel.nodes) - seen or kernel.nodes)
        seen |= set(kernel.nodes)
        covered = bool(votes) and NOT_FUSED not in votes
        found[kernel.fusion or (votes.most_common(1)[0][0] if covered else NOT_FUSED)].append(kernel)
    return found


def _time(kernels: list[Kernel], measured: bool) -> float | None:
    return sum(kernel.microseconds or 0.0 for kernel in kernels) if measured else None
