"""Products of 33 to 128 rows on Hopper: one warp has the copy engine bring weights and rows, the others multiply.

For so few rows a product is a stream of weights, and cuBLAS, whose tiles are made for many, reaches a third to a half of the
bandwidth. Here up to three matrices share a launch, geglu is the epilogue, and the stream never stops between two tiles.

Source: CUTLASS (github.com/NVIDIA/cutlass), its warp-specialized persistent products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_compile.ops.gluon import blocks_of, gl, gluon_jit, hopper, is_hopper, mbarrier, multiply_steps, results_of
from gemma4_compile.ops.plans import PROCESSORS, HopperProductsPlan

BLOCK = 64  # columns of a step
GROUP = 32  # rows of x that are copied at once: what is past the last ones costs time, and is not copied


@gluon_jit
def _load_tiles(
    x, first, second, third, x_buffers, w_buffers, full, empty, first_tiles, second_tiles, tiles, width,
    GROUPS: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK: gl.constexpr = x_buffers.shape[2]
    GROUP: gl.constexpr = x.block_type.shape[0]
    ROWS: gl.constexpr = first.block_type.shape[0]
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for begin in range(0, width, BLOCK):
            stage = done % STAGES
            ready = full.index(stage)
            weights = w_buffers.index(stage)
            mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
            mbarrier.expect(ready, GROUPS * x.block_type.nbytes + 2 * weights.numel)
            for group in gl.static_range(0, GROUPS * GROUP, GROUP):
                rows = x_buffers.index(stage).slice(group, GROUP, dim=0)
                hopper.tma.async_copy_global_to_shared(x, [group, begin], ready, rows)
            if GATED:
                row = tile * ROWS
                hopper.tma.async_copy_global_to_shared(first, [row, begin], ready, weights.slice(0, ROWS, dim=0))
                hopper.tma.async_copy_global_to_shared(second, [row, begin], ready, weights.slice(ROWS, ROWS, dim=0))
            elif tile < first_tiles:
                hopper.tma.async_copy_global_to_shared(first, [tile * ROWS, begin], ready, weights)
            elif tile < first_tiles + second_tiles:
                row = (tile - first_tiles) * ROWS
                hopper.tma.async_copy_global_to_shared(second, [row, begin], ready, weights)
            else:
                row = (tile - first_tiles - second_tiles) * ROWS
                hopper.tma.async_copy_global_to_shared(third, [row, begin], ready, weights)
            done += 1


@gluon_jit
def _multiply_tiles(
    x_buffers, w_buffers, full, empty, first_out_ptr, second_out_ptr, third_out_ptr, first_rows, second_rows, third_rows,
    first_tiles, second_tiles, tiles, width, tokens, GATED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = x_buffers.shape[1]
    OUTPUTS: gl.constexpr = w_buffers.shape[1]
    N: gl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    DTYPE: gl.constexpr = first_out_ptr.dtype.element_ty
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [WARPS, 1], [1, 0])
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sums, done = multiply_steps(x_buffers, w_buffers, full, full, empty, done, width, WARPS, False)
        result = results_of(sums, DTYPE, GATED)
        out_ptr = first_out_ptr
        count = first_rows
        local = tile
        if not GATED:
            if tile >= first_tiles + second_tiles:
                out_ptr = third_out_ptr
                count = third_rows
                local = tile - first_tiles - second_tiles
            elif tile >= first_tiles:
                out_ptr = second_out_ptr
                count = second_rows
                local = tile - first_tiles
        token = gl.arange(0, TOKENS, gl.SliceLayout(1, STORED))
        output = local * N + gl.arange(0, N, gl.SliceLayout(0, STORED))
        inside = (token < tokens)[:, None] & (output < count)[None, :]
        gl.store(out_ptr + token[:, None] * count + output[None, :], gl.convert_layout(result, STORED), inside)


@gluon_jit(do_not_specialize=["tokens"])  # compiled for 33 to 64, 65 to 96 and 97 to 128 rows
def _hopper_products_kernel(
    x, first, second, third, first_out_ptr, second_out_ptr, third_out_ptr, first_rows, second_rows, third_rows, width, tokens,
    TOKENS: gl.constexpr, GROUPS: gl.constexpr, OUTPUTS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """OUTPUTS rows of weights times up to TOKENS rows of x are a tile; if gated, half of them are the gate's."""
    N: gl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    first_tiles = (first_rows + N - 1) // N
    second_tiles = 0 if GATED else (second_rows + N - 1) // N
    tiles = first_tiles
    if not GATED:
        tiles += second_tiles + (third_rows + N - 1) // N
    DTYPE: gl.constexpr = x.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, BLOCK], DTYPE)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([OUTPUTS, BLOCK], DTYPE)
    x_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, TOKENS, BLOCK], ROWS)
    w_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, OUTPUTS, BLOCK], WEIGHTS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                x_buffers, w_buffers, full, empty, first_out_ptr, second_out_ptr, third_out_ptr, first_rows, second_rows,
                third_rows, first_tiles, second_tiles, tiles, width, tokens, GATED, WARPS,
            )),
            (_load_tiles, (
                x, first, second, third, x_buffers, w_buffers, full, empty, first_tiles, second_tiles, tiles, width,
                GROUPS, GATED, STAGES,
            )),
        ],
        [1], [40],
    )  # fmt: skip


def hopper_takes(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """bf16 on Hopper, in rows that the copy engine can address."""
    matrices = (x, *weights)
    aligned = all(m.data_ptr() % 16 == 0 and m.stride(-2) % 8 == 0 for m in matrices)
    return x.dtype == torch.bfloat16 and aligned and x.shape[-1] % 8 == 0 and is_hopper(x.device)


def launch_hopper_products(
    x: Tensor, weights: tuple[Tensor, ...], outputs: list[Tensor], gated: bool, plan: HopperProductsPlan
) -> None:
    """x [T, K] and each weight [N, K] by hopper_takes, outputs [T, N] contiguous; plan.tokens >= T."""
    tokens, width = x.shape
    rows = plan.outputs // 2 if gated else plan.outputs
    given = [blocks_of(weight, rows, BLOCK) for weight in weights]
    missing = 3 - len(weights)
    stages = min(8, 200 * 1024 // (2 * BLOCK * (plan.tokens + plan.outputs)))
    counts = [weight.shape[0] for weight in weights] + [0] * missing
    tiles = -(-counts[0] // rows) if gated else sum(-(-count // rows) for count in counts)
    _hopper_products_kernel[(min(tiles, PROCESSORS),)](
        blocks_of(x, GROUP, BLOCK), *given, *given[:1] * missing, *outputs, *outputs[:1] * (3 - len(outputs)), *counts,
        width, tokens, plan.tokens, -(-tokens // GROUP), plan.outputs, BLOCK, stages, plan.tokens // 16, gated,
        num_warps=plan.tokens // 16,
    )  # fmt: skip
