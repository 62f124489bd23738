"""Products of sorted pairs with their experts' weights on Hopper: the rows are gathered by the loads, geglu is the epilogue.

A program makes one tile after the other: four warps bring its rows, by their numbers, and have the copy engine bring the
weights, in steps of 64 columns, while two warpgroups multiply what is there. They run ahead into the next tile while the sums
of the last are finished. Around torch's grouped products the gather of each pair's row and geglu take a seventh of the time.

Source: CUTLASS (github.com/NVIDIA/cutlass), its warp-specialized persistent products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_compile.ops.gluon import (
    async_copy,
    barrier,
    blocks_of,
    gl,
    gluon_jit,
    hopper,
    is_hopper,
    mbarrier,
    multiply_steps,
    results_of,
)
from gemma4_compile.ops.plans import PROCESSORS

ROWS = 128  # pairs of a tile
OUTPUTS = 256  # rows of weights of a tile; if gated, half of them are the gate's
BLOCK = 64  # columns of a step
STAGES = 4  # steps in shared memory: 192 KB
LAG = 2  # steps whose rows are on their way; the products need one, and one is being filled


@gluon_jit
def _tell(a_full, done, STAGES: gl.constexpr):
    hopper.fence_async_shared()  # the rows were written by threads, and are read by the tensor cores
    barrier()
    mbarrier.arrive(a_full.index(done % STAGES))


@gluon_jit
def _load_tiles(
    x_ptr, weights, a_buffers, b_buffers, a_full, b_full, empty, order_ptr, ends_ptr, tiles_ptr, bound, x_stride,
    TOP_K: gl.constexpr, COUNT: gl.constexpr, WIDTH: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr,
    LAG: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = a_buffers.shape[1]
    BLOCK: gl.constexpr = a_buffers.shape[2]
    OUTPUTS: gl.constexpr = b_buffers.shape[1]
    PART: gl.constexpr = weights.block_type.shape[0]
    N: gl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    PARTS: gl.constexpr = (COUNT + N - 1) // N
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    done = 0
    for item in range(gl.program_id(0), bound * PARTS, gl.num_programs(0)):
        expert = gl.load(tiles_ptr + item // PARTS)
        if expert >= 0:
            position = gl.load(tiles_ptr + bound + item // PARTS)
            place = position + gl.arange(0, ROWS, gl.SliceLayout(1, LOADED))
            inside = place < gl.load(ends_ptr + expert)
            # Rows past the end are read from the tile's first, and not stored: no load needs a mask for them.
            if GATED:  # noqa: SIM108  (a compile-time branch)
                row = gl.load(order_ptr + place, inside, other=0) // TOP_K
            else:
                row = gl.where(inside, place, position)
            column = gl.arange(0, BLOCK, gl.SliceLayout(0, LOADED))
            x_ptrs = x_ptr + gl.cast(row, gl.int64)[:, None] * x_stride + column[None, :]
            weight_row = expert * (2 * COUNT if GATED else COUNT) + item % PARTS * N
            for begin in range(0, WIDTH, BLOCK):
                stage = done % STAGES
                full = b_full.index(stage)
                mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
                mbarrier.expect(full, OUTPUTS * BLOCK * 2)
                for part in gl.static_range(0, OUTPUTS, PART):
                    first = weight_row + (part if part < N else part - N + COUNT)
                    buffer = b_buffers.index(stage).slice(part, PART, dim=0)
                    hopper.tma.async_copy_global_to_shared(weights, [first, begin], full, buffer)
                async_copy.async_copy_global_to_shared(a_buffers.index(stage), x_ptrs + begin)
                async_copy.commit_group()
                if begin >= LAG * BLOCK:
                    async_copy.wait_group(LAG)
                    _tell(a_full, done - LAG, STAGES)
                done += 1
            for late in gl.static_range(LAG):
                async_copy.wait_group(LAG - 1 - late)
                _tell(a_full, done - LAG + late, STAGES)


@gluon_jit
def _multiply_tiles(
    a_buffers, b_buffers, a_full, b_full, empty, out_ptr, ends_ptr, tiles_ptr, bound,
    COUNT: gl.constexpr, WIDTH: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = a_buffers.shape[1]
    OUTPUTS: gl.constexpr = b_buffers.shape[1]
    N: gl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    PARTS: gl.constexpr = (COUNT + N - 1) // N
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    done = 0
    for item in range(gl.program_id(0), bound * PARTS, gl.num_programs(0)):
        expert = gl.load(tiles_ptr + item // PARTS)
        if expert >= 0:
            sums, done = multiply_steps(a_buffers, b_buffers, a_full, b_full, empty, done, WIDTH, 8, True)
            result = results_of(sums, DTYPE, GATED)
            place = gl.load(tiles_ptr + bound + item // PARTS) + gl.arange(0, ROWS, gl.SliceLayout(1, STORED))
            column = item % PARTS * N + gl.arange(0, N, gl.SliceLayout(0, STORED))
            inside = (place < gl.load(ends_ptr + expert))[:, None] & (column < COUNT)[None, :]
            out_ptrs = out_ptr + gl.cast(place, gl.int64)[:, None] * COUNT + column[None, :]
            gl.store(out_ptrs, gl.convert_layout(result, STORED), inside)


@gluon_jit(do_not_specialize=["bound"])  # one compilation for all token counts
def _hopper_tiles_kernel(
    x_ptr, weights, out_ptr, order_ptr, ends_ptr, tiles_ptr, bound, x_stride,
    TOP_K: gl.constexpr, COUNT: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr, OUTPUTS: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """out[position] of all tiles, as _tile_kernel makes it of one. Tiles that share rows of x are neighbours."""
    DTYPE: gl.constexpr = weights.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK], DTYPE)
    a_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, BLOCK], A)
    b_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, OUTPUTS, BLOCK], weights.layout)
    a_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    b_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(a_full.index(stage), count=1)
        mbarrier.init(b_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                a_buffers, b_buffers, a_full, b_full, empty, out_ptr, ends_ptr, tiles_ptr, bound, COUNT, WIDTH, GATED,
            )),
            (_load_tiles, (
                x_ptr, weights, a_buffers, b_buffers, a_full, b_full, empty, order_ptr, ends_ptr, tiles_ptr, bound, x_stride,
                TOP_K, COUNT, WIDTH, GATED, STAGES, LAG,
            )),
        ],
        [4], [88],
    )  # fmt: skip


def hopper_takes(x: Tensor, down: Tensor) -> bool:
    """bf16 on Hopper, with rows that steps of 64 columns divide and that the copy engine can address."""
    aligned = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x.dtype == torch.bfloat16 and aligned and not any(n % BLOCK for n in down.shape[1:]) and is_hopper(x.device)


def launch_hopper_tiles(
    x: Tensor, weight: Tensor, out: Tensor, order: Tensor, ends: Tensor, tiles: Tensor, top_k: int, gated: bool
) -> None:
    """x [T, WIDTH] if gated, else [pairs, WIDTH]; weight [E, 2 COUNT or COUNT, WIDTH]; out [pairs, COUNT]; the rest as
    sorted_pairs gives it for tiles of ROWS."""
    count, width = out.shape[1], weight.shape[2]
    weights = blocks_of(weight.view(-1, width), OUTPUTS // 2, BLOCK)
    _hopper_tiles_kernel[(PROCESSORS,)](
        x, weights, out, order, ends, tiles, tiles.shape[1], x.stride(0), top_k, count, width, ROWS, OUTPUTS, BLOCK, STAGES,
        LAG, gated, num_warps=8,
    )  # fmt: skip
