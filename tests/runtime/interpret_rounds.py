"""Runs the kernels of a round under Triton's interpreter and prints a line a case. Started by test_rounds.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.ops.interpret import run  # isort: skip  (before all that imports Triton: it switches the interpreter on)

import torch

from gemma4_compile.graphs.step_buffer import StepBuffer
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.runtime.speculative.verification import (
    _advance_into,
    _launch_advance,
    count_accepted,
    verified_drafts,
)
from tests.runtime.round_cases import DRAFTS, PAGE, WIDTH, drafting, state, step, verification


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
    tokens, hidden, given = verification()
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
        out = drafting()
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
