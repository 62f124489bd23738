"""Runs the one-shot all-reduce in two processes on shared memory, under Triton's interpreter; prints a line a form.

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

from gemma4_compile.ops import OPS
from gemma4_compile.ops.all_reduce_norm import FORMS, slot_bytes
from gemma4_compile.ops.examples import SMALL, example
from gemma4_compile.ops.symmetric import Workspace
from tests.ops.kernel_cases import outputs

RANKS, ROUNDS = 2, 12
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


def arguments(op: str, turn: int, rank: int, dtype: torch.dtype, tokens: int) -> list:
    """Of one rank: what is summed is its own, everything else is the same on all."""
    torch.manual_seed(turn)
    common = list(example(op, SMALL, tokens, dtype))
    torch.manual_seed(1000 * turn + rank)
    for i in range(FORMS[op].sums):
        common[i] = torch.randn(common[i].shape).to(dtype)
        common[i][..., 3] = -0.0  # which the memory holds before a row has come
    return common


def expected(op: str, turn: int, dtype: torch.dtype, tokens: int) -> tuple:
    """The op's own kernel over the sum of the ranks' parts."""
    parts = [arguments(op, turn, rank, dtype, tokens) for rank in range(RANKS)]
    sums = [sum(p[i].float() for p in parts).to(dtype) for i in range(FORMS[op].sums)]  # type: ignore[union-attr]
    return outputs(OPS[op].launch(*sums, *parts[0][FORMS[op].sums :]))


def rounds(rank: int, memories: dict[tuple[int, int], list[Tensor]]) -> None:
    torch.set_grad_enabled(False)
    random.seed(rank)
    spaces: dict[tuple[int, int], Workspace] = {}
    for (slot, size), shared in memories.items():
        spaces[slot, size] = space = Workspace(shared[rank], rank, RANKS, slot)
        space.addresses[:RANKS].copy_(torch.tensor([memory.data_ptr() for memory in shared]))
    for op in FORMS:
        try:
            kept = []
            for turn in range(ROUNDS):  # with nothing else between them, which would keep the ranks together
                dtype = (torch.bfloat16, torch.float32, torch.float16)[turn % 3]
                tokens = (1, 1, 3, 1, 2)[turn % 5]  # rows' turns differ; a lone row is soonest in its next turn
                mine = arguments(op, turn, rank, dtype, tokens)
                space = spaces[slot_bytes(mine[0], FORMS[op].sums), dtype.itemsize]
                kept.append((turn, dtype, tokens, outputs(FORMS[op].one_shot(space, *mine))))
            for turn, dtype, tokens, found in kept:
                for actual, wanted in zip(found, expected(op, turn, dtype, tokens), strict=True):
                    assert torch.equal(actual, wanted), f"rank {rank}, round {turn}"
            if rank == 0:
                print(f"{op}: ok", flush=True)
        except Exception as error:  # the other rank waits for this one: it is ended by the parent
            print(f"{op}: {type(error).__name__} {error}", flush=True)
            traceback.print_exc()
            sys.exit(1)


def main() -> None:
    memories: dict[tuple[int, int], list[Tensor]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for sums in (1, 2):
            slot = slot_bytes(torch.empty(1, SMALL.hidden, dtype=dtype), sums)
            shared = [torch.zeros(Workspace.size(slot, RANKS), dtype=torch.uint8).share_memory_() for _ in range(RANKS)]
            for rank, memory in enumerate(shared):
                Workspace(memory, rank, RANKS, slot).clear(dtype.itemsize)
            memories[slot, dtype.itemsize] = shared
    multiprocessing.spawn(rounds, args=(memories,), nprocs=RANKS)


if __name__ == "__main__":
    main()
