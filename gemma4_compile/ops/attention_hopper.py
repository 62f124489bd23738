# mypy: disable-error-code="annotation-unchecked"
"""attention on Hopper: the copy engine feeds the tensor cores, which work while scores become weights.

Triton's own pipeline makes one stream of instructions of loads, products and softmax, which take turns: at head size 512 a
quarter of the rate of a large product, and for few rows 60 to 70% of the bandwidth. Gluon says who does what:

- Two warps have the copy engine (TMA) bring blocks of keys and of values, each as soon as the block before it is done with.
- Two warpgroups make the products. A row's sum of values is 512 fp32 registers, so a tile has 64 rows, and each warpgroup has
  half of the columns of the sums and half of a block's scores; the weights pass through shared memory. The scores of the next
  block are started before the values of this one, so that the softmax runs beside a product.

It reaches 60 to 65% of a product's rate and 85 to 98% of the bandwidth (benchmarks/hopper-h200.json).

Source: FlashAttention-3 (arXiv 2407.08608) for the order of work; FlashMLA (github.com/deepseek-ai/FlashMLA) for the columns.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .dependent import alone, start
from .gluon import barrier, blocks_of, gl, gluon_jit, hopper, is_hopper, mbarrier
from .library import power_of_two, power_of_two_within
from .plans import PROCESSORS


@gluon_jit
def _copy_blocks(
    pages, buffers, full, empty, table_ptr, kv_head, begin, end, stop, page_rows, head_rows, head_columns,
    PAGE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Blocks begin to end into the buffers in turn, each as soon as the one before it there is done with."""
    for block in range(begin, end):
        done = block - begin
        stage = done % STAGES
        first = block * BLOCK_N
        page = gl.load(table_ptr + first // PAGE, first < stop, other=0)
        row = page * page_rows + kv_head * head_rows + first % PAGE
        mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), pages.block_type.nbytes)
        column = kv_head * head_columns
        hopper.tma.async_copy_global_to_shared(pages, [row, column], full.index(stage), buffers.index(stage))


@gluon_jit
def _start_scores(q_buffer, k_buffers, k_full, done, SCORES: gl.constexpr, STAGES: gl.constexpr):
    BLOCK_M: gl.constexpr = q_buffer.shape[0]
    BLOCK_N: gl.constexpr = k_buffers.shape[1]
    mbarrier.wait(k_full.index(done % STAGES), done // STAGES & 1)
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    keys = k_buffers.index(done % STAGES).permute((1, 0))
    return hopper.warpgroup_mma(q_buffer, keys, nothing, use_acc=False, is_async=True)


@gluon_jit
def _weights_of(scores, top, position, first, lowest, highest, scale, WINDOW: gl.constexpr):
    """exp2(scores * scale - the largest so far), what that keeps of earlier sums, and the largest; positions mask."""
    SCORES: gl.constexpr = scores.type.layout
    BLOCK_N: gl.constexpr = scores.shape[1]
    scores = scores * scale
    partial = first + BLOCK_N > lowest + 1
    if WINDOW:
        partial |= first <= highest - WINDOW
    if partial:
        key = (first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES)))[None, :]
        seen = key <= position[:, None]
        if WINDOW:
            seen &= key > position[:, None] - WINDOW
        scores = gl.where(seen, scores, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 1))
    base = gl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
    return gl.exp2(scores - base[:, None]), gl.exp2(top - base), higher


@gluon_jit
def _finish_mix(mixed):
    """The sums, when all warps have done with the weights and values behind them."""
    sums = hopper.warpgroup_mma_wait(0, [mixed])
    barrier()
    return sums


@gluon_jit
def _weigh(
    scores, mixed, total, top, position, first, done, p_buffer, v_empty, lowest, highest, scale, WINDOW: gl.constexpr,
    MIXED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Between the products of a block: its weights in shared memory, and the sums of those before it scaled to them."""
    weights, kept, top = _weights_of(scores, top, position, first, lowest, highest, scale, WINDOW)
    total = total * kept[:, None] + weights
    sums = _finish_mix(mixed)
    if done > 0:
        mbarrier.arrive(v_empty.index((done - 1) % STAGES))
    p_buffer.store(weights.to(p_buffer.dtype))
    hopper.fence_async_shared()
    return sums * gl.convert_layout(kept, gl.SliceLayout(1, MIXED))[:, None], total, top


@gluon_jit
def _clear(values, first, stop):
    """Rows from stop on were never written, or hold another request's: a weight of 0 does not hide a NaN."""
    PART: gl.constexpr = 128
    BLOCK_N: gl.constexpr = values.shape[0]
    DIM: gl.constexpr = values.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    row = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, ROWS))
    for column in gl.static_range(0, DIM, PART):
        part = values.slice(column, PART, dim=1)
        rows = part.load(ROWS)
        part.store(gl.where((row < stop)[:, None], rows, gl.zeros_like(rows)))
    hopper.fence_async_shared()


