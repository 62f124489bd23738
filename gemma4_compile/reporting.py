"""report(model): for each fusion the sites that the config promises, those that matched, and why the others did not."""

import re
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from .geometry import WHOLE_MODEL
from .optimized import CompiledModel, state_of
from .passes import SWITCHES, Fusion, Record

_LAYER = re.compile(r"layers\.\d+")


@dataclass(frozen=True)
class Unmatched:
    """A site that was expected and not fused. `graph` counts from 1 in the order of compilation; `pattern` is the file:line of
    the pattern that came nearest, empty if none did."""

    site: str
    graph: int
    reason: str
    pattern: str = ""


@dataclass(frozen=True)
class FusionReport:
    """One fusion.

    matched          sites that were found, and may be fused, in every compiled graph
    left             such sites that stay with Inductor because the op is no faster there, one line for each graph
    launches_saved   kernel launches saved against Inductor's code for the sites alone, in the graph compiled last. In the whole
                     graph Inductor joins some with other work: inspect(model, compare="plain") counts there
    """

    name: str
    enabled: bool
    expected: int
    matched: int
    unmatched: tuple[Unmatched, ...] = ()
    left: tuple[str, ...] = ()
    launches_saved: int = 0
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Prints as a table.

    fusions           name -> FusionReport
    graphs_compiled   graphs that Dynamo traced for this model so far: recompilations would show here
    pieces            compiled pieces of the graphs in use; unique_pieces, those that differ. The graph of a packed step has one
                      piece more than layers, any other graph is one piece
    packed_steps      of the model; `loaded` of them were not compiled
    calls             which way calls went -> how many; `reasons` says why not all went as packed steps
    vision            sites that were fused in the vision tower, by fusion, in its graph compiled last, of `vision_layers`. A
                      tail with the next layer's norm counts as post_attention_norms; `vision_note` says why there are fewer
    """

    fusions: dict[str, FusionReport]
    graphs_compiled: int
    pieces: int
    unique_pieces: int
    seconds: float = 0.0
    packed_steps: int = 0
    loaded: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, tuple[str, ...]] = field(default_factory=dict)
    vision: dict[str, int] = field(default_factory=dict)
    vision_layers: int = 0
    vision_note: str = ""

    def __str__(self) -> str:
        rows = [("fusion", "expected", "matched", "launches saved", "")]
        for fusion in self.fusions.values():
            counts = (str(fusion.matched), str(fusion.launches_saved)) if fusion.enabled else ("-", "-")
            rows.append((fusion.name, str(fusion.expected), *counts, fusion.note))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip() for a, b, c, d, e in rows
        ]
        for fusion in self.fusions.values():
            lines += [f"  {fusion.name}, {left}" for left in fusion.left]
            lines += [f"  {fusion.name} at {u.site}, graph {u.graph}: {u.reason}" for u in fusion.unmatched]
        if self.graphs_compiled or self.loaded:
            lines.append(f"{self.graphs_compiled} graphs compiled, no graph breaks; passes took {self.seconds:.2f} s")
            if self.packed_steps:
                lines.append(f"{self.packed_steps} packed steps, {self.loaded} of them loaded from files")
                lines.append(f"{self.pieces} pieces in all, {self.unique_pieces} unique")
        else:
            lines.append("nothing compiled yet; call the model once")
        if self.calls:
            lines.append("calls: " + ", ".join(f"{count} as {way}" for way, count in self.calls.items()))
        lines += [f"  {way}: {reason}" for way, reasons in self.reasons.items() for reason in reasons]
        if self.vision or self.vision_note:
            sites = ", ".join(f"{name} {count}" for name, count in self.vision.items()) or "nothing fused"
            note = f"; {self.vision_note}" if self.vision_note else ""
            lines.append(f"vision tower of {self.vision_layers} layers: {sites}{note}")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What the passes did to an optimized model. Raises ValueError if it was not optimized.

    True on a warm compile cache too: the passes run before Inductor looks into it."""
    state = state_of(model)
    programs = state.programs
    records = state.backend.records + [program.spec.record for program in programs]
    fusions = {}
    own = {fusion.name: fusion for fusion in state.backend.config.fusions}
    for name, fusion in (SWITCHES | own).items():
        sites = fusion.sites(state.geometry) if programs or not fusion.packed else ()
        first = len(state.backend.records) if fusion.packed else 0  # the records of packed steps are the last
        enabled = name in own or name in state.backend.enabled
        if not enabled:
            fusions[name] = FusionReport(name, False, len(sites), 0, note=state.backend.config.why_off(name))
            continue
        unmatched = [
            u for i, record in enumerate(records[first:], first + 1) for u in unmatched_sites(record, fusion, sites, i)
        ]
        missing = {u.site for u in unmatched} if records else set(sites)
        fusions[name] = FusionReport(
            name,
            True,
            len(sites),
            len(sites) - len(missing),
            tuple(unmatched),
            tuple(line for i, record in enumerate(records, 1) for line in _left(record, name, i)),
            sum(fusion.launches_saved.get(s.rewrite, 0) for s in records[-1].matched(name) if not s.left) if records else 0,
            fusion.replaces,
        )
    seconds = sum(sum(record.seconds.values()) for record in records)
    loaded = sum(program.compiled == 0 for program in programs)
    whole = len(state.backend.records)
    pieces = whole + sum(program.spec.pieces for program in programs)
    unique = whole + sum(program.spec.unique_pieces for program in programs)
    ways = state.ways
    reasons = {way: tuple(why) for way, why in ways.reasons.items() if why}
    counts = len(programs), loaded, dict(ways.calls), reasons
    return Report(fusions, len(records) - loaded, pieces, unique, seconds, *counts, *_vision(state))


def _vision(state: CompiledModel) -> tuple[dict[str, int], int, str]:
    """Of a Report: its fields of the vision tower."""
    records, encoder = [program.spec.record for program in state.tower_programs], state.encoder
    if encoder is not None:
        records += encoder.records
    if not records:
        return {}, 0, "" if encoder is None else encoder.eager_reason
    enabled = (encoder or state).backend.enabled
    found = Counter(site.fusion for site in records[-1].sites if site.fusion in enabled and not site.left)
    layers = len({site_of(site.path) for site in records[-1].sites} - {WHOLE_MODEL})
    note = "" if encoder is None else encoder.eager_reason or encoder.note
    return dict(sorted(found.items())), layers, note


def unmatched_sites(record: Record, fusion: Fusion, sites: tuple[str, ...], graph: int = 1) -> list[Unmatched]:
    """The expected sites of one fusion that one graph lacks, with the nearest pattern's reason."""
    matched = {site_of(site.path) for site in record.matched(fusion.name) if fusion.promised(site.path)}
    return [Unmatched(site, graph, *_reason(record, fusion.name, site)) for site in sites if site not in matched]


def _left(record: Record, fusion: str, graph: int) -> list[str]:
    reasons = Counter(site.left for site in record.matched(fusion) if site.left)
    return [f"graph {graph}: {count} sites left as they are, {reason}" for reason, count in reasons.items()]


def _reason(record: Record, fusion: str, site: str) -> tuple[str, str]:
    near = [miss for miss in record.misses if miss.fusion == fusion and site_of(miss.path) == site]
    if not near:
        return "nothing like it in this layer's graph", ""
    nearest = min(near, key=lambda miss: miss.missing)
    return nearest.reason, nearest.source


def site_of(path: str) -> str:
    """`layers.N` of a module path, or `model` for what belongs to no layer."""
    found = _LAYER.search(path)
    return found.group() if found else WHOLE_MODEL
