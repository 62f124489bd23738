"""The table of docs/demo.md, written from the records beside the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table: demo -->", "<!-- end -->"


def read_records(folder: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """metrics.json of each checkpoint below `folder`."""
    return [json.loads((folder / name / "metrics.json").read_text()) for name in names]


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: one column a checkpoint, one row a number."""

    def row(title: str, *values: object) -> str:
        return f"| {title} | " + " | ".join(map(str, values)) + " |"

    training = [record["training"] for record in records]
    measured = [record["measured"] for record in records]
    runs = [f"{run['device']}, torch {run['torch']}, transformers {run['transformers']}" for run in training]
    where = [f"{run['device']}, torch {run['torch']}, transformers {run['transformers']}" for run in measured]
    return "\n".join(
        [
            row("", *(f"`{record['model']}`" for record in records)),
            "|---" * (len(records) + 1) + "|",
            row("parameters: target", *(f"{record['parameters']['target']:,}" for record in records)),
            row("parameters: assistant", *(f"{record['parameters']['assistant']:,}" for record in records)),
            row("target: steps, seconds", *(f"{t['target']['steps']}, {t['target']['seconds']:.0f}" for t in training)),
            row(
                "assistant: steps, seconds",
                *(f"{t['assistant']['steps']}, {t['assistant']['seconds']:.0f}" for t in training),
            ),
            row("trained on", *runs),
            row("training loss at the end, nats/token", *(f"{t['target']['train_loss']:.3f}" for t in training)),
            row("held-out loss, nats/token", *(f"{m['held_out']['loss']:.3f}" for m in measured)),
            row("held-out loss, bits/byte", *(f"{m['held_out']['bits_per_byte']:.3f}" for m in measured)),
            row("accepted of 3 drafts, first 8 tokens", *(f"{m['accepted_in_first_8']['mean']:.2f}" for m in measured)),
            row("accepted of 3 drafts, 96 tokens", *(f"{m['accepted']['mean']:.2f}" for m in measured)),
            row("the same, drafts at position p", *(f"{m['accepted_at_position_p']['mean']:.2f}" for m in measured)),
            row("the same, `generate(assistant_model=...)`", *(_mean(m["accepted_hf"]) for m in measured)),
            row("measured on", *where),
        ]
    )


def write_table(document: Path, records: list[dict[str, Any]]) -> None:
    """Put the table between the two marks of `document`."""
    before, rest = document.read_text().split(BEGIN)
    document.write_text(f"{before}{BEGIN}\n{table(records)}\n{END}{rest.split(END)[1]}")


def _mean(accepted: dict[str, Any]) -> str:
    return f"{accepted['mean']:.2f}" if "mean" in accepted else accepted["error"]
