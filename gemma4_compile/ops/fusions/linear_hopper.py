"""Products of 3 to 128 rows on Hopper: one warp has the copy engine bring weights and rows, the others multiply.

For so few rows a product is a stream of weights, and cuBLAS, whose tiles are made for many, reaches a third to a half of the
bandwidth. Here up to three matrices share a launch, geglu is the epilogue, and the stream never stops between two tiles. The
first weights are under way before the kernel in front has ended. Where a matrix has too few rows for all processors, its
columns are divided among programs, and a second kernel adds up their shares, always in the same order.

Source: CUTLASS (github.com/NVIDIA/cutlass), its warp-specialized persistent products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_compile.ops.dependent import EARLY, alone, behind, first, ready, start
from gemma4_compile.ops.gluon import blocks_of, gl, gluon_jit, hopper, is_hopper, mbarrier, multiply_steps, results_of
from gemma4_compile.ops.library import gelu_tanh, jit, rounded, tl
from gemma4_compile.ops.plans import PROCESSORS, HopperProductsPlan

MEMORY = 200 * 1024  # bytes of buffers


@gluon_jit
def _copy_weights(first, second, third, weights, full, tile, begin, first_tiles, second_tiles, GATED: gl.constexpr):
    ROWS: gl.constexpr = first.block_type.shape[0]
    if GATED:
        row = tile * ROWS
        hopper.tma.async_copy_global_to_shared(first, [row, begin], full, weights.slice(0, ROWS, dim=0))
        hopper.tma.async_copy_global_to_shared(second, [row, begin], full, weights.slice(ROWS, ROWS, dim=0))
    elif tile < first_tiles:
        hopper.tma.async_copy_global_to_shared(first, [tile * ROWS, begin], full, weights)
    elif tile < first_tiles + second_tiles:
        hopper.tma.async_copy_global_to_shared(second, [(tile - first_tiles) * ROWS, begin], full, weights)
    else:
        hopper.tma.async_copy_global_to_shared(third, [(tile - first_tiles - second_tiles) * ROWS, begin], full, weights)


@gluon_jit
def _copy_rows(x, rows, full, begin, GROUPS: gl.constexpr):
    GROUP: gl.constexpr = x.block_type.shape[0]
    for group in gl.static_range(0, GROUPS * GROUP, GROUP):
        hopper.tma.async_copy_global_to_shared(x, [group, begin], full, rows.slice(group, GROUP, dim=0))


@gluon_jit
def _load_tiles(
    x, first, second, third, x_buffers, w_buffers, full, empty, first_tiles, second_tiles, tiles, share_begin, share_end,
    GROUPS: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    BLOCK: gl.constexpr = x_buffers.shape[2]
    BYTES: gl.constexpr = GROUPS * x.block_type.nbytes + 2 * w_buffers.shape[1] * BLOCK
    asked = 0
    if DEPENDENT == EARLY:  # as many weights as there are buffers, then the wait, then the rows that go with them
        tile = gl.program_id(0)
        asked = gl.minimum((share_end - share_begin + BLOCK - 1) // BLOCK, STAGES)
        for stage in range(asked):
            mbarrier.expect(full.index(stage), BYTES)
            begin = share_begin + stage * BLOCK
            weights = w_buffers.index(stage)
            _copy_weights(first, second, third, weights, full.index(stage), tile, begin, first_tiles, second_tiles, GATED)
        ready(DEPENDENT)
        for stage in range(asked):
            _copy_rows(x, x_buffers.index(stage), full.index(stage), share_begin + stage * BLOCK, GROUPS)
    done = asked
    share_begin_now = share_begin + asked * BLOCK
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for begin in range(share_begin_now, share_end, BLOCK):
            stage = done % STAGES
            landed = full.index(stage)
            mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
            mbarrier.expect(landed, BYTES)
            _copy_rows(x, x_buffers.index(stage), landed, begin, GROUPS)
            _copy_weights(first, second, third, w_buffers.index(stage), landed, tile, begin, first_tiles, second_tiles, GATED)
            done += 1
        share_begin_now = share_begin


@gluon_jit
def _store_tile(out_ptr, results, tile, count, tokens):
    """Rows of `count` columns, as many as there are tokens; the tile's columns stand behind those of the ones before it."""
    LAYOUT: gl.constexpr = results.type.layout
    token = gl.arange(0, results.shape[0], gl.SliceLayout(1, LAYOUT))
    output = tile * results.shape[1] + gl.arange(0, results.shape[1], gl.SliceLayout(0, LAYOUT))
    inside = (token < tokens)[:, None] & (output < count)[None, :]
    gl.store(out_ptr + token[:, None] * count + output[None, :], results, inside)


