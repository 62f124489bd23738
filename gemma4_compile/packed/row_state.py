"""What the device knows of running requests before the host does, by row of the page tables; and a step's inputs from it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .step_inputs import Placement, StepInputs


@dataclass(frozen=True)
class RowState:
    """
    last       [rows + 1] int64     the token sampled last; the last entry is for padding, here and below
    positions  [rows + 1] int64     its position, for requests that are drafted for
    drafts     [rows + 1, K] int64  what may follow it
    scores     [rows + 1, K, C] fp32: of the candidates that each draft was drawn from, over the temperature; None where no
               draft is drawn
    candidates [rows + 1, K, C] int64: their tokens; None where they are the vocabulary
    """

    last: Tensor
    positions: Tensor
    drafts: Tensor
    scores: Tensor | None = None
    candidates: Tensor | None = None

    @classmethod
    def empty(
        cls, rows: int, drafts: int, device: torch.device, candidates: int = 0, whole: bool = False
    ) -> "RowState":  # fmt: skip
        """candidates: C, 0 where no draft is drawn. whole: they are the vocabulary."""

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros((rows + 1, *size), dtype=dtype, device=device)

        drawn = (drafts, candidates) if candidates else None
        return cls(
            zeros(), zeros(), zeros(drafts), None if drawn is None else zeros(*drawn, dtype=torch.float32),
            None if drawn is None or whole else zeros(*drawn),
        )  # fmt: skip

    def resolve(self, step: StepInputs[Tensor], page_size: int) -> StepInputs[Tensor]:
        """The step with what the device knows of it: tokens that come from here, and, where there is a placement, positions and
        slots."""
        if step.sources is None:
            return step
        rows = step.sources.clamp(min=0)
        tokens, placement = self.last[rows], step.placement
        if placement is not None:
            drafted = self.drafts[rows, (placement.places - 1).clamp(min=0)]
            tokens = torch.where(placement.places > 0, drafted, tokens)
        step = replace(step, input_ids=torch.where(step.sources >= 0, tokens, step.input_ids[0])[None])
        return step if placement is None else self._placed(step, placement, rows, page_size)

    def _placed(
        self, step: StepInputs[Tensor], placement: Placement[Tensor], rows: Tensor, page_size: int
    ) -> StepInputs[Tensor]:  # fmt: skip
        placed = placement.places >= 0
        reached = self.positions[rows] + placement.places
        stored = reached < placement.capacities
        reached = torch.minimum(reached, placement.capacities - 1)
        slots = {}
        for kind, table in step.tables.items():
            page = (reached // page_size).clamp(0, table.shape[1] - 1)
            found = table[placement.requests, page].long() * page_size + reached % page_size
            slots[kind] = torch.where(placed, torch.where(stored, found, -1), step.slots[kind])
        return replace(step, positions=torch.where(placed, reached, step.positions), slots=slots)
