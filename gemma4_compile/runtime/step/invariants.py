"""GEMMA4_COMPILE_DEBUG=1: what must always hold, checked at every step, before a kernel can read where it must not."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from gemma4_compile.packed.step_inputs import StepInputs
from gemma4_compile.runtime.scheduling.pages import KVPages
from gemma4_compile.runtime.scheduling.sequence import ScheduledChunk

VARIABLE = "GEMMA4_COMPILE_DEBUG"


class BrokenInvariant(RuntimeError):
    """The engine's own fault: says which request, which layers and which index."""


def enabled() -> bool:
    return os.environ.get(VARIABLE, "") not in ("", "0")


def check_step(
    scheduled: Sequence[ScheduledChunk],
    step: StepInputs[np.ndarray],
    pages: KVPages,
    vocabulary: int,
    layers: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Raises BrokenInvariant if a step would read or write outside of its requests' pages, or embed what is no token.

    layers   of each kind, those that own pages, for messages
    """
    starts, size = step.starts, pages.page_size
    ids = step.input_ids[0] if step.sources is None else np.where(step.sources >= 0, 0, step.input_ids[0])
    for index, w in enumerate(scheduled):
        name = f"request {getattr(w.sequence.request, 'request_id', w.sequence.number)}"
        tokens = slice(int(starts[index]), int(starts[index + 1]))
        wrong = [int(i) for i in ids[tokens] if not 0 <= i < vocabulary]
        if wrong:
            raise BrokenInvariant(f"{name}: token ids must be 0 to {vocabulary - 1}, got {wrong[:3]}")
        positions = step.positions[tokens]
        if list(positions) != list(range(w.start, w.start + w.length)):
            raise BrokenInvariant(f"{name}: positions must be {w.start} to {w.start + w.length - 1}, got {positions}")
        for kind, pool in pages.pools.items():
            where = f"{name}, layers of {kind}{_listed(layers, kind)}"
            table, allocation = step.tables[kind][index], pages.allocations.get(w.row)
            first = pages.first_needed(kind, w.start)
            end = w.start + w.length - 1
            if w.ahead >= 0 and allocation is not None:  # tokens behind its room are nobody's
                end = min(end + w.ahead, allocation.capacity - 1)
            for page_index in range(first, end // size + 1):
                page = int(table[page_index])
                if not 0 <= page < pool.pages:
                    raise BrokenInvariant(f"{where}: page {page_index} must be 0 to {pool.pages - 1}, got {page}")
                if allocation is None or allocation.pages[kind][page_index] != page:
                    raise BrokenInvariant(f"{where}: page {page_index} must be one that it holds, got {page}")
            slots = step.slots[kind][tokens]
            wanted = table[positions // size].astype(np.int64) * size + positions % size
            if list(slots) != list(wanted):
                raise BrokenInvariant(f"{where}: slots must follow from its pages, got {slots} for {wanted}")
    for kind in pages.pools:
        slots, times = np.unique(step.slots[kind], return_counts=True)
        if (times > 1).any():
            raise BrokenInvariant(f"layers of {kind}: a slot is written once a step, got {slots[times > 1][:3]} twice")


def _listed(layers: Mapping[str, Sequence[int]] | None, kind: str) -> str:
    return f" ({', '.join(map(str, layers[kind]))})" if layers else ""
