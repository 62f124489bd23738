"""Memory that all ranks of a group write directly, and how a program gets the rows of its like on the other ranks.

Owns the layout of that memory and its protocol. It knows no norm: all_reduce_norm.py adds the rows up.

Each rank writes its row into the memory of all others and reads theirs from its own. A row has come when no element of it is -0
any more: that is what the memory holds before, and rows are sent without it. So each element is its own flag: there is no fence
and no meeting, a row takes one way over NVLink. Nothing waits for a whole grid. NVLink multicast is not used, and not set up
either.

A program owns a row number, and meets the programs of that number on the other ranks. There are three places a row, used in
turn. In a turn, a program fills the place of the turn before with -0 again: it has read it, and none of the others writes there
before it has had this program's row of the next turn. Whose turn it is lies in memory, not with the host: a captured CUDA graph
goes on with it.

Source: the Lamport kernels of TensorRT-LLM, in https://github.com/flashinfer-ai/flashinfer/blob/main/include/flashinfer/comm/
trtllm_allreduce_fusion.cuh
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemma4_compile.ops.library import constant, jit, tl

Made = TypeVar("Made")
MOST_RANKS = 16
MOST_ROWS = 512
TURNS = 3
_ADDRESSES = 8 * MOST_RANKS  # bytes at the start: where each rank's memory is, as this rank sees it
DATA: int = _ADDRESSES + 4 * MOST_ROWS  # behind each row's turn: the rows, [TURNS, MOST_ROWS, ranks, slot]
_LAST_TURN, _MOST_ROWS, _DATA = constant(TURNS - 1), constant(MOST_ROWS), constant(DATA)


@dataclass(frozen=True)
class Workspace:
    """One rank's memory for all-reduces of rows of up to `slot` bytes.

    memory   uint8 [size], which the others write; `clear` it before any of them does
    rank     of this process in the group of `ranks`
    """

    memory: Tensor
    rank: int
    ranks: int
    slot: int

    @staticmethod
    def size(slot: int, ranks: int) -> int:
        """Bytes of the memory."""
        return DATA + TURNS * MOST_ROWS * ranks * slot

    @property
    def addresses(self) -> Tensor:
        return self.memory[:_ADDRESSES].view(torch.int64)

    @property
    def turns(self) -> Tensor:
        return self.memory[_ADDRESSES:DATA].view(torch.int32)

    def join(self, addresses: Sequence[int]) -> None:
        """addresses: of each rank's memory, as this rank sees it."""
        self.addresses[: self.ranks].copy_(torch.tensor(addresses))

    def clear(self, itemsize: int) -> None:
        """No row has come, and the first turn is next. itemsize: bytes of an element, 2 or 4."""
        self.turns.zero_()
        kind = {2: torch.int16, 4: torch.int32}[itemsize]
        self.memory[DATA:].view(kind).fill_(torch.iinfo(kind).min)  # the bits of -0


_WORKSPACES: dict[tuple[str, int, int, int], Workspace | None] = {}


def workspace(group: str, device: torch.device, slot: int, itemsize: int) -> Workspace | None:
    """The workspace of a group for elements of `itemsize` bytes, made at first use by all its ranks together; None where there
    can be none.

    It cannot be made while a CUDA graph is captured: run once before, as torch's own capture does."""
    key = (group, torch.cuda.current_device() if device.index is None else device.index, slot, itemsize)
    if key not in _WORKSPACES:
        if torch.cuda.is_current_stream_capturing():
            warnings.warn(
                "the all-reduce in this CUDA graph is NCCL's: its memory cannot be made while a graph is captured; "
                "run the model once before the capture",
                stacklevel=2,
            )
            return None
        _WORKSPACES[key] = _make(group, device, slot, itemsize)
    return _WORKSPACES[key]


def forget() -> None:
    """Give all workspaces back, before their process group is destroyed."""
    _WORKSPACES.clear()


def on_all_ranks(group: str, most: int, make: Callable[[], Made]) -> Made | None:
    """What `make` returns, on each rank of a group; None and a warning if it fails on one, or for ranks on several hosts.

    Collective: all ranks or none, and none goes on before all have made theirs. NVLink multicast is off from here on."""
    import torch.distributed as dist

    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # read when memory is shared; some hosts must not set it up
    processes = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    hosts: list[Any] = [None] * processes.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=processes)
    made, reason = None, ""
    if len(hosts) > most:
        reason = f"it has more than {most} ranks"
    elif len(set(hosts)) > 1:
        reason = "its ranks are on several hosts"
    else:
        try:
            made = make()
        except Exception as error:  # no peer access, no driver support: NCCL is always there
            reason = " ".join(str(error).split())[:200] or type(error).__name__
    reasons: list[Any] = [None] * len(hosts)
    dist.all_gather_object(reasons, reason, group=processes)
    reason = next((r for r in reasons if r), "")
    if reason and processes.rank() == 0:
        warnings.warn(f"all-reduces of group {group} stay with NCCL: {reason}", stacklevel=2)
    return None if reason else made


