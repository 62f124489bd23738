"""Runs the one-shot all-reduce in two processes on shared memory, under Triton's interpreter; prints a line a form.

Started by test_all_reduce.py. Each process is a rank; the memory is a GPU's in nothing but that both may read it."""

from __future__ import annotations

import tests.ops.interpret  # noqa: F401  isort: skip  (the switch, before Triton is imported, and the repairs)

import random
import sys
import time
import traceback
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
import triton.runtime.interpreter as interpreter
from torch import Tensor

from gemma4_compile.ops import OPS
from gemma4_compile.ops.all_reduce_norm import FORMS, slot_bytes
from gemma4_compile.ops.examples import SMALL, example
from gemma4_compile.ops.symmetric import Workspace
from tests.ops.kernel_cases import outputs

RANKS, ROUNDS = 2, 12
barrier = interpreter.InterpreterBuilder.create_barrier


def late_barrier(self: Any) -> Any:
    """A rank is late before it signals or before it reads, while the other goes on to its next row or its next call."""
    time.sleep(random.choice((0, 0, 0.02)))
    return barrier(self)


interpreter.InterpreterBuilder.create_barrier = late_barrier


def arguments(op: str, turn: int, rank: int, dtype: torch.dtype, tokens: int) -> list:
    """Of one rank: what is summed is its own, everything else is the same on all."""
    torch.manual_seed(turn)
    common = list(example(op, SMALL, tokens, dtype))
    torch.manual_seed(1000 * turn + rank)
    for i in range(FORMS[op].sums):
        common[i] = torch.randn(common[i].shape).to(dtype)
    return common


def expected(op: str, turn: int, dtype: torch.dtype, tokens: int) -> tuple:
    """The op's own kernel over the sum of the ranks' parts."""
    parts = [arguments(op, turn, rank, dtype, tokens) for rank in range(RANKS)]
    sums = [sum(p[i].float() for p in parts).to(dtype) for i in range(FORMS[op].sums)]  # type: ignore[union-attr]
    return outputs(OPS[op].launch(*sums, *parts[0][FORMS[op].sums :]))


def rounds(rank: int, memories: dict[int, list[Tensor]]) -> None:
    torch.set_grad_enabled(False)
    random.seed(rank)
    spaces: dict[int, Workspace] = {}
    for slot, shared in memories.items():
        spaces[slot] = Workspace(shared[rank], rank, RANKS, slot)
        spaces[slot].addresses[:RANKS].copy_(torch.tensor([memory.data_ptr() for memory in shared]))
    for op in FORMS:
        try:
            for turn in range(ROUNDS):
                dtype = (torch.bfloat16, torch.float32, torch.float16)[turn % 3]
                tokens = (3, 1, 4, 2)[turn % 4]  # rows meet at different counts
                mine = arguments(op, turn, rank, dtype, tokens)
                space = spaces[slot_bytes(mine[0], FORMS[op].sums)]
                found = outputs(FORMS[op].one_shot(space, *mine))
                for actual, wanted in zip(found, expected(op, turn, dtype, tokens), strict=True):
                    assert torch.equal(actual, wanted), f"rank {rank}, round {turn}"
            if rank == 0:
                print(f"{op}: ok", flush=True)
        except Exception as error:  # the other rank waits for this one: it is ended by the parent
            print(f"{op}: {type(error).__name__} {error}", flush=True)
            traceback.print_exc()
            sys.exit(1)


def main() -> None:
    slots = {slot_bytes(torch.empty(1, SMALL.hidden, dtype=dtype), sums) for dtype in (torch.float32,) for sums in (1, 2)}
    memories = {
        slot: [torch.zeros(Workspace.size(slot), dtype=torch.uint8).share_memory_() for _ in range(RANKS)] for slot in slots
    }
    # Where counts wrap around: a server meets 2**31 times in days.
    for slot, shared in memories.items():
        for rank, memory in enumerate(shared):
            space = Workspace(memory, rank, RANKS, slot)
            space.counts.fill_(2**31 - 5)
            space.flags.fill_(2**31 - 5)
    multiprocessing.spawn(rounds, args=(memories,), nprocs=RANKS)


if __name__ == "__main__":
    main()
