"""Runs the one-shot all-reduce in processes on shared memory, under Triton's interpreter; prints a line a form.

Started by test_all_reduce.py. Each process is a rank; the memory is a GPU's in nothing but that both may read it."""

from __future__ import annotations

import tests.ops.interpret  # noqa: F401  isort: skip  (the switch, before Triton is imported, and the repairs)

import random
import sys
import time
import traceback
from typing import Any

import numpy
import torch
import torch.multiprocessing as multiprocessing
import triton.runtime.interpreter as interpreter
from torch import Tensor

from gemma4_compile.ops.distributed.all_reduce_norm import FORMS, slot_bytes
from gemma4_compile.ops.distributed.symmetric import Workspace
from gemma4_compile.ops.examples import SMALL
from tests.ops.all_reduce_cases import arguments, over_the_sums
from tests.ops.kernel_cases import outputs

RANKS = {op: 2 + i % 2 for i, op in enumerate(FORMS)}  # the kernel of two ranks looks first, that of more in its loop
ROUNDS = 12
Memories = dict[tuple[int, int, int], list[Tensor]]  # of ranks, slot, bytes of an element: each rank's
load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store


def late_load(self: Any, *arguments: Any) -> Any:
    """A rank is late before it looks for the other's rows, while the other goes on to its next row or its next call."""
    if arguments[-1]:  # volatile
        time.sleep(random.choice((0, 0, 0.01)))
    return load(self, *arguments)


def late_store(self: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
    """Part of a row is seen before the rest. Where room is made (integers), the other rank may come to its next call."""
    first, second = (interpreter.TensorHandle(mask.data & half, mask.dtype) for half in halves(mask.data))
    store(self, pointers, values, second, *rest)
    time.sleep(random.choice((*[0] * 9, 0.4) if values.dtype.is_int() else (0, 0, 0, 0.005)))
    return store(self, pointers, values, first, *rest)


def halves(mask: Any) -> tuple[Any, Any]:
    first = numpy.arange(mask.size).reshape(mask.shape) < mask.size // 8
    return first, ~first


interpreter.InterpreterBuilder.create_masked_load = late_load
interpreter.InterpreterBuilder.create_masked_store = late_store


def rounds(rank: int, memories: Memories) -> None:
    torch.set_grad_enabled(False)
    random.seed(rank)
    spaces = {key: Workspace(shared[rank], rank, *key[:2]) for key, shared in memories.items() if rank < key[0]}
    for key, space in spaces.items():
        space.join([memory.data_ptr() for memory in memories[key]])
    for op, ranks in RANKS.items():
        if rank >= ranks:
            continue
        try:
            kept = []
            for turn in range(ROUNDS):  # with nothing else between them, which would keep the ranks together
                dtype = (torch.bfloat16, torch.float32, torch.float16)[turn % 3]
                tokens = (1, 1, 3, 1, 2)[turn % 5]  # rows' turns differ; a lone row is soonest in its next turn
                mine = arguments(op, SMALL, tokens, dtype, "cpu", turn, rank)
                space = spaces[ranks, slot_bytes(mine[0], FORMS[op].sums), dtype.itemsize]
                kept.append((turn, dtype, tokens, outputs(FORMS[op].one_shot(space, *mine))))
            for turn, dtype, tokens, found in kept:
                parts = [arguments(op, SMALL, tokens, dtype, "cpu", turn, each) for each in range(ranks)]
                for actual, wanted in zip(found, over_the_sums(op, parts), strict=True):
                    assert torch.equal(actual, wanted), f"rank {rank}, round {turn}"
            if rank == 0:
                print(f"{op}: ok", flush=True)
        except Exception as error:  # the others wait for this one: they are ended by the parent
            print(f"{op}: {type(error).__name__} {error}", flush=True)
            traceback.print_exc()
            sys.exit(1)


def main() -> None:
    memories: Memories = {}
    for ranks in set(RANKS.values()):
        for dtype in (torch.bfloat16, torch.float32):
            for sums in (1, 2):
                slot = slot_bytes(torch.empty(1, SMALL.hidden, dtype=dtype), sums)
                shared = [torch.zeros(Workspace.size(slot, ranks), dtype=torch.uint8).share_memory_() for _ in range(ranks)]
                for rank, memory in enumerate(shared):
                    Workspace(memory, rank, ranks, slot).clear(dtype.itemsize)
                memories[ranks, slot, dtype.itemsize] = shared
    multiprocessing.spawn(rounds, args=(memories,), nprocs=max(RANKS.values()))


if __name__ == "__main__":
    main()
