"""Pinned memory of the host: what a copy to the GPU reads may not change before the copy has run."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

_DEPTH = 3  # copies that may be under way before their memory is used again


class PinnedRing:
    """Memory for copies to one device, in turns."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._free: deque[tuple[Tensor, Any]] = deque()

    def take(self, size: int, at_least: int = 0) -> tuple[Tensor, Any]:
        """Bytes [size or more] that no copy reads any more, zeros at first, and what `sent` is to be given after the copy.

        at_least  what is allocated where there is none yet, for those whose sizes vary"""
        if len(self._free) == _DEPTH:
            memory, event = self._free.popleft()
            if event is not None:
                event.synchronize()
            if memory.numel() >= size:
                return memory, event
        memory = torch.zeros(max(size, at_least), dtype=torch.uint8, pin_memory=self._cuda)
        return memory, torch.cuda.Event() if self._cuda else None

    def sent(self, taken: tuple[Tensor, Any]) -> None:
        """The copy is under way."""
        if taken[1] is not None:
            taken[1].record()
        self._free.append(taken)