@gluon_jit
def _multiply_tiles(
    x_buffers, w_buffers, full, empty, first_out_ptr, second_out_ptr, third_out_ptr, first_rows, second_rows, third_rows,
    first_tiles, second_tiles, tiles, length, tokens, GATED: gl.constexpr, WARPS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    OUTPUTS: gl.constexpr = w_buffers.shape[1]
    N: gl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    DTYPE: gl.constexpr = first_out_ptr.dtype.element_ty
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [WARPS, 1], [1, 0])
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sums, done = multiply_steps(x_buffers, w_buffers, full, full, empty, done, length, WARPS, False)
        if SPLIT:
            columns = tiles * OUTPUTS
            share_ptr = first_out_ptr + gl.program_id(1).to(gl.int64) * tokens * columns
            _store_tile(share_ptr, sums, tile, columns, tokens)
        else:
            results = gl.convert_layout(results_of(sums, DTYPE, GATED), STORED)
            if GATED or tile < first_tiles:
                _store_tile(first_out_ptr, results, tile, first_rows, tokens)
            elif tile < first_tiles + second_tiles:
                _store_tile(second_out_ptr, results, tile - first_tiles, second_rows, tokens)
            else:
                _store_tile(third_out_ptr, results, tile - first_tiles - second_tiles, third_rows, tokens)


@gluon_jit(do_not_specialize=["tokens"])  # compiled for 16, 32, 64, 96 and 128 rows
def _hopper_products_kernel(
    x, first, second, third, first_out_ptr, second_out_ptr, third_out_ptr, first_rows, second_rows, third_rows, width, share,
    tokens, TOKENS: gl.constexpr, GROUPS: gl.constexpr, OUTPUTS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr, GATED: gl.constexpr, SPLIT: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """OUTPUTS rows of weights times up to TOKENS rows of x are a tile; if gated, half of them are the gate's.

    SPLIT: the programs of program_id(1) take `share` columns each, and first_out is their sums, [shares, tokens, tiles *
    OUTPUTS] in fp32."""
    start(DEPENDENT)
    N: gl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    first_tiles = (first_rows + N - 1) // N
    second_tiles = 0 if GATED else (second_rows + N - 1) // N
    tiles = first_tiles
    if not GATED:
        tiles += second_tiles + (third_rows + N - 1) // N
    share_begin = 0
    share_end = width
    if SPLIT:
        share_begin = gl.program_id(1) * share
        share_end = gl.minimum(share_begin + share, width)
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
                third_rows, first_tiles, second_tiles, tiles, share_end - share_begin, tokens, GATED, WARPS, SPLIT,
            )),
            (_load_tiles, (
                x, first, second, third, x_buffers, w_buffers, full, empty, first_tiles, second_tiles, tiles, share_begin,
                share_end, GROUPS, GATED, STAGES, DEPENDENT,
            )),
        ],
        [1], [40],
    )  # fmt: skip


@jit
def _sum_shares(ptr, stride, inside, SHARES: tl.constexpr):
    total = tl.load(ptr, inside, other=0.0)
    for share in tl.static_range(1, SHARES):
        total += tl.load(ptr + share * stride, inside, other=0.0)
    return total


