"""Launch parameters by shape class: plain tables, measured with scripts/bench_ops.py. No autotuning at run time."""

from __future__ import annotations

from typing import Any, NamedTuple

from .library import INTERPRETED

PDL = False


def pdl_options() -> dict[str, Any]:
    """Launch keywords that switch programmatic dependent launch, and the constexpr that tells the kernel so."""
    return {"PDL": True, "launch_pdl": True} if PDL and not INTERPRETED else {"PDL": False}


def row_plan(rows: int, block: int) -> tuple[int, int]:
    """Programs and warps of a kernel that norms rows of `block` elements, a row at a time."""
    return rows, max(4, min(16, block // 256))


def head_plan(rows: int, dim: int) -> tuple[int, int]:
    """Heads a program, warps of a kernel that norms and rotates heads."""
    return (1, 1) if rows <= 2048 else (4, 4)


def route_plan(tokens: int) -> tuple[int, int]:
    """Tokens a program, warps: one warp holds a token, so that no reduction leaves the warp."""
    return (1, 1) if tokens <= 1024 else (4, 4)


class PlePlan(NamedTuple):
    """The two kernels of a PLE tail over few tokens: rows a group, outputs a program, warps."""

    rows: int
    gate_outputs: int
    gate_warps: int
    outputs: int
    warps: int


def ple_plan(rows: int, width: int) -> PlePlan | None:
    """None: too many tokens for one program a few outputs; matrix products by cuBLAS then."""
    if rows > 16:
        return None
    return PlePlan(rows=1 if rows <= 4 else 2, gate_outputs=2, gate_warps=4, outputs=16, warps=4)