@gluon_jit
def _attend(
    q_buffer, p_buffer, k_buffers, v_buffers, k_full, k_empty, v_full, v_empty, q_ptr, out_ptr, tops_ptr, totals_ptr,
    positions_ptr, first_row, ends, real, kv_head, split, splits, heads, q_token_stride, q_head_stride, scale, begin, end,
    stop, lowest, highest, GROUP: gl.constexpr, GROUP_BLOCK: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = q_buffer.shape[0]
    DIM: gl.constexpr = q_buffer.shape[1]
    BLOCK_N: gl.constexpr = p_buffer.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, DIM // 2, 16])
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])

    lane = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LOADED))
    row, head = first_row + lane // GROUP_BLOCK, lane % GROUP_BLOCK
    mine = (row < ends) & (head < GROUP)
    place = row.to(gl.int64) * q_token_stride + (kv_head * GROUP + head).to(gl.int64) * q_head_stride
    column = gl.arange(0, DIM, gl.SliceLayout(0, LOADED))
    q_buffer.store(gl.load(q_ptr + place[:, None] + column[None, :], mine[:, None], other=0.0))
    hopper.fence_async_shared()

    row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORES)) // GROUP_BLOCK
    position = gl.load(positions_ptr + row, (row < ends) & real, other=-1).to(gl.int32)
    top = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)  # added up at the end: a row's weights lie in two warps
    mixed = hopper.warpgroup_mma_init(gl.zeros([BLOCK_M, DIM], gl.float32, MIXED))

    # Each buffer has two mbarriers: products wait until it is full, copies until it is empty; the phases are its uses, mod 2.
    started = _start_scores(q_buffer, k_buffers, k_full, 0, SCORES, STAGES)
    scores = hopper.warpgroup_mma_wait(0, [started])
    barrier()
    mbarrier.arrive(k_empty.index(0))
    for block in range(begin, end - 1):
        done = block - begin
        sums, total, top = _weigh(
            scores, mixed, total, top, position, block * BLOCK_N, done, p_buffer, v_empty, lowest, highest, scale, WINDOW,
            MIXED, STAGES,
        )  # fmt: skip
        started = _start_scores(q_buffer, k_buffers, k_full, done + 1, SCORES, STAGES)
        mbarrier.wait(v_full.index(done % STAGES), done // STAGES & 1)
        mixed = hopper.warpgroup_mma(p_buffer, v_buffers.index(done % STAGES), sums, is_async=True)
        scores = hopper.warpgroup_mma_wait(1, [started])
        barrier()
        mbarrier.arrive(k_empty.index((done + 1) % STAGES))
    done = end - 1 - begin
    sums, total, top = _weigh(
        scores, mixed, total, top, position, (end - 1) * BLOCK_N, done, p_buffer, v_empty, lowest, highest, scale, WINDOW,
        MIXED, STAGES,
    )  # fmt: skip
    mbarrier.wait(v_full.index(done % STAGES), done // STAGES & 1)
    if end * BLOCK_N > stop:
        _clear(v_buffers.index(done % STAGES), (end - 1) * BLOCK_N, stop)
    mixed = hopper.warpgroup_mma(p_buffer, v_buffers.index(done % STAGES), sums, is_async=True)
    sums = _finish_mix(mixed)

    whole = gl.sum(total, 1)
    row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, MIXED)) // GROUP_BLOCK
    head = gl.arange(0, BLOCK_M, gl.SliceLayout(1, MIXED)) % GROUP_BLOCK
    mine = (row < ends) & (head < GROUP)
    whole = gl.convert_layout(whole, gl.SliceLayout(1, MIXED))
    target = row.to(gl.int64) * heads + kv_head * GROUP + head
    if not SPLIT:
        sums /= gl.where(whole > 0.0, whole, 1.0)[:, None]  # padding has seen nothing
    else:
        target = target * splits + split
        top = gl.convert_layout(top, gl.SliceLayout(1, MIXED)) * 0.6931471805599453
        gl.store(tops_ptr + target, top, mine)
        gl.store(totals_ptr + target, whole, mine)
        mine &= whole > 0.0
    column = gl.arange(0, DIM, gl.SliceLayout(0, MIXED))
    gl.store(out_ptr + target[:, None] * DIM + column[None, :], sums.to(out_ptr.dtype.element_ty), mine[:, None])


