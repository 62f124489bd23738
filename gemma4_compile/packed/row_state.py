"""What the device knows of running requests before the host does, by row of the page tables; and a step's inputs from it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import KINDS

# Of each token that is placed by the state; beside the inputs of batch.py.
PLACED = ("places", "owners", "capacities")
# Of each request that gets drafts, see runtime/speculative/verification.py.
ROUND = ("round_rows", "requests", "first", "counts", "states", "room")


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

    def tokens(self, ids: Tensor, sources: Tensor, places: Tensor | None = None) -> Tensor:
        """Tokens [T]: those of the rows named in `sources`, and of `ids` where that is negative.

        places  [T] int64: i above 0 is the row's i-th draft; any other its last token
        """
        rows = sources.clamp(min=0)
        found = self.last[rows]
        if places is not None and self.drafts.shape[1]:
            drafted = self.drafts[rows, (places - 1).clamp(min=0)]
            found = torch.where(places > 0, drafted, found)
        return torch.where(sources >= 0, found, ids)

    def place(self, step: Mapping[str, Tensor], page_size: int) -> dict[str, Tensor]:
        """Positions and slots of a step, where `places` is not negative from the state: the row's position, so many further.

        step   inputs of batch.py, `sources`, and those of PLACED, each [T] int64: request of the token in the page tables, and
               tokens that this has pages for. What lies behind those is nobody's token, and is stored nowhere
        """
        places, capacities = step["places"], step["capacities"]
        placed = places >= 0
        reached = self.positions[step["sources"].clamp(min=0)] + places
        stored = reached < capacities
        reached = torch.minimum(reached, capacities - 1)
        found = {"positions": torch.where(placed, reached, step["positions"])}
        for kind in KINDS:
            table = step[f"table.{kind}"]
            page = (reached // page_size).clamp(0, table.shape[1] - 1)
            slots = table[step["owners"], page].long() * page_size + reached % page_size
            slots = torch.where(stored, slots, -1)
            found[f"slots.{kind}"] = torch.where(placed, slots, step[f"slots.{kind}"])
        return found
