"""Launch parameters by shape class: plain tables, measured with scripts/bench_ops.py. No autotuning at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch

PROCESSORS = 132  # of an H200


def row_plan(rows: int, width: int) -> tuple[int, bool]:
    """Warps, and whether the weights are loaded before the first reduction, of a kernel that holds a row a program.

    A lone row waits for memory once if all loads stand first; many rows want registers, for more programs an SM.
    """
    if width <= 4096:
        return (2, True) if width <= 2048 and rows > 1024 else (4, rows <= 1024)
    if 256 < rows <= 1024:
        return 2, True
    return 8, rows <= 256


def one_shot_plan(rows: int, width: int) -> tuple[int, bool]:
    """row_plan for programs that wait for other ranks: many rows gain nothing from fewer warps. At 512 rows of 5376 on two
    H200s, eight took 22.8 us where two, which spill, took 25.4."""
    return row_plan(min(rows, 256), width)


def one_shot_pays(rows: int, row_bytes: int, ranks: int) -> bool:
    """Whether each rank sends its part to all others itself: one launch, but (ranks - 1) times the bytes, where a ring moves
    less than twice. On two H200s it took half of NCCL's time at 512 rows of 11 KB; on four as long as NCCL at 256
    (benchmarks/all-reduce-h200.json). With more ranks it is not measured."""
    return 1 < ranks <= 8 and rows <= 512 and rows * row_bytes * (ranks - 1) <= (2**23 if ranks <= 4 else 2**21)


def head_plan(rows: int, dim: int) -> tuple[int, int]:
    """Heads a program, warps of a kernel that norms and rotates heads. Many small ones, of image patches, want several elements
    a thread: at 8192 patches 57 us of a tower of 768 became 34 on an H200, 88 of one of 1152 became 56."""
    if dim < 128 and rows > 32768:
        return (32, 2) if dim <= 64 else (16, 4)
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


class PleDotPlan(NamedTuple):
    """The same with tensor cores: tokens a program (8 or 16 of each product), slices of the columns that are summed apart, at
    least as many as the gate's warps; of the projection a warp has 16 outputs."""

    gate_tokens: int
    gate_slices: int
    gate_warps: int
    tokens: int
    slices: int
    warps: int


def ple_plan(rows: int, width: int, p: int, itemsize: int) -> PlePlan | PleDotPlan | None:
    """Of p inputs for each of so many tokens. None: enough tokens for cuBLAS."""
    if rows > 2 and _ple_dots(rows, width, p, itemsize):
        # A program for each processor while that can be; of 16 tokens only what registers hold. Sums of four chains each.
        gate_tokens = 16 if rows > 32 and width <= 3072 else 8
        tokens, slices = (16, 2) if rows > 32 and p <= 256 else (8, 4)
        return PleDotPlan(gate_tokens, gate_slices=16, gate_warps=8, tokens=tokens, slices=slices, warps=4)
    if rows > (32 if width <= 2048 else 16):
        return None
    return _ple_few(rows, width)


def _ple_dots(rows: int, width: int, p: int, itemsize: int) -> bool:
    """fp32 has no tensor cores that add exactly; a program has all weights of its outputs in registers."""
    return itemsize == 2 and rows <= 128 and width <= 4096 and p <= 512


def _ple_few(rows: int, width: int) -> PlePlan:
    if rows <= 2:
        return PlePlan(tokens=1, gate_outputs=2, gate_block=256, gate_warps=4, outputs=16, warps=4)
    if rows <= 8:
        return PlePlan(tokens=1, gate_outputs=4, gate_block=256, gate_warps=4, outputs=32, warps=4)
    if rows <= 16 and width <= 2048:
        return PlePlan(tokens=2, gate_outputs=2, gate_block=256, gate_warps=4, outputs=32, warps=4)
    return PlePlan(tokens=2, gate_outputs=4, gate_block=256, gate_warps=4, outputs=32, warps=4)


def norms_inside(rows: int, width: int) -> bool:
    """Whether the programs of a product norm their x themselves: as many and as wide as was measured."""
    return rows <= 2 and width <= 2048


def norm_ple_plan(rows: int, width: int) -> PlePlan | None:
    """Of a gate whose programs norm their row themselves. None: a kernel for the norm, and both products by ple_plan."""
    # The norm's operations are divided among the program's threads: blocks of a multiple of their number.
    return _ple_few(rows, width)._replace(gate_block=512) if norms_inside(rows, width) else None