@gluon_jit(do_not_specialize=["rows", "requests", "table_stride"])  # one compilation for all token counts
def _hopper_attention_kernel(
    q_ptr, keys, values, table_ptr, positions_ptr, starts_ptr, out_ptr, tops_ptr, totals_ptr, rows, requests,
    q_token_stride, q_head_stride, key_page_rows, key_head_rows, key_head_columns, value_page_rows, value_head_rows,
    value_head_columns, table_stride, scale,
    GROUP: gl.constexpr, GROUP_BLOCK: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, WINDOW: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """As _attention_kernel: the same tiles, the same result; scale is times log2(e)."""
    start(DEPENDENT)
    BLOCK_Q: gl.constexpr = BLOCK_M // GROUP_BLOCK
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    LANES: gl.constexpr = 256
    # Of a long request the last tiles see the most keys: they start first.
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    kv_head = gl.program_id(0)
    split = gl.program_id(2)
    found = 0
    for first in range(0, requests + 1, LANES):
        request = first + gl.arange(0, LANES, LINE)
        inside = request <= requests
        first_tile = gl.load(starts_ptr + request, inside, other=0) // BLOCK_Q + request
        found += gl.sum((inside & (first_tile <= tile)).to(gl.int32), 0)
    request = found - 1  # `requests` itself stands for the padding
    begins = gl.load(starts_ptr + request)
    real = request < requests
    ends = gl.load(starts_ptr + request + 1, real, other=rows)
    first_row = begins + (tile - begins // BLOCK_Q - request) * BLOCK_Q
    if first_row >= ends:
        return
    row = first_row + gl.arange(0, BLOCK_M, LINE) // GROUP_BLOCK
    position = gl.load(positions_ptr + row, (row < ends) & real, other=-1).to(gl.int32)
    highest = gl.max(position, 0)
    lowest = gl.min(gl.where(position < 0, highest, position), 0)
    stop = highest + 1
    begin = 0
    if WINDOW:
        begin = gl.maximum(lowest - WINDOW + 1, 0) // BLOCK_N
    end = (stop + BLOCK_N - 1) // BLOCK_N
    splits = gl.num_programs(2)
    if SPLIT:
        share = (end - begin + splits - 1) // splits
        begin += split * share
        end = gl.minimum(begin + share, end)
    end = gl.maximum(end, begin + 1)  # of no keys: one block that no row sees
    table_ptr += gl.cast(request, gl.int64) * table_stride

    DTYPE: gl.constexpr = keys.dtype
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, DIM], DTYPE)
    P_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_N], DTYPE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_buffer = gl.allocate_shared_memory(DTYPE, [BLOCK_M, DIM], Q_LAYOUT)
    p_buffer = gl.allocate_shared_memory(DTYPE, [BLOCK_M, BLOCK_N], P_LAYOUT)
    k_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, DIM], keys.layout)
    v_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, DIM], values.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=1)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (
                q_buffer, p_buffer, k_buffers, v_buffers, k_full, k_empty, v_full, v_empty, q_ptr, out_ptr, tops_ptr,
                totals_ptr, positions_ptr, first_row, ends, real, kv_head, split, splits, gl.num_programs(0) * GROUP,
                q_token_stride, q_head_stride, scale, begin, end, stop, lowest, highest, GROUP, GROUP_BLOCK, WINDOW, SPLIT,
                STAGES,
            )),
            (_copy_blocks, (
                keys, k_buffers, k_full, k_empty, table_ptr, kv_head, begin, end, stop, key_page_rows, key_head_rows,
                key_head_columns, PAGE, BLOCK_N, STAGES,
            )),
            (_copy_blocks, (
                values, v_buffers, v_full, v_empty, table_ptr, kv_head, begin, end, stop, value_page_rows, value_head_rows,
                value_head_columns, PAGE, BLOCK_N, STAGES,
            )),
        ],
        [1, 1], [40, 40],
    )  # fmt: skip


BLOCK_M = 64  # rows of a tile: what two warpgroups have registers for
BLOCK_N = 64  # keys of a block
STAGES = {256: 2, 512: 1}  # buffers for keys, and for values, by head size: 168 and 200 of 227 KB with rows and weights


