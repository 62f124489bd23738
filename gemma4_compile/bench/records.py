"""What a call of the bench found: rows, as a table for people, as JSON, as a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .timings import Spread, Summary


@dataclass(frozen=True)
class Row:
    """One workload on one system.

    system          "ours", "url", or a peer's name
    mtp             "off", "on", or the tokens a round that acceptance is forced to
    floor_s         seconds of the floor; None where there is none to tell
    tokens_a_round  new tokens of a round on average, and the share of drafts accepted; None without drafts
    agreement       share of new tokens that plain Hugging Face's greedy choice at their place is; None: not asked
    memory          bytes by what they are for
    host_ms         what the host works on a step, on average, without waiting for the device; None: no engine of ours
    """

    system: str
    model: str
    mtp: str
    workload: str
    arrivals: str
    summary: Summary
    floor_s: float | None = None
    tokens_a_round: float | None = None
    acceptance: float | None = None
    agreement: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    host_ms: float | None = None

    @property
    def floor_ratio(self) -> float | None:
        """How many times the floor it took."""
        return None if not self.floor_s else self.summary.seconds / self.floor_s


_COLUMNS = (
    "system", "model", "MTP", "workload", "arrivals", "s", "tok/s", "TTFT", "p99", "TPOT", "p99", "ITL", "p99", "E2E", "p99",
    "host", "floor", "tok/round", "agree", "GiB", "failed",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """For people: latencies in ms, median and 99th percentile."""
    lines = [_COLUMNS, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    used = [i for i in range(len(_COLUMNS)) if any(line[i].strip("-0") for line in lines[1:])]
    return "\n".join("  ".join(line[i].ljust(widths[i]) if i < 5 else line[i].rjust(widths[i]) for i in used) for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    found = row.summary

    def number(value: float | None, form: str = ".1f") -> str:
        return "-" if value is None else format(value, form)

    def both(spread: Spread | None, form: str) -> tuple[str, str]:
        return ("-", "-") if spread is None else (format(spread.median, form), format(spread.p99, form))

    return (
        row.system, row.model, row.mtp, row.workload, row.arrivals, number(found.seconds, ".2f"),
        number(found.output_tokens_per_s, ".0f"), *both(found.ttft, ".0f"), *both(found.tpot, ".2f"), *both(found.itl, ".2f"),
        *both(found.e2e, ".0f"), number(row.host_ms, ".2f"), "-" if row.floor_ratio is None else f"x{row.floor_ratio:.2f}",
        number(row.tokens_a_round, ".2f"), "-" if row.agreement is None else f"{row.agreement:.1%}",
        number(sum(row.memory.values()) / 2**30 if row.memory else None, ".2f"), str(found.failed),
    )  # fmt: skip


def as_json(rows: Sequence[Row], **about: Any) -> str:
    """about  the machine, versions, the command"""
    listed = [asdict(row) | {"floor_ratio": row.floor_ratio} for row in rows]
    return json.dumps({**about, "rows": listed}, indent=1)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Throughput against latency, a line through the arrivals of each system, model and workload.

    path  its ending says the format: .png, .svg, .pdf

    Raises ImportError without matplotlib, ValueError for another ending."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib, got none; pip install 'gemma4-compile[bench]'") from error
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.summary.tpot is not None:
            name = f"{row.system} {row.model} {row.workload}" + ("" if row.mtp == "off" else f", MTP {row.mtp}")
            lines.setdefault(name, []).append(row)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, found in lines.items():
        points = [(row.summary.tpot.median, row.summary.output_tokens_per_s) for row in found if row.summary.tpot]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
        for row, point in zip(found, points, strict=True):
            axes.annotate(row.arrivals, point, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="median time per output token, ms", ylabel="output tokens a second", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
