"""Runs the kernels of a round under Triton's interpreter and prints a line a case. Started by test_rounds.py."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.ops.interpret import run  # isort: skip  (before all that imports Triton: it switches the interpreter on)

import numpy as np
import torch

from gemma4_compile.graphs.step_buffer import StepBuffer
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.step_inputs import Placement, Speculation, StepInputs
from gemma4_compile.runtime.speculative.verification import (
    _advance_into,
    _launch_advance,
    count_accepted,
    verified_drafts,
)

ROWS, DRAFTS, PAGE, WIDTH = 5, 3, 4, 6


def state(drafts: int) -> RowState:
    found = RowState.empty(ROWS, drafts, torch.device("cpu"))
    for tensor, most in ((found.last, 90), (found.positions, WIDTH * PAGE), (found.drafts, 90)):
        tensor.copy_(torch.randint(0, most, tensor.shape))
    return found


def step(drafts: int) -> StepInputs[np.ndarray]:
    """Requests of which some are placed by the state, up to behind their room; the others come with all that they are."""
    chooser = random.Random(drafts)
    arrays: dict[str, list[int]] = {name: [] for name in ("sources", "places", "owners", "capacities")}
    starts = [0]
    for request, row in enumerate(chooser.sample(range(ROWS), 4)):
        placed = drafts > 0 and request != 2
        length = chooser.randint(1, 1 + drafts) if placed else 1
        arrays["sources"] += [row] * length if request != 3 or placed else [-1]
        arrays["places"] += range(length) if placed else [-1]
        arrays["owners"] += [request] * length
        arrays["capacities"] += [PAGE * chooser.randint(1, WIDTH)] * length
        starts.append(starts[-1] + length)
    tokens = starts[-1]
    given = {name: np.array(values) for name, values in arrays.items()}
    tables = {kind: np.random.default_rng(len(kind)).integers(0, 50, (4, WIDTH - 1)).astype(np.int32) for kind in KINDS}
    return StepInputs(
        np.arange(100, 100 + tokens)[None], np.arange(tokens), np.arange(tokens), np.array(starts, np.int32),
        {kind: np.arange(tokens) + 7 for kind in KINDS}, tables, np.arange(tokens) % ROWS, given["sources"],
        Placement(given["places"], given["owners"], given["capacities"]) if drafts else None,
    )  # fmt: skip


def unpacks(drafts: int) -> None:
    """The kernel's ids, positions, slots and tables are those of plain torch; 16 tokens in a bucket, part of them padding."""
    torch.manual_seed(drafts)
    tables = {kind: torch.zeros(16, WIDTH, dtype=torch.int32) for kind in KINDS}
    buffer = StepBuffer(16, tables, state(drafts), PAGE)
    found: list[dict[str, Any]] = []
    for unpack in (buffer.unpack, buffer._launch_unpack):
        buffer.send(step(drafts))
        for table in tables.values():
            table.zero_()
        unpack()
        names = ("input_ids", "positions", *(f"{name}.{kind}" for kind in KINDS for name in ("slots", "table")))
        found.append({name: buffer.views.model()[name].clone() for name in names})
    for name, wanted in found[0].items():
        assert torch.equal(found[1][name], wanted), name


def advances(counts: bool) -> None:
    """State and drafter's inputs are those of plain torch; two requests behind the last are padding. counts: so is how many
    drafts are accepted."""
    torch.manual_seed(0)
    hidden, width = torch.randn(12, 40), 3
    tokens = torch.randint(0, 90, (12,))
    nothing = torch.zeros(0, dtype=torch.int64)
    given = StepInputs(
        nothing[None], torch.arange(12) + 5, torch.arange(12), nothing, {},
        {kind: torch.randint(0, 50, (3, width), dtype=torch.int32) for kind in KINDS}, nothing,
        speculation=Speculation(
            state_rows=torch.tensor([3, 0, 4]), requests=torch.tensor([2, 0, 1]), first=torch.tensor([0, 4, 9]),
            counts=torch.tensor([3, 3, 1]), wanted=torch.tensor([0, 4, 9]), capacities=torch.tensor([6, 24, 24]),
        ),
    )  # fmt: skip
    results = []
    for function in (_advance_into, partial(_launch_advance, counts=counts)):
        torch.manual_seed(1)
        kept = state(DRAFTS)
        accepted = torch.tensor([3, 0, 1])
        if counts:
            assert given.speculation is not None
            # All three right; none, though the later ones are; one, and no more are verified though the next would be right.
            kept.drafts[[3, 0, 4]] = torch.stack((tokens[0:3], tokens[4:7], tokens[9:12]))
            kept.drafts[0, 0] += 1
            assert count_accepted(tokens, given.speculation.first, verified_drafts(kept, given.speculation)).equal(accepted)
            if function is not _advance_into:
                accepted.fill_(-7)
        out = {"tokens": torch.ones(5, dtype=torch.int64), "positions": torch.ones(5, dtype=torch.int64)}
        out |= {"hidden": torch.ones(5, 40)} | {f"table.{kind}": torch.zeros(5, WIDTH, dtype=torch.int32) for kind in KINDS}
        function(kept, tokens, hidden, given, accepted, out)
        results.append(out | {"last": kept.last, "reached": kept.positions, "accepted": accepted})
    for name, wanted in results[0].items():
        assert torch.equal(results[1][name], wanted), name


CASES: dict[str, Callable[[], None]] = {
    "unpack": partial(unpacks, 0),
    "unpack drafts": partial(unpacks, DRAFTS),
    "advance": partial(advances, False),
    "count and advance": partial(advances, True),
}

if __name__ == "__main__":
    run(CASES)