class HopperPlan(NamedTuple):
    """`splits` programs share a tile's keys."""

    splits: int


class Matrix(NamedTuple):
    """Pages as a matrix that the copy engine reads: a row of a page is row `page * page_rows + head * head_rows + row` from
    column `head * head_columns` on."""

    rows: Tensor
    page_rows: int
    head_rows: int
    head_columns: int


def _matrix_of(pages: Tensor) -> Matrix | None:
    """[P, page, Hk, D] as a matrix; None where its strides make none."""
    count, page, heads, dim = pages.shape
    page_stride, row_stride, head_stride, _ = pages.stride()
    page_rows, page_rest = divmod(page_stride, row_stride) if count > 1 else (0, 0)
    head_rows, head_columns = (0, 0) if heads == 1 else divmod(head_stride, row_stride)
    if page_rest or head_rows and head_columns or pages.data_ptr() % 16 or row_stride * pages.element_size() % 16:
        return None
    rows, columns = (count - 1) * page_rows + (heads - 1) * head_rows + page, (heads - 1) * head_columns + dim
    return Matrix(pages.as_strided((rows, columns), (row_stride, 1)), page_rows, head_rows, head_columns)


def hopper_takes(q: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> bool:
    """Whether the kernel can read these: bf16 on Hopper, head size 256 or 512, and blocks within pages."""
    dtypes = q.dtype == keys.dtype == values.dtype == torch.bfloat16
    if not dtypes or keys.shape[3] not in STAGES or not is_hopper(q.device):
        return False
    if q.shape[2] > BLOCK_M * keys.shape[2] or keys.shape[1] % BLOCK_N and table.shape[1] > 1:
        return False
    return _matrix_of(keys) is not None and _matrix_of(values) is not None


def hopper_plan(rows: int, requests: int, kv_heads: int, group: int, dim: int, max_keys: int) -> HopperPlan | None:
    """By shapes alone, as attention_plan, measured with the same script. None: the other kernel, whose tiles may be smaller, is
    as fast: for few tiles, and for prompts at head size 256, whose windows have few blocks."""
    average = -(-rows // max(requests, 1))
    tiles = max(requests, 1) * -(-average * power_of_two(group) // BLOCK_M) * kv_heads
    few = average <= 8
    if dim == 256:
        # From 24 on two programs share a window, which has 8 blocks and more.
        return HopperPlan(1 if tiles >= 64 else 2) if few and tiles >= 24 and average * group >= 8 and max_keys > 128 else None
    if few and tiles < 8:
        # Of a short past the other's smaller blocks are 1 to 2 us faster. Here 30,000 keys take 43 us, there 67.
        long = tiles > 0 and max_keys > 4096
        return HopperPlan(min(32, power_of_two_within(64 // tiles))) if long else None
    splits = power_of_two_within(PROCESSORS // tiles)
    if few and PROCESSORS < tiles < 2 * PROCESSORS:
        splits = 2  # else a second round of programs has too few to use the bandwidth
    return HopperPlan(min(splits, 32, power_of_two(-(-max_keys // BLOCK_N))))


def launch_hopper(
    out: Tensor, tops: Tensor, totals: Tensor, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, positions: Tensor,
    starts: Tensor, window: int, scale: float, plan: HopperPlan,
) -> None:  # fmt: skip
    """What _attention_kernel is launched for, by arguments that hopper_takes. Shapes and dtypes as there."""
    _, rows, heads, dim = q.shape
    _, page, kv_heads, _ = keys.shape
    group, requests = heads // kv_heads, table.shape[0]
    group_block, block_q = power_of_two(group), BLOCK_M // power_of_two(group)
    (k_rows, *k_places), (v_rows, *v_places) = cast(Matrix, _matrix_of(keys)), cast(Matrix, _matrix_of(values))
    dependent, options = alone()
    k_blocks, v_blocks = blocks_of(k_rows, BLOCK_N, dim), blocks_of(v_rows, BLOCK_N, dim)
    _hopper_attention_kernel[(kv_heads, rows // block_q + requests + 1, plan.splits)](
        q, k_blocks, v_blocks, table, positions, starts, out, tops, totals, rows, requests, *q.stride()[1:3], *k_places,
        *v_places, table.stride(0), scale * 1.4426950408889634, group, group_block, dim, page, window, BLOCK_M, BLOCK_N,
        STAGES[dim], plan.splits > 1, dependent, num_warps=8, **options,
    )  # fmt: skip
