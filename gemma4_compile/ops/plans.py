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
    if width <= 4096:
        return (2, True) if width <= 2048 and rows > 1024 else (4, rows <= 1024)
    if 256 < rows <= 1024:
        return 2, True
    return 8, rows <= 256


def head_plan(rows: int, dim: int) -> tuple[int, int]:
    """Heads a program, warps of a kernel that norms and rotates heads."""
    if dim <= 256:
        return 8, 8
    return (1, 1) if rows <= 2048 else (2, 1)


def ple_inputs_plan(rows: int) -> tuple[int, int]:
    """Layers' rows a program, warps."""
    if rows <= 512:
        return 1, 1
    return (4, 4) if rows <= 65536 else (4, 1)


def route_plan(tokens: int) -> tuple[int, int]:
    """Tokens a program, warps: one warp holds a token, so that no reduction leaves the warp."""
    return (4, 4) if tokens <= 2048 else (2, 1)


class PlePlan(NamedTuple):
    """The two products of a PLE tail over few tokens; tokens, outputs and warps are a program's."""

    tokens: int
    gate_outputs: int
    gate_block: int
    gate_warps: int
    outputs: int
    warps: int


def ple_plan(rows: int, width: int) -> PlePlan | None:
    """None: enough tokens for cuBLAS."""
    if rows > (32 if width <= 2048 else 16):
        return None
    if rows <= 2:
        return PlePlan(tokens=1, gate_outputs=2, gate_block=256, gate_warps=4, outputs=16, warps=4)
    if rows <= 8:
        return PlePlan(tokens=1, gate_outputs=4, gate_block=256, gate_warps=4, outputs=32, warps=4)
    if rows <= 16 and width <= 2048:
        return PlePlan(tokens=2, gate_outputs=2, gate_block=256, gate_warps=4, outputs=32, warps=4)
    return PlePlan(tokens=2, gate_outputs=4, gate_block=256, gate_warps=4, outputs=32, warps=4)
