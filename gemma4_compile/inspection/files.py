"""The output folder: written beside its place and moved there when it is whole, so that nothing half-written is left behind."""

import contextlib
import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .capture import CompiledGraph
from .data import Inspection
from .page import render
from .tables import catalogue_table

# All that an inspection may write, so that --force replaces these and touches no other file.
ENTRIES = ("report.html", "inspection.json", "catalogue.txt", "graphs", "inductor", "depyf", "trace.json", "trace_plain.json")


def check_folder(out: Path, force: bool) -> None:
    """Raises ValueError if `out` cannot become an output folder: it is a file, not writable, or holds something."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"the output must be a folder, got the file {out}; choose another path")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ValueError(f"the output folder must be empty, got {out} with files in it; use force (--force) or another folder")
    place = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"the output folder must be writable, got {out} ({reason} in {place}); choose another path") from None


@contextmanager
def whole_or_nothing(out: Path, entries: Sequence[str] = ENTRIES) -> Iterator[Path]:
    """A folder to write to. What it holds is moved to `out` when the block ends well, in the place of older `entries`;
    otherwise it is gone, and so is every folder made for it."""
    out = out.resolve()
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=out))
    try:
        yield draft
        with tempfile.TemporaryDirectory(prefix=".old-", dir=out) as old:
            for name in entries:
                if os.path.lexists(out / name):
                    os.replace(out / name, Path(old) / name)
            for name in os.listdir(draft):
                os.replace(draft / name, out / name)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):  # another writer may have put something there meanwhile
            for folder in made:  # the innermost first
                folder.rmdir()
        raise
    draft.rmdir()


def write(folder: Path, found: Inspection, graphs: Mapping[str, CompiledGraph], decompiled: Mapping[str, str]) -> None:
    """All files but the traces, which the profiler writes itself.

    graphs       variant -> its compiled graph
    decompiled   file name -> Python that Dynamo made of the step
    """
    (folder / "report.html").write_text(render(found), encoding="utf-8")
    (folder / "inspection.json").write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
    (folder / "catalogue.txt").write_text(catalogue_table(found, None) + "\n", encoding="utf-8")
    for variant, graph in graphs.items():
        code = folder / "inductor" / f"{variant}.py"
        code.parent.mkdir(exist_ok=True)
        code.write_text(graph.code, encoding="utf-8")
        _write_stages(folder / "graphs" / variant, graph.stages)
    (folder / "depyf").mkdir()
    for name, text in decompiled.items():
        (folder / "depyf" / name).write_text(text, encoding="utf-8")


def _write_stages(folder: Path, stages: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True)
    before = ""
    for number, (name, text) in enumerate(stages):
        (folder / f"{number:02}_{name}.py").write_text(text, encoding="utf-8")
        if number and name != "post_grad":  # AOT rewrites every line: a diff over it says nothing
            (folder / f"{number:02}_{name}.diff").write_text(diff(before, text, stages[number - 1][0], name), encoding="utf-8")
        before = text


def diff(before: str, after: str, from_name: str, to_name: str) -> str:
    """A unified diff of two readable graphs; empty if they are the same."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), from_name, to_name, lineterm="", n=2)
    return "\n".join(lines)


def changed_lines(before: str, after: str) -> int:
    """Lines that a pass added or took away."""
    return sum(
        line[:1] in "+-" and not line.startswith(("+++", "---")) for line in diff(before, after, "", "").splitlines() if line
    )
