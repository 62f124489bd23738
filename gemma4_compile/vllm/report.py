"""What the passes did to vLLM's graphs: lines for its log, and a file beside each compiled graph that `vllm-report` prints."""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.fx import Graph

from gemma4_compile.geometry import WHOLE_MODEL, Geometry
from gemma4_compile.passes import Record
from gemma4_compile.patterns.rewrite import module_path
from gemma4_compile.reporting import FusionReport, Report, Unmatched, site_of, unmatched_sites

from .forms import FUSIONS

_FILE = "gemma4_compile.{}.json"
_PLE = "per_layer_projection_norm"  # vLLM's module, in the part of the model that has the per-layer inputs


def sites_in(graph: Graph, geometry: Geometry) -> dict[str, tuple[str, ...]]:
    """The sites that a graph promises, by fusion: of the layers that are in it, as a part of a model has not all."""
    paths = {module_path(node) for node in graph.nodes}
    present = {site_of(path) for path in paths if site_of(path) != WHOLE_MODEL}
    present |= {WHOLE_MODEL} if any(_PLE in path for path in paths) else set()
    return {name: tuple(site for site in fusion.sites(geometry) if site in present) for name, fusion in FUSIONS.items()}


def graph_report(record: Record, enabled: Collection[str], sites: Mapping[str, tuple[str, ...]]) -> Report:
    """Of one graph."""
    fusions = {}
    for name, fusion in FUSIONS.items():
        expected = sites.get(name, ())
        if name not in enabled:
            fusions[name] = FusionReport(name, False, len(expected), 0, note="switched off, or vLLM's own is on")
            continue
        matched = record.matched(name)
        saved = sum(fusion.launches_saved.get(site.rewrite, 0) for site in matched)
        unmatched = tuple(unmatched_sites(record, fusion, expected))
        fusions[name] = FusionReport(name, True, len(expected), len(matched), unmatched, (), saved, fusion.replaces)
    return Report(fusions, 1, 1, 1, sum(record.seconds.values()))


def lines(graph: str, report: Report) -> Iterator[str]:
    """For a log: one line, and one for each reason why sites were left."""
    counts = ", ".join(
        f"{name} {fusion.expected - len(fusion.unmatched)}/{fusion.expected}" if fusion.enabled else f"{name} off"
        for name, fusion in report.fusions.items()
    )
    yield f"gemma4-compile, {graph}: {counts} sites fused; passes took {report.seconds:.2f} s"
    for name, fusion in report.fusions.items():
        # Without names of nodes, which are others at each site.
        for reason, count in Counter(re.sub(r" \(\w+\)", "", site.reason) for site in fusion.unmatched).items():
            yield f"gemma4-compile, {graph}: {name} at {count} sites left: {reason}"


def write(folder: Path, graph: str, report: Report) -> None:
    """Beside vLLM's own files; a part that is written while it is read does no harm."""
    target = folder / _FILE.format(graph)
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"graph": graph, "report": asdict(report)}))
    unfinished.replace(target)


def cache_folder() -> Path:
    """Where vLLM keeps compiled graphs, by its variables."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("VLLM_CACHE_ROOT", home / "vllm")).expanduser() / "torch_compile_cache"


def written(folder: Path) -> list[tuple[Path, str, Report]]:
    """All reports below a folder, the newest last: (file, name of the graph, report)."""
    files = sorted(folder.rglob(_FILE.format("*")), key=lambda path: path.stat().st_mtime)
    found = ((path, json.loads(path.read_text())) for path in files)
    return [(path, data["graph"], _report(data["report"])) for path, data in found]


def _report(data: dict[str, Any]) -> Report:
    fusions = {}
    for name, fields in data.pop("fusions").items():
        unmatched = tuple(Unmatched(**site) for site in fields.pop("unmatched"))
        fusions[name] = FusionReport(**fields | {"unmatched": unmatched, "left": tuple(fields["left"])})
    return Report(fusions, **data)
