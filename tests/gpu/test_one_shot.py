"""The one-shot all-reduce on one GPU: streams stand for ranks. test_all_reduce.py is the same between GPUs."""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # before CUDA starts: no rank's launches wait behind another's

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from gemma4_compile.ops import OPS
from gemma4_compile.ops.all_reduce_norm import FORMS, slot_bytes
from gemma4_compile.ops.examples import SMALL, example
from gemma4_compile.ops.symmetric import DATA, Workspace
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


def arguments(op: str, turn: int, rank: int, dtype: torch.dtype) -> list[Any]:
    """What is summed is the rank's own, all else the same."""
    torch.manual_seed(turn)
    common = list(example(op, replace(SMALL, hidden=WIDTHS[turn % 3 == 2]), TOKENS[turn % 5], dtype, "cuda"))
    torch.manual_seed(1000 * turn + rank + 1)
    for i in range(FORMS[op].sums):
        common[i] = torch.randn_like(common[i])
        common[i][..., 3] = -0.0
    return common


def spaces_of(ranks: int, slot: int) -> list[Workspace]:
    memories = [torch.zeros(Workspace.size(slot, ranks), dtype=torch.uint8, device="cuda") for _ in range(ranks)]
    spaces = [Workspace(memory, rank, ranks, slot) for rank, memory in enumerate(memories)]
    for space in spaces:
        space.addresses[:ranks].copy_(torch.tensor([memory.data_ptr() for memory in memories]))
    return spaces


@pytest.mark.parametrize(("ranks", "op", "dtype"), CASES, ids=str)
def test_it_is_the_op_over_the_sum(ranks: int, op: str, dtype: torch.dtype) -> None:
    """Bit for bit on all ranks, in rounds that nothing waits between, with ranks that are late."""
    sums, form, late = FORMS[op].sums, FORMS[op].one_shot, random.Random(0)
    spaces = spaces_of(ranks, slot_bytes(torch.empty(1, WIDTHS[0], dtype=dtype), sums))
    streams = [torch.cuda.Stream() for _ in spaces]
    # No -0 in the memory: nobody waits, and all kernels are loaded before one may wait for another that is not.
    torch.cuda._sleep(1)
    for turn in range(15):
        for rank, space in enumerate(spaces):
            space.memory[DATA:].zero_()
            form(space, *arguments(op, turn, rank, dtype))
    addresses = spaces[0].addresses.clone()
    for space in spaces:
        space.clear(dtype.itemsize)
        space.addresses.copy_(addresses)
    for first in range(0, ROUNDS, BATCH):
        turns = range(first, first + BATCH)
        given = {(turn, rank): arguments(op, turn, rank, dtype) for turn in turns for rank in range(ranks)}
        found: dict[tuple[int, int], tuple] = {}
        torch.cuda.synchronize()
        for turn in turns:
            for rank, (space, stream) in enumerate(zip(spaces, streams, strict=True)):
                with torch.cuda.stream(stream):
                    if late.random() < 0.3:
                        torch.cuda._sleep(late.randrange(100_000))
                    found[turn, rank] = outputs(form(space, *given[turn, rank]))
        torch.cuda.synchronize()
        for turn in turns:
            parts = [given[turn, rank] for rank in range(ranks)]
            totals = []
            for i in range(sums):
                total = parts[0][i].float()
                for part in parts[1:]:
                    total = total + part[i].float()
                totals.append(total.to(dtype))
            wanted = outputs(OPS[op].launch(*totals, *parts[0][sums:]))
            for rank in range(ranks):
                for actual, expected in zip(found[turn, rank], wanted, strict=True):
                    assert torch.equal(actual, expected), f"rank {rank}, round {turn}"
