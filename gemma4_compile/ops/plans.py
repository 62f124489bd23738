"""Launch parameters by shape class: plain tables, measured with scripts/bench_ops.py. No autotuning at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .library import INTERPRETED


@functools.cache
def can_chain() -> bool:
    """Whether kernels of one op may overlap their prologues (programmatic dependent launch): Hopper and newer.

    Used between kernels of one op only, where it is plain which inputs an earlier kernel of the op wrote. Around the
    kernels of others it lost: 13.9 us against 12.9 for a PLE tail whose products are cuBLAS's (H200, CUDA graph).
    """
    return not INTERPRETED and torch.cuda.get_device_capability() >= (9, 0)


def row_plan(rows: int, width: int) -> tuple[int, bool]:
    """Warps, and whether the weights are loaded before the first reduction, of a kernel that holds a row a program.

    A lone row waits for memory once if all loads stand first; many rows want registers, for more programs an SM.
    """
    if rows <= 64:
        return (8 if width > 4096 else 4), True
    return (8 if width > 4096 else 4), False


def head_plan(rows: int, dim: int) -> tuple[int, int]:
    """Heads a program, warps of a kernel that norms and rotates heads."""
    if rows <= 1024:
        return 1, 1
    if dim > 256 or rows <= 4096:
        return 2, 1
    return 8, 8


def route_plan(tokens: int) -> tuple[int, int]:
    """Tokens a program, warps: one warp holds a token, so that no reduction leaves the warp."""
    return (4, 4) if tokens <= 2048 else (2, 1)


class PlePlan(NamedTuple):
    """The two products of a PLE tail over few tokens; outputs and tokens are a program's."""

    tokens: int
    splits: int
    gate_outputs: int
    gate_block: int
    gate_warps: int
    outputs: int
    warps: int


def ple_plan(rows: int, width: int) -> PlePlan | None:
    """None: enough tokens for cuBLAS."""
    if rows > 32:
        return None
    tokens = 1 if rows == 1 else 8 if rows <= 8 else 16
    return PlePlan(tokens, splits=4, gate_outputs=16, gate_block=128, gate_warps=4, outputs=16, warps=4)
