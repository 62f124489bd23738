"""FULL graphs: a whole step whose rows are all wanted (decode, MTP verification), by token bucket, as one CUDA graph.

What such a step needs of the host lies in one buffer, so one copy brings it. The graph unpacks it: page tables come as wide as
the longest request at hand, and tokens that the step before sampled or drafted never went to the host, nor where they stand.
Where a state of the rows is given, the graph ends with the greedy tokens, put where the next step finds them.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemma4_compile.ops.library import jit, power_of_two, tl
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.program import StepResult
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.step_inputs import Placement, Speculation, StepInputs, leaves

# Fields of StepInputs as long as there are tokens, by their paths; `starts` and the tables have places of their own.
_TOKENS = ("input_ids", "positions", "rows", *(f"slots.{kind}" for kind in KINDS), "sources", "targets")
_PLACEMENT = tuple(f"placement.{field.name}" for field in fields(Placement))
_SPECULATION = tuple(f"speculation.{field.name}" for field in fields(Speculation))
_HEAD = 2  # int64 before the tokens: width of the tables, unused
_DEPTH = 3  # copies that may be under way before their pinned memory is used again


class FullResult(NamedTuple):
    """logits [1, N, vocabulary], greedy tokens [N] (None without a state of the rows), final-normed states [N, H], and the
    step's inputs as the model saw them, without its sampling; valid until the next step."""

    logits: Tensor
    tokens: Tensor | None
    hidden: Tensor
    inputs: StepInputs[Tensor]


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


class _Packed:
    """The inputs of a bucket in one buffer of int64; numpy and torch views of it have the same places."""

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


class _Bucket:
    """Static inputs of so many tokens, as the model sees them."""

    def __init__(self, packed: _Packed, tables: Mapping[str, Tensor], device: torch.device):
        tokens = packed.tokens
        self.packed, self.buffer = packed, torch.zeros(packed.size, dtype=torch.int64, device=device)
        self.ids = torch.zeros((1, tokens), dtype=torch.int64, device=device)
        at = {name: self.buffer[at : at + tokens] for name, at in packed.at.items()}
        self.given = at["input_ids"]  # as the host sent them: `ids` takes those of the state too
        starts = self.buffer[packed.starts : packed.tables].view(torch.int32)
        drafted = _PLACEMENT[0] in at
        self.views: StepInputs[Tensor] = StepInputs(
            self.ids, at["positions"], at["rows"], starts[: tokens + 1], {kind: at[f"slots.{kind}"] for kind in KINDS},
            {kind: tables[kind][:tokens] for kind in KINDS}, at["targets"], at["sources"],
            Placement(*(at[name] for name in _PLACEMENT)) if drafted else None,
            Speculation(*(at[name] for name in _SPECULATION)) if drafted else None,
        )  # fmt: skip
        self.host: list[Tensor] = []
        self.events: list[Any] = []
        self.turn = 0
        self.replay: Callable[[], None] | None = None
        self.result: FullResult | None = None

    def pinned(self) -> tuple[Tensor, Any]:
        """Memory of the host that no copy reads any more, and the event of the copy to come."""
        if len(self.host) < _DEPTH:
            cuda = self.buffer.is_cuda
            self.host.append(torch.zeros(self.packed.size, dtype=torch.int64, pin_memory=cuda))
            self.events.append(torch.cuda.Event() if cuda else None)
            return self.host[-1], self.events[-1]
        self.turn = (self.turn + 1) % _DEPTH
        if self.events[self.turn] is not None:
            self.events[self.turn].synchronize()
        return self.host[self.turn], self.events[self.turn]


def greedy(logits: Tensor) -> Tensor:
    """The likeliest tokens, of logits that are all here."""
    return logits.argmax(-1)