def _make(group: str, device: torch.device, slot: int, itemsize: int) -> Workspace | None:
    return on_all_ranks(group, MOST_RANKS, lambda: _share(group, device, slot, itemsize))


def _share(group: str, device: torch.device, slot: int, itemsize: int) -> Workspace:
    import torch.distributed as dist
    from torch._C._distributed_c10d import _SymmetricMemory

    size = Workspace.size(slot, dist.distributed_c10d._resolve_process_group(group).size())  # type: ignore[arg-type]
    # Not symm_mem.empty: its pool would have to stand beside that of a CUDA graph's warm-up.
    memory = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
    handle: Any = _SymmetricMemory.rendezvous(memory, group)
    assert handle is not None
    addresses = list(handle.buffer_ptrs)
    space = Workspace(memory, handle.rank, len(addresses), slot)
    space.clear(itemsize)
    space.join(addresses)
    torch.cuda.synchronize(device)  # all ranks meet behind this, before any writes
    return space


@jit
def place_of(turn, row, rank, RANKS: tl.constexpr, SLOT: tl.constexpr):
    """Where a rank's row of a turn lies in the memory of any rank, in bytes."""
    return _DATA + ((turn.to(tl.int64) * _MOST_ROWS + row) * RANKS + rank) * SLOT


@jit
def row_at(addresses_ptr, rank, place, dtype: tl.constexpr):
    """The row at `place` of a rank's memory."""
    address = tl.load(addresses_ptr + rank) + place
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)  # slots are; the compiler cannot see it


@jit
def turn_after(turn):
    return tl.where(turn == _LAST_TURN, 0, turn + 1)


@jit
def sendable(chunks):
    """A row without -0."""
    out = ()
    for i in tl.static_range(len(chunks)):
        out += (tl.where(chunks[i] == 0, 0.0, chunks[i]).to(chunks[i].dtype),)
    return out


@jit
def _minus_zero(SIZE: tl.constexpr, bits: tl.constexpr):
    """The bits of -0."""
    return tl.full((SIZE,), -(1 << (bits.primitive_bitwidth - 1)), bits)


@jit
def send(
    rows, addresses_ptr, turn, row, RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Sendable rows of WIDTH, one behind the other in `rows`, to all others; and room for theirs in two turns."""
    dtype: tl.constexpr = rows[0].dtype
    CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    place = place_of(turn, row, RANK, RANKS, SLOT)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            for i in tl.static_range(len(rows)):
                column = i % CHUNKS * CHUNK + tl.arange(0, CHUNK)
                part = row_at(addresses_ptr, rank, place + i // CHUNKS * (SLOT // 2), dtype)
                tl.store(part + column, rows[i], column < WIDTH)
    bits: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    SIZE: tl.constexpr = SLOT * 8 // dtype.primitive_bitwidth  # all of the slot: rows of other widths may share it
    read = turn_after(turn_after(turn))
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            old = row_at(addresses_ptr, RANK, place_of(read, row, rank, RANKS, SLOT), bits)
            for i in tl.static_range((SIZE + CHUNK - 1) // CHUNK):
                column = i * CHUNK + tl.arange(0, CHUNK)
                tl.store(old + column, _minus_zero(CHUNK, bits), column < SIZE)


@jit
def _look(
    rows, addresses_ptr, place, RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The sums as far as rows have come, and how many elements have not."""
    dtype: tl.constexpr = rows[0].dtype
    bits: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    sums = ()
    missing = tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(len(rows)):
        column = i % CHUNKS * CHUNK + tl.arange(0, CHUNK)
        total = tl.zeros((CHUNK,), tl.float32)
        for rank in tl.static_range(RANKS):
            if rank == RANK:
                part = rows[i]
            else:
                come = row_at(addresses_ptr, RANK, place + (rank * SLOT + i // CHUNKS * (SLOT // 2)), bits)
                found = tl.load(come + column, column < WIDTH, other=0, volatile=True)
                missing += (found == _minus_zero(CHUNK, bits)).to(tl.int32)
                part = found.to(dtype, bitcast=True)
            total += part.to(tl.float32)
        sums += (total.to(dtype),)  # type: ignore[assignment]
    return sums, tl.sum(missing)


@jit
def receive(
    rows, addresses_ptr, turns_ptr, turn, row, RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sums over the ranks of the rows that were sent, in the ranks' order, in fp32 and rounded once. Ends the turn."""
    place = place_of(turn, row, 0, RANKS, SLOT)
    if RANKS == 2:  # a first look in front of the loop is faster here; with eight ranks it takes three times as long to compile
        sums, missing = _look(rows, addresses_ptr, place, RANK, RANKS, SLOT, WIDTH, CHUNK)
    else:
        sums, missing = rows, tl.full((), 1, tl.int32)
    while missing > 0:
        sums, missing = _look(rows, addresses_ptr, place, RANK, RANKS, SLOT, WIDTH, CHUNK)
    tl.store(turns_ptr + row, turn_after(turn))
    return sums
