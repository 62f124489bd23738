"""Stands in for CUDA graphs on a CPU: the same contract, kept by calling the function again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class HostRecorder:
    """Records what was captured. As on a GPU, a replay reads its inputs where they were, and writes where it wrote before."""

    def __init__(self) -> None:
        self.recorded = 0

    def warm_up(self, function: Callable[[], Any]) -> None:
        function()

    def record(self, function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        self.recorded += 1
        with torch.no_grad():
            kept = list(function())

        def replay() -> None:
            with torch.no_grad():
                for old, new in zip(kept, function(), strict=True):
                    old.copy_(new)

        return replay, kept

    def borrow(self, tensor: Tensor) -> Tensor:
        return tensor
