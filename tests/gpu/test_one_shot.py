"""The one-shot all-reduce on one GPU: streams stand for ranks. test_all_reduce.py is the same between GPUs."""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # before CUDA starts: no rank's launches wait behind another's

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from gemma4_compile.ops.distributed.all_reduce_norm import FORMS, slot_bytes
from gemma4_compile.ops.distributed.symmetric import DATA, Workspace
from gemma4_compile.ops.examples import SMALL
from tests.ops.all_reduce_cases import arguments, over_the_sums
from tests.ops.kernel_cases import outputs

ROUNDS, BATCH = 1000, 50
WIDTHS = (2816, 2808)  # which share their places
TOKENS = (1, 8, 3, 16, 2)  # few enough that the programs of all ranks run at a time
CASES = [
    *((2, op, torch.bfloat16) for op in FORMS),
    (2, "post_attention_norms", torch.float32),
    (4, "post_attention_norms", torch.bfloat16),
    (4, "moe_feed_forward_tail_norm", torch.bfloat16),
    (8, "moe_feed_forward_tail_norm", torch.bfloat16),
]


def given(op: str, turn: int, rank: int, dtype: torch.dtype) -> list[Any]:
    sizes = replace(SMALL, hidden=WIDTHS[turn % 3 == 2])
    return arguments(op, sizes, TOKENS[turn % len(TOKENS)], dtype, "cuda", turn, rank)


@pytest.mark.parametrize(("ranks", "op", "dtype"), CASES, ids=str)
def test_it_is_the_op_over_the_sum(ranks: int, op: str, dtype: torch.dtype) -> None:
    """Bit for bit on all ranks, in rounds that nothing waits between, with ranks that are late."""
    form, late = FORMS[op], random.Random(0)
    slot = slot_bytes(torch.empty(1, WIDTHS[0], dtype=dtype), form.sums)
    memories = [torch.zeros(Workspace.size(slot, ranks), dtype=torch.uint8, device="cuda") for _ in range(ranks)]
    spaces = [Workspace(memory, rank, ranks, slot) for rank, memory in enumerate(memories)]
    streams = [torch.cuda.Stream() for _ in spaces]
    # No -0 in the memory: nobody waits, and all kernels are loaded before one may wait for another that is not.
    torch.cuda._sleep(1)
    for space in spaces:
        space.join([memory.data_ptr() for memory in memories])
    for turn in range(15):
        for rank, space in enumerate(spaces):
            space.memory[DATA:].zero_()
            form.one_shot(space, *given(op, turn, rank, dtype))
    for space in spaces:
        space.clear(dtype.itemsize)
    for first in range(0, ROUNDS, BATCH):
        turns = range(first, first + BATCH)
        parts = {turn: [given(op, turn, rank, dtype) for rank in range(ranks)] for turn in turns}
        found: dict[tuple[int, int], tuple] = {}
        torch.cuda.synchronize()
        for turn in turns:
            for rank, (space, stream) in enumerate(zip(spaces, streams, strict=True)):
                with torch.cuda.stream(stream):
                    if late.random() < 0.3:
                        torch.cuda._sleep(late.randrange(100_000))
                    found[turn, rank] = outputs(form.one_shot(space, *parts[turn][rank]))
        torch.cuda.synchronize()
        for turn in turns:
            wanted = over_the_sums(op, parts[turn])
            for rank in range(ranks):
                for actual, expected in zip(found[turn, rank], wanted, strict=True):
                    assert torch.equal(actual, expected), f"rank {rank}, round {turn}"
