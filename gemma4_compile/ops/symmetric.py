"""Memory that all ranks of a group read directly, and the meeting of one program with its like on the other ranks.

Owns the layout of that memory and its protocol. It knows no norm: all_reduce_norm.py reads and adds the rows.

The one-shot all-reduce is the one that PyTorch's symmetric memory describes: each rank puts its part where the others can read
it, waits until all have, and reads all parts. NVLink multicast is not used, and not set up either.

A program owns a row, and meets the programs of that row on the other ranks; nothing waits for a whole grid. There are two slots
a row, used in turn: who writes a slot again has met all others once since, so they have read it, and a second meeting behind
the reading is not needed. How often a program has met is counted in memory, not by the host: a captured CUDA graph counts on.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .library import jit, tl

Made = TypeVar("Made")
MOST_RANKS = 16
MOST_ROWS = 512
_ADDRESSES = 8 * MOST_RANKS  # bytes at the start: where each rank's memory is, as this rank sees it
_COUNTS = 4 * MOST_ROWS  # then how often each row has met
FLAGS: int = _ADDRESSES + _COUNTS  # then how often each rank has come, [MOST_ROWS, MOST_RANKS]
DATA: int = FLAGS + 4 * MOST_ROWS * MOST_RANKS  # then the rows, [2, MOST_ROWS, slot]


@dataclass(frozen=True)
class Workspace:
    """One rank's memory for all-reduces of rows of up to `slot` bytes.

    memory   uint8, zero at first; the others read it
    rank     of this process in the group of `ranks`
    """

    memory: Tensor
    rank: int
    ranks: int
    slot: int

    @staticmethod
    def size(slot: int) -> int:
        """Bytes of the memory."""
        return DATA + 2 * MOST_ROWS * slot

    @property
    def addresses(self) -> Tensor:
        return self.memory[:_ADDRESSES].view(torch.int64)

    @property
    def counts(self) -> Tensor:
        return self.memory[_ADDRESSES:FLAGS].view(torch.int32)

    @property
    def flags(self) -> Tensor:
        return self.memory[FLAGS:DATA].view(torch.int32)


_WORKSPACES: dict[tuple[str, int, int], Workspace | None] = {}


def workspace(group: str, device: torch.device, slot: int) -> Workspace | None:
    """The workspace of a group, made at first use by all its ranks together; None where there can be none.

    It cannot be made while a CUDA graph is captured: run once before, as torch's own capture does."""
    key = (group, torch.cuda.current_device() if device.index is None else device.index, slot)
    if key not in _WORKSPACES:
        if torch.cuda.is_current_stream_capturing():
            warnings.warn(
                "the all-reduce in this CUDA graph is NCCL's: its memory cannot be made while a graph is captured; "
                "run the model once before the capture",
                stacklevel=2,
            )
            return None
        _WORKSPACES[key] = _make(group, device, slot)
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


def _make(group: str, device: torch.device, slot: int) -> Workspace | None:
    made = on_all_ranks(group, MOST_RANKS, lambda: _share(group, device, Workspace.size(slot)))
    if made is None:
        return None
    memory, rank, addresses = made
    done = Workspace(memory, rank, len(addresses), slot)
    done.addresses[: done.ranks].copy_(torch.tensor(addresses))
    torch.cuda.synchronize(device)
    return done


def _share(group: str, device: torch.device, size: int) -> tuple[Tensor, int, list[int]]:
    """Zeroed memory, this rank, and where each rank's memory is."""
    from torch._C._distributed_c10d import _SymmetricMemory

    # Not symm_mem.empty: its pool would have to stand beside that of a CUDA graph's warm-up.
    memory = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
    handle: Any = _SymmetricMemory.rendezvous(memory, group)
    assert handle is not None
    memory.zero_()
    torch.cuda.synchronize(device)
    return memory, handle.rank, list(handle.buffer_ptrs)


@jit
def slot_of(row, count, SLOT: tl.constexpr, DATA: tl.constexpr, MOST_ROWS: tl.constexpr):
    """Where a row's slot of this turn begins, in bytes."""
    return DATA + ((count & 1).to(tl.int64) * MOST_ROWS + row) * SLOT


@jit
def row_at(addresses_ptr, rank, offset, dtype: tl.constexpr):
    """The row at `offset` bytes of a rank's memory."""
    address = tl.load(addresses_ptr + rank) + offset
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)  # slots are; the compiler cannot see it


@jit
def meet(addresses_ptr, row, number, RANK: tl.constexpr, RANKS: tl.constexpr, FLAGS: tl.constexpr, MOST_RANKS: tl.constexpr):
    """Come for the number-th time, and wait until all ranks have. What each wrote before is seen by all behind it."""
    peer = tl.arange(0, MOST_RANKS)
    others = (peer < RANKS) & (peer != RANK)
    flags = FLAGS + row * (4 * MOST_RANKS)
    mine = tl.load(addresses_ptr + RANK) + flags + 4 * peer
    theirs = tl.load(addresses_ptr + peer, others, other=0) + flags + 4 * RANK
    tl.debug_barrier()  # a thread a rank signals for all of the program: the others have written by then
    tl.atomic_add(theirs.to(tl.pointer_type(tl.int32)), 1, others, sem="release", scope="sys")
    waiting = 1
    while waiting > 0:
        come = tl.atomic_add(mine.to(tl.pointer_type(tl.int32)), 0, others, sem="acquire", scope="sys")
        # A difference: counts wrap around, and a rank may be one meeting ahead.
        waiting = tl.sum((others & (come - number < 0)).to(tl.int32))
    tl.debug_barrier()  # and few threads have waited for all