class FullGraphs:
    """Graphs of one program's FULL steps.

    program   gives logits and final-normed states for a bucket's inputs
    memory    keys and values, by name
    sizes     buckets, in tokens; ascending
    width     pages that a request may have
    recorder  captures; see cuda_graphs.py
    state     of the rows, which tokens come from and go to. None: no tokens are sampled
    argmax    of logits [N, vocabulary], or of the part of them that a rank has
    """

    def __init__(
        self, program: Callable[[dict[str, Tensor]], StepResult], memory: dict[str, Tensor], sizes: tuple[int, ...], width: int,
        recorder: Any, device: torch.device, state: RowState | None = None, argmax: Callable[[Tensor], Tensor] = greedy,
    ):  # fmt: skip
        self.program, self.memory, self.recorder, self.state, self.width = program, memory, recorder, state, width
        self.argmax = argmax
        self.last = None if state is None else state.last
        self._drafts = 0 if state is None else state.drafts.shape[1]
        self._names = _TOKENS + (_PLACEMENT + _SPECULATION if self._drafts else ())
        self._page_size = next(iter(memory.values())).shape[1]
        most = max(sizes, default=1)
        self._tables = {kind: torch.zeros((most, width), dtype=torch.int32, device=device) for kind in KINDS}
        self._device = device
        self._before: Tensor | None = None
        self._buckets: dict[int, _Bucket] = {}

    def bucket(self, tokens: int) -> _Bucket:
        if tokens not in self._buckets:
            self._buckets[tokens] = _Bucket(_Packed(tokens, self.width, self._names), self._tables, self._device)
        return self._buckets[tokens]

    def compare(self, tokens: int) -> tuple[StepResult, StepResult]:
        """What a replay gives, and the program on the same inputs, which are unpacked anew for it."""
        bucket = self.bucket(tokens)
        self._before = None if self.last is None else self.last.clone()
        replayed = self.run(tokens)
        actual = StepResult(replayed.logits.clone(), replayed.hidden.clone())
        sampled = None if self.last is None else self.last.clone()
        self.restore()
        self._unpack(bucket)
        expected = self.program(bucket.views.model() | self.memory)
        if self.last is not None and sampled is not None:
            self.last.copy_(sampled)
        return actual, expected

    def restore(self) -> None:
        """Take back what the step that was compared has sampled."""
        if self.last is not None and self._before is not None:
            self.last.copy_(self._before)

    def send(self, tokens: int, step: StepInputs[np.ndarray] | None) -> None:
        """One copy of a step to the bucket of so many tokens, padded. None is padding alone."""
        bucket = self.bucket(tokens)
        packed = bucket.packed
        pinned, event = bucket.pinned()
        host = pinned.numpy()
        arrays = {} if step is None else dict(leaves(step))
        padding = {"rows": tokens - 1, "sources": -1, "targets": -1 if self.last is None else len(self.last) - 1}
        padding |= {"placement.places": -1} | {f"slots.{kind}": -1 for kind in KINDS}
        for name, at in packed.at.items():
            given = arrays.get(name)
            length = 0
            if given is not None:
                length = given.shape[-1]
                host[at : at + length] = given
            host[at + length : at + tokens] = padding.get(name, 0)
        starts = host[packed.starts : packed.tables].view(np.int32)
        requests = 0 if step is None else step.starts.shape[0] - 1
        starts[: requests + 1] = 0 if step is None else step.starts
        starts[requests + 1 : tokens + 1] = 0 if step is None else step.positions.shape[0]
        width = 1 if step is None else max(table.shape[1] for table in step.tables.values())
        for index, kind in enumerate(KINDS):
            table = host.view(np.int32)[packed.table(index, width)].reshape(tokens, width)
            if step is None:
                table[:] = 0
            else:
                table[:requests, : step.tables[kind].shape[1]] = step.tables[kind]
        host[0] = width
        used = packed.used(width)
        bucket.buffer[:used].copy_(pinned[:used], non_blocking=True)
        if event is not None:
            event.record()

    def run(self, tokens: int) -> FullResult:
        """The bucket's step, captured if it is its first time."""
        bucket = self.bucket(tokens)
        if bucket.replay is None:
            self.recorder.warm_up(lambda: self._step(bucket))
            bucket.replay, results = self.recorder.record(lambda: self._step(bucket))
            logits, hidden, *sampled = map(self.recorder.borrow, results)
            bucket.result = FullResult(logits, sampled[0] if sampled else None, hidden, bucket.views)
        bucket.replay()
        return self.result(tokens)

    def result(self, tokens: int) -> FullResult:
        """Where the bucket's last step left its results."""
        result = self.bucket(tokens).result
        assert result is not None, "a bucket has run before its result is asked for"
        return result

    def _step(self, bucket: _Bucket) -> list[Tensor]:
        self._unpack(bucket)
        logits, hidden = self.program(bucket.views.model() | self.memory)
        if self.last is None:
            return [logits, hidden]
        tokens = self.argmax(logits[0])
        self.last.index_copy_(0, bucket.views.targets, tokens)
        return [logits, hidden, tokens]

    def _unpack(self, bucket: _Bucket) -> None:
        packed, buffer, views = bucket.packed, bucket.buffer, bucket.views
        if buffer.is_cuda:
            self._launch_unpack(bucket)
            return
        tables = [self._tables[kind] for kind in KINDS]
        width = int(buffer[0])
        for index, table in enumerate(tables):
            compact = buffer.view(torch.int32)[packed.table(index, width)]
            table[: packed.tokens, :width] = compact.view(packed.tokens, width)
        step = replace(views, input_ids=bucket.given[None])
        if self.state is not None:
            step = self.state.resolve(step, self._page_size)
        bucket.ids.copy_(step.input_ids)
        views.positions.copy_(step.positions)
        for kind in KINDS:
            views.slots[kind].copy_(step.slots[kind])

    def _launch_unpack(self, bucket: _Bucket) -> None:
        packed, buffer = bucket.packed, bucket.buffer
        state = RowState(buffer, buffer, buffer) if self.state is None else self.state
        names = ("positions", *(f"slots.{kind}" for kind in KINDS), "sources", *_PLACEMENT)
        _unpack_kernel[(packed.tokens, len(KINDS) + 1)](
            buffer, state.last, state.positions, state.drafts, bucket.ids, *(self._tables[kind] for kind in KINDS),
            *(packed.at.get(name, 0) for name in names), packed.tables, self.width, packed.tokens,
            max(16, power_of_two(packed.tokens)), 256, self.state is not None, self._drafts, self._page_size,
        )  # fmt: skip