class VectorPlan(NamedTuple):
    """Products of one or two rows: weight rows a program, and blocks of columns that it loads at a time."""

    outputs: int
    block: int
    blocks: int
    warps: int


class DotPlan(NamedTuple):
    """Products of up to `tokens` rows with tensor cores: weight rows a program, columns a block; a block for each slice."""

    tokens: int
    outputs: int
    block: int
    slices: int
    warps: int
    stages: int


class HopperProductsPlan(NamedTuple):
    """Products of up to `tokens` rows, 64 or 128, with `outputs` rows of weights a tile, whose columns `splits` programs share,
    `block` at a time: ops/fusions/linear_hopper.py."""

    tokens: int
    outputs: int
    splits: int = 1
    block: int = 64


def product_plan(
    rows: int, matrices: int, outputs: int, width: int, gated: bool, itemsize: int, hopper: bool = False
) -> VectorPlan | DotPlan | HopperProductsPlan | None:
    """Of products of one x with matrices that have `outputs` rows in all; gated: two of those make an output; hopper: whether
    Hopper's kernel takes them. None: cuBLAS.

    Measured with scripts/bench_linear.py; tests/ops/test_measured.py holds it to benchmarks/linear-h200.json, and on Hopper to
    products-h200.json.
    """
    few = rows == 1 or rows == 2 and not gated and outputs < 8192 and width % 512 == 0 and width <= 16384
    if few:
        return _vector_plan(outputs, width, gated)
    dot = _dot_plan(rows, matrices, outputs, width, gated) if rows <= 32 and itemsize < 4 else None
    own = _hopper_products_plan(rows, matrices, outputs, width, gated) if hopper and rows <= 128 else None
    if own is None or dot is None:
        return own or dot
    # Up to 32 rows both can: the other starts sooner, Hopper's moves more bytes if all processors have a part.
    balanced = _at_work(outputs, own.outputs) > 0.75
    if gated:
        return own if rows > 16 and balanced and outputs < 32768 else dot
    if matrices > 1:
        return own if outputs < 4096 or rows > 16 and balanced else dot
    return own if 2112 < outputs < 8192 or width >= 8192 > outputs else dot