@jit(do_not_specialize=["tokens"])
def _sum_kernel(
    shares_ptr, first_out_ptr, second_out_ptr, third_out_ptr, first_rows, second_rows, third_rows, columns, tokens,
    OUTPUTS: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK outputs of one token: the sums of all shares, [SHARES, tokens, columns], rounded; columns are those of tiles."""
    start(DEPENDENT)
    dtype = first_out_ptr.dtype.element_ty
    token = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stride = tokens.to(tl.int64) * columns
    shares_ptr += token * columns
    if GATED:
        HALF: tl.constexpr = OUTPUTS // 2
        inside = index < first_rows
        place = shares_ptr + index // HALF * OUTPUTS + index % HALF
        gate = rounded(_sum_shares(place, stride, inside, SHARES), dtype)
        up = rounded(_sum_shares(place + HALF, stride, inside, SHARES), dtype)
        tl.store(first_out_ptr + token * first_rows + index, rounded(gelu_tanh(gate), dtype) * up, inside)
    else:
        second_begin = (first_rows + OUTPUTS - 1) // OUTPUTS * OUTPUTS
        third_begin = second_begin + (second_rows + OUTPUTS - 1) // OUTPUTS * OUTPUTS
        total = _sum_shares(shares_ptr + index, stride, index < columns, SHARES)
        tl.store(first_out_ptr + token * first_rows + index, total, index < first_rows)
        if second_out_ptr is not None:
            local = index - second_begin
            tl.store(second_out_ptr + token * second_rows + local, total, (local >= 0) & (local < second_rows))
        if third_out_ptr is not None:
            local = index - third_begin
            tl.store(third_out_ptr + token * third_rows + local, total, (local >= 0) & (local < third_rows))


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
    given = [blocks_of(weight, rows, plan.block) for weight in weights]
    missing = 3 - len(weights)
    stages = min(16, MEMORY // (2 * plan.block * (plan.tokens + plan.outputs)))
    counts = [weight.shape[0] for weight in weights]
    tiles = -(-counts[0] // rows) if gated else sum(-(-count // rows) for count in counts)
    share = -(-width // (plan.splits * plan.block)) * plan.block
    shares = -(-width // share)
    group = 16 if tokens <= 16 else 32  # rows of x that are copied at once: what is past the last ones costs time
    written, launch = outputs, first(*weights) if shares > 1 else alone(*weights)
    if shares > 1:
        written = [x.new_empty((shares, tokens, tiles * plan.outputs), dtype=torch.float32)]
    warps = plan.tokens // 16  # a warpgroup has 64 rows
    _hopper_products_kernel[(min(tiles, PROCESSORS // shares), shares)](
        blocks_of(x, group, plan.block), *given, *given[:1] * missing, *written, *written[:1] * (3 - len(written)), *counts,
        *[0] * missing, width, share, tokens, plan.tokens, -(-tokens // group), plan.outputs, plan.block, stages, warps, gated,
        shares > 1, launch.kind, num_warps=warps, **launch.options,
    )  # fmt: skip
    if shares > 1:
        sum_shares(written[0], outputs, gated, plan.outputs)


def sum_shares(shares: Tensor, outputs: list[Tensor], gated: bool, of_tile: int) -> None:
    """The sums [S, T, columns] of S shares of the columns, added up to outputs [T, N]. The columns are those of whole tiles,
    `of_tile` each; if gated, one output, and half of each tile the gate's."""
    splits, tokens, columns = shares.shape
    counts, missing, (dependent, options) = [output.shape[-1] for output in outputs], 3 - len(outputs), behind()
    block = 256
    _sum_kernel[(-(-(counts[0] if gated else columns) // block), tokens)](
        shares, *outputs, *[None] * missing, *counts, *[0] * missing, columns, tokens, of_tile, splits, block, gated,
        dependent, num_warps=2, **options,
    )  # fmt: skip
