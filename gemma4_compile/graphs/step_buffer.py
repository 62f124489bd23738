"""StepBuffer: what a FULL step needs of the host in one buffer, so one copy brings it. The GPU unpacks it.

Page tables come as wide as the longest request at hand, and tokens that the step before sampled or drafted never went to the
host, nor where they stand.
"""

from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from gemma4_compile.ops.library import jit, power_of_two, tl
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.pinned import PinnedRing
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.step_inputs import Placement, Speculation, StepInputs, leaves, rebuilt

# Fields of StepInputs as long as there are tokens, by their paths; `starts` and the tables have places of their own.
_TOKENS = ("input_ids", "positions", "rows", *(f"slots.{kind}" for kind in KINDS), "sources", "targets")
_PLACEMENT = tuple(f"placement.{field.name}" for field in fields(Placement))
_SPECULATION = tuple(f"speculation.{field.name}" for field in fields(Speculation))
_HEAD = 2  # int64 before the tokens: width of the tables, unused


@jit
def _unpack_kernel(
    packed_ptr, last_ptr, reached_ptr, drafts_ptr, ids_ptr, table_a_ptr, table_b_ptr, positions_at, slots_a_at, slots_b_at,
    sources_at, places_at, owners_at, capacities_at, tables_at, width_limit, tokens, TOKENS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, CARRIED: tl.constexpr, DRAFTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Program (r, kind) widens one request's page table; program (0, 2) takes each token from the host or from the rows' state,
    and places those that the state places."""
    request = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    width = tl.load(packed_ptr)
    tables_ptr = (packed_ptr + tables_at).to(tl.pointer_type(tl.int32))
    if kind == 2:
        token = tl.arange(0, TOKENS_BLOCK)
        inside = (token < tokens) & (request == 0)
        given = tl.load(packed_ptr + 2 + token, inside, other=0)
        if CARRIED:
            source = tl.load(packed_ptr + sources_at + token, inside, other=-1)
            given = tl.where(source >= 0, tl.load(last_ptr + source, inside & (source >= 0), other=0), given)
            if DRAFTS > 0:
                place = tl.load(packed_ptr + places_at + token, inside, other=-1)
                placed = inside & (place >= 0)
                drafted = tl.load(drafts_ptr + source * DRAFTS + place - 1, placed & (place > 0), other=0)
                given = tl.where(placed & (place > 0), drafted, given)
                capacity = tl.load(packed_ptr + capacities_at + token, placed, other=1)
                owner = tl.load(packed_ptr + owners_at + token, placed, other=0)
                reached = tl.load(reached_ptr + source, placed, other=0) + place
                position = tl.minimum(reached, capacity - 1)
                tl.store(packed_ptr + positions_at + token, position, placed)
                entry_ptr = tables_ptr + owner * width + position // PAGE
                for table in tl.static_range(2):
                    page = tl.load(entry_ptr + table * tokens * width, placed, other=0).to(tl.int64)
                    slot = tl.where(reached < capacity, page * PAGE + position % PAGE, -1)
                    tl.store(packed_ptr + (slots_a_at if table == 0 else slots_b_at) + token, slot, placed)
        tl.store(ids_ptr + token, given, inside)
        return
    source_ptr = tables_ptr + (kind * tokens + request) * width
    target_ptr = (table_a_ptr if kind == 0 else table_b_ptr) + request * width_limit
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(target_ptr + column, tl.load(source_ptr + column, column < width, other=0), column < width)


class _Layout:
    """Where the inputs of so many tokens lie in a buffer of int64."""

    def __init__(self, tokens: int, width: int, names: tuple[str, ...]):
        self.tokens = tokens
        even = tokens + tokens % 2  # each begins at 16 bytes: compiled pieces copy an input that does not
        self.at = {name: _HEAD + i * even for i, name in enumerate(names)}
        self.starts = _HEAD + len(names) * even
        self.tables = self.starts + 2 * ((tokens + 4) // 4)
        self.size = self.tables + len(KINDS) * (tokens * width + 1) // 2 + 1

    def used(self, width: int) -> int:
        """int64 to be copied for tables of this width."""
        return self.tables + (len(KINDS) * self.tokens * width + 1) // 2

    def table(self, index: int, width: int) -> slice:
        """Of int32: the compact table of a kind."""
        start = 2 * self.tables + index * self.tokens * width
        return slice(start, start + self.tokens * width)


class StepBuffer:
    """Static inputs of a step of so many tokens.

    tables     by kind, [tokens or more, pages] int32, where tables are widened to
    state      of the rows, which tokens come from; None: all come from the host
    page_size  tokens
    views      the step as the model sees it, once `unpack` has run
    """

    def __init__(self, tokens: int, tables: Mapping[str, Tensor], state: RowState | None, page_size: int):
        self._tables, self._state, self._page_size = tables, state, page_size
        device, width = tables[KINDS[0]].device, tables[KINDS[0]].shape[1]
        drafted = state is not None and state.drafts.shape[1] > 0
        self._layout = layout = _Layout(tokens, width, _TOKENS + (_PLACEMENT + _SPECULATION if drafted else ()))
        self._buffer = torch.zeros(layout.size, dtype=torch.int64, device=device)
        self._ring = PinnedRing(device)
        at = {name: self._buffer[place : place + tokens] for name, place in layout.at.items()}
        self._given = at["input_ids"]  # as the host sent them: those of `views` may be the state's
        starts = self._buffer[layout.starts : layout.tables].view(torch.int32)
        self.views: StepInputs[Tensor] = StepInputs(
            torch.zeros((1, tokens), dtype=torch.int64, device=device), at["positions"], at["rows"], starts[: tokens + 1],
            {kind: at[f"slots.{kind}"] for kind in KINDS}, {kind: tables[kind][:tokens] for kind in KINDS}, at["targets"],
            at["sources"], Placement(*(at[name] for name in _PLACEMENT)) if drafted else None,
            Speculation(*(at[name] for name in _SPECULATION)) if drafted else None,
        )  # fmt: skip
        self._arrays = leaves(self.views)

    def send(self, step: StepInputs[np.ndarray] | None) -> None:
        """One copy of a step, padded. None is padding alone."""
        layout, tokens = self._layout, self._layout.tokens
        taken = self._ring.take(8 * layout.size)
        pinned = taken[0].view(torch.int64)
        host = pinned.numpy()
        arrays = {} if step is None else leaves(step)
        padding = {"rows": tokens - 1, "sources": -1, "targets": -1 if self._state is None else len(self._state.last) - 1}
        padding |= {"placement.places": -1} | {f"slots.{kind}": -1 for kind in KINDS}
        for name, at in layout.at.items():
            given = arrays.get(name)
            length = 0
            if given is not None:
                length = given.shape[-1]
                host[at : at + length] = given
            host[at + length : at + tokens] = padding.get(name, 0)
        starts = host[layout.starts : layout.tables].view(np.int32)
        requests = 0 if step is None else step.starts.shape[0] - 1
        starts[: requests + 1] = 0 if step is None else step.starts
        starts[requests + 1 : tokens + 1] = 0 if step is None else step.positions.shape[0]
        width = 1 if step is None else max(table.shape[1] for table in step.tables.values())
        for index, kind in enumerate(KINDS):
            table = host.view(np.int32)[layout.table(index, width)].reshape(tokens, width)
            if step is None:
                table[:] = 0
            else:
                table[:requests, : step.tables[kind].shape[1]] = step.tables[kind]
        host[0] = width
        used = layout.used(width)
        self._buffer[:used].copy_(pinned[:used], non_blocking=True)
        self._ring.sent(taken)

    def unpack(self) -> None:
        """Make `views` of what was sent and of the state."""
        if self._buffer.is_cuda:
            self._launch_unpack()
            return
        layout, views = self._layout, self.views
        width = int(self._buffer[0])
        for index, kind in enumerate(KINDS):
            compact = self._buffer.view(torch.int32)[layout.table(index, width)]
            self._tables[kind][: layout.tokens, :width] = compact.view(layout.tokens, width)
        step = replace(views, input_ids=self._given[None])
        if self._state is not None:
            step = self._state.resolve(step, self._page_size)
        views.input_ids.copy_(step.input_ids)
        views.positions.copy_(step.positions)
        for kind in KINDS:
            views.slots[kind].copy_(step.slots[kind])

    def seen(self, step: StepInputs[np.ndarray]) -> StepInputs[Tensor]:
        """The step that was sent as the model saw it, without padding, but for tables, which stay as they are here."""
        cut = {}
        for name, given in leaves(step).items():
            whole = self._arrays[name]
            cut[name] = whole[: given.shape[0]] if given.ndim == 1 else whole
        return rebuilt(step, cut)

    def _launch_unpack(self) -> None:
        layout, buffer = self._layout, self._buffer
        state = RowState(buffer, buffer, buffer) if self._state is None else self._state
        drafts = 0 if self._state is None else state.drafts.shape[1]
        names = ("positions", *(f"slots.{kind}" for kind in KINDS), "sources", *_PLACEMENT)
        tables = [self._tables[kind] for kind in KINDS]
        _unpack_kernel[(layout.tokens, len(KINDS) + 1)](
            buffer, state.last, state.positions, state.drafts, self.views.input_ids, *tables,
            *(layout.at.get(name, 0) for name in names), layout.tables, tables[0].shape[1], layout.tokens,
            max(16, power_of_two(layout.tokens)), 256, self._state is not None, drafts, self._page_size,
        )  # fmt: skip