def _at_work(outputs: int, size: int) -> float:
    """The share of processors that work, in the rounds that all tiles of a product take."""
    tiles = -(-outputs // size)
    return tiles / (-(-tiles // PROCESSORS) * PROCESSORS)


def _dot_plan(rows: int, matrices: int, outputs: int, width: int, gated: bool) -> DotPlan | None:
    tokens = 16 if rows <= 16 else 32
    if outputs >= 8192 or matrices > 1 and not (gated and rows <= 16):
        deep = gated and outputs >= 8192 and width < 4096
        return DotPlan(tokens, outputs=64, block=64 if deep else 128, slices=1, warps=4, stages=6 if deep else 4)
    if rows > 16 or outputs > 2048 and width < 2816 or width > 16384:
        return None
    return DotPlan(tokens, outputs=16, block=128 if width % 512 == 0 else 64, slices=4, warps=4, stages=4)


def _hopper_products_plan(rows: int, matrices: int, outputs: int, width: int, gated: bool) -> HopperProductsPlan | None:
    """Tiles that leave few processors idle; a long matrix's columns divided among programs; None where cuBLAS is as fast."""
    few = rows <= 64
    tokens, block = (64, 128) if few else (128, 64)
    if gated or matrices > 1 or outputs >= (8192 if few else 32768):
        small = [32] if outputs <= 32 * PROCESSORS else []  # not worth a second round
        size = max([*([256] if gated else []), 128, 64, *small], key=lambda size: _at_work(outputs, size))
        return HopperProductsPlan(tokens, size, 1, 128 if size == 32 else block)
    if 2048 <= outputs <= 32 * PROCESSORS and width <= (8192 if few else 2816):
        return HopperProductsPlan(tokens, 32, 1, 128)
    if 512 < outputs < 2048 and width <= 4096:
        if few:
            return HopperProductsPlan(tokens, 16, 1, 256)
        return HopperProductsPlan(tokens, 16, 1, 128) if width <= 2048 else HopperProductsPlan(tokens, 32, 2, 128)
    size = 64 if outputs <= 64 * PROCESSORS // 2 or few and width <= 8192 else 128
    shares = max(1, min(PROCESSORS // -(-outputs // size), width // (2 * block), 12))
    if outputs > 512 and not few and (width < 8192 or rows > 96 and not 2048 <= outputs <= 32 * PROCESSORS):
        return None
    return HopperProductsPlan(tokens, size, shares, block)


def _vector_plan(outputs: int, width: int, gated: bool) -> VectorPlan:
    if (width >= 4096 or outputs <= 512) and not gated:
        return VectorPlan(outputs=1, block=1024, blocks=2, warps=4)
    if outputs >= 4096 and width % 1536 == 0:
        return VectorPlan(outputs=4, block=256, blocks=6, warps=2)
    return VectorPlan(outputs=2, block=512, blocks=4 if width % 2048 == 0 else 3, warps=4)


def norm_products_plan(rows: int, outputs: int, width: int, gated: bool) -> VectorPlan | None:
    """Of products whose programs norm their x themselves. None: a kernel for the norm, and one by product_plan.

    Each program does the norm's operations, some 25 instructions for an element of the row, where one of a row of weights takes
    3 (machine code for width 1536), so programs have more rows of weights than a product's alone, and wide rows, many outputs
    and more rows than product_plan gives to programs without tensor cores are left out. E2B on an H200, all three fusions: a
    step of one row takes 73 us less of 1551 (benchmarks/normed-h200.json).
    """
    if not norms_inside(rows, width) or outputs > 32768:
        return None
    few = 8 if outputs > 1024 else 4  # 256 of a PLE gate are programs of 4
    return VectorPlan(outputs=16 if gated else few, block=512, blocks=-(-width // 512), warps=4)


class PairPlan(NamedTuple):
    """Experts of few tokens: each pair of a token and an expert reads that expert's weights, without tensor cores.

    up      gate and up rows a program
    down    output elements a program, each the sum over all experts of a token
    """

    up: VectorPlan
    down: VectorPlan


class TilePlan(NamedTuple):
    """A product of tiles of pairs with tensor cores: weight rows a program, columns a block."""

    outputs: int
    block: int
    warps: int
    stages: int


class TiledPlan(NamedTuple):
    """Experts of pairs sorted by expert: `rows` pairs of one expert are a tile, which reads that expert's weights once."""

    rows: int
    up: TilePlan
    down: TilePlan


class HopperTilesPlan(NamedTuple):
    """Sorted pairs in tiles of ops/fusions/experts_hopper.py."""


def experts_plan(
    tokens: int, top_k: int, experts: int, dtype: torch.dtype, hidden: int, inner: int, hopper: bool = False
) -> PairPlan | TiledPlan | HopperTilesPlan | None:
    """By shapes alone, so that a CUDA graph can hold it. None: torch's grouped product between our sort and our sum.
    hopper: whether Hopper's kernels take it.

    Chosen with scripts/bench_experts.py.
    """
    if tokens <= 4 and top_k <= 16:
        return PairPlan(
            VectorPlan(outputs=2, block=512, blocks=6, warps=4), VectorPlan(outputs=2, block=64, blocks=11, warps=4)
        )
    if dtype == torch.float32:  # added without tensor cores: registers are what is scarce
        return TiledPlan(16, TilePlan(32, 32, 4, 2), TilePlan(32, 32, 4, 2))
    rows = tokens * top_k // experts  # of one expert, if they are spread evenly
    if rows <= 8:
        return TiledPlan(16, TilePlan(64, 128, 4, 4), TilePlan(128, 128, 8, 3))
    if rows <= 16:
        return TiledPlan(32, TilePlan(64, 128, 4, 4), TilePlan(128, 64, 8, 4))
    if hopper and rows > 48:
        return HopperTilesPlan()
    if rows <= 64:
        return TiledPlan(64, TilePlan(256, 64, 8, 3), TilePlan(256, 64, 8, 3))
    if dtype == torch.bfloat16 and hidden % 8 == inner % 8 == 0:  # what it takes: rows that are multiples of 16 bytes
        return None
    return TiledPlan(128, TilePlan(256, 64, 8, 3), TilePlan(256, 64, 8, 3))
