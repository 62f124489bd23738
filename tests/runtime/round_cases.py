"""Rounds of drafts for the tests of their kernels: a state of the rows, steps, and what a step's verification begins with."""

import random

import numpy as np
import torch
from torch import Tensor

from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.step_inputs import Placement, Speculation, StepInputs

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


def verification() -> tuple[Tensor, Tensor, StepInputs[Tensor]]:
    """Tokens [12] and hidden states [12, 40] of three requests' rows, and their step."""
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
    return tokens, hidden, given


def drafting() -> dict[str, Tensor]:
    """Buffers of a drafter for five requests."""
    out = {"tokens": torch.ones(5, dtype=torch.int64), "positions": torch.ones(5, dtype=torch.int64)}
    return out | {"hidden": torch.ones(5, 40)} | {f"table.{kind}": torch.zeros(5, WIDTH, dtype=torch.int32) for kind in KINDS}
