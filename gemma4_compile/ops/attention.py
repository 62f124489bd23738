"""attention: causal attention of packed rows over paged keys and values; writes the new rows first.

Source: Gemma4TextAttention.forward and sdpa_attention_forward (transformers); pages as in PagedAttention, arXiv 2309.06180.
It is the one op of a model that mixes rows, and the one that keeps state: graphs are split at it.

A page holds `page` consecutive positions of one request. Unpaged keys and values are the same thing with pages as long as a
request may become.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_hopper import HopperPlan, hopper_plan, hopper_takes, launch_hopper
from .dependent import alone, start
from .library import expect, exponential, fresh, jit, op, pinned, power_of_two, power_of_two_within, tl, triton, unit_stride
from .plans import PROCESSORS


def masks(visible: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a mask hides anything: one of no keys stands for none, so that a traced step can have it as an input always."""
    return visible is not None and visible.shape[1] > 0


def write_reference(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Put row i of k and v into slot slots[i]; rows with a negative slot are padding."""
    real = slots >= 0
    place = slots[real]
    for rows, cache in ((k, keys), (v, values)):
        cache[place // cache.shape[1], place % cache.shape[1]] = rows[0, real].to(cache.dtype)


def check_attention(
    op: str, q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, slots: Tensor, table: Tensor,
    positions: Tensor, starts: Tensor,
) -> None:  # fmt: skip
    expect(op, "q must be [1, N, Hq, D]", (q.dim(), q.shape[0]), (4, 1), "pack the requests into one row of tokens")
    expect(op, "keys must be [P, page, Hk, D]", (keys.dim(), keys.shape[-1]), (4, q.shape[3]), "pass this layer's pages")
    expect(op, "values must have the shape of keys", values.shape, keys.shape, "pass both of one layer")
    expect(op, "Hq must be a multiple of Hk", q.shape[2] % keys.shape[2], 0, "pass this layer's pages")
    expect(op, "positions must be [N], one for each query row", positions.dim(), 1, "flatten them")
    expect(
        op, "starts must be [R + 1] for a table of [R, pages]", (starts.dim(), table.dim()), (1, 2), "pass one request a row"
    )
    expect(op, "k and v must both be given, or both be None", k is None, v is None, "a layer that shares KV has neither")
    if k is not None and v is not None:
        heads = (1, keys.shape[2], keys.shape[3])
        expect(op, "k must be [1, T, Hk, D]", (k.shape[0], *k.shape[2:]), heads, "view the projection as heads")
        expect(op, "v must have k's shape", v.shape, k.shape, "pass keys and values of one layer")
        expect(op, "slots must be [T], one for each new row", slots.dim(), 1, "flatten them")


def check_lengths(
    q: Tensor, k: Tensor | None, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor,
    visible: Tensor | None = None, until: Tensor | None = None,
) -> None:  # fmt: skip
    """Apart from check_attention, because a trace would specialize on what it compares: the kernels rely on these."""
    op = "attention"
    expect(op, "positions must be [N] for q of [1, N, Hq, D]", positions.shape[0], q.shape[1], "pass one for each query row")
    expect(
        op, "starts must be [R + 1] for a table of [R, pages]", starts.shape[0], table.shape[0] + 1, "pass one request a row"
    )
    if masks(visible):
        given = (visible.dim(), visible.shape[0], visible.dtype)
        expect(op, "visible must be [R, keys] bool", given, (2, table.shape[0], torch.bool), "give each request its own row")
    if until is not None:
        given = (until.dim(), until.shape[0], until.dtype)
        expect(op, "until must be [N] int32", given, (1, q.shape[1], torch.int32), "pass one for each query row")
    if k is not None:
        expect(op, "slots must be [T] for k of [1, T, Hk, D]", slots.shape[0], k.shape[1], "pass one for each new row")


def check_pages(keys: Tensor, values: Tensor) -> None:
    """What the kernels ask of pages and the reference does not."""
    op = "attention"
    expect(op, "the page size must be a multiple of 16", keys.shape[1] % 16, 0, "blocks of keys lie within one page")
    strides = keys.stride(3), values.stride(3)
    expect(op, "keys and values must have unit stride in D", strides, (1, 1), "allocate D last")


@jit
def _write_row(
    new_ptr, cache_ptr, slot, head_stride, cache_page_stride, cache_row_stride, cache_head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    head = (column // DIM).to(tl.int64)
    element = column % DIM
    inside = column < HEADS * DIM
    cache_ptr += (slot // PAGE) * cache_page_stride + (slot % PAGE) * cache_row_stride

    row = tl.load(new_ptr + head * head_stride + element, inside)

    tl.store(cache_ptr + head * cache_head_stride + element, row.to(cache_ptr.dtype.element_ty), inside)


@jit
def _write_rows_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    key_page_stride, key_row_stride, key_head_stride, value_page_stride, value_row_stride, value_head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Row program_id(0) of k, or of v where program_id(1) is 1, into its slot."""
    start(DEPENDENT)
    token = tl.program_id(0)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    token = token.to(tl.int64)
    if tl.program_id(1) == 0:
        _write_row(
            k_ptr + token * k_token_stride, keys_ptr, slot, k_head_stride,
            key_page_stride, key_row_stride, key_head_stride, HEADS, DIM, PAGE, BLOCK,
        )  # fmt: skip
    else:
        _write_row(
            v_ptr + token * v_token_stride, values_ptr, slot, v_head_stride,
            value_page_stride, value_row_stride, value_head_stride, HEADS, DIM, PAGE, BLOCK,
        )  # fmt: skip


@jit
def _exponential(x, dtype: tl.constexpr):
    """exp(x) for a result that is rounded to dtype."""
    if dtype == tl.float32:  # noqa: SIM108  (a compile-time branch)
        result = exponential(x)
    else:
        result = tl.exp2(x * 1.4426950408889634)
    return result


@jit
def _request_of(tile, starts_ptr, requests, BLOCK_Q: tl.constexpr, CHUNK: tl.constexpr):
    """The request that `tile` belongs to; `requests` itself stands for the padding.

    Counted, not searched: one load of all starts takes as long as one step of a bisection.
    """
    found = 0
    for first in range(0, requests + 1, CHUNK):
        request = first + tl.arange(0, CHUNK)
        inside = request <= requests
        first_tile = tl.load(starts_ptr + request, inside, other=0) // BLOCK_Q + request
        found += tl.sum((inside & (first_tile <= tile)).to(tl.int32))
    return found - 1


@jit
def _load_page_rows(ptr, row, row_stride, stop, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of keys or values, [rows, DIM_BLOCK]; MASKED: zeros from row `stop` on, where nothing was written yet."""
    column = tl.arange(0, DIM_BLOCK)[None, :]
    ptr += row[:, None] * row_stride + column
    if MASKED or DIM < DIM_BLOCK:  # noqa: SIM108  (a compile-time branch)
        rows = tl.load(ptr, (row < stop)[:, None] & (column < DIM), other=0.0)
    else:
        rows = tl.load(ptr)
    return rows


@jit
def _page_of(table_ptr, block, inside, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.load(table_ptr + block * BLOCK_N // PAGE, inside, other=0).to(tl.int64)


@jit
def _attend(
    q, mixed, top, total, position, last, stop, begin, end, skip_from, skip, keys_ptr, values_ptr, table_ptr, visible_ptr,
    key_page_stride, key_row_stride, value_page_stride, value_row_stride, scale,
    DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    VISIBLE: tl.constexpr,
):  # fmt: skip
    """Take blocks of keys and values into a running softmax: from begin to end, those from skip_from on moved by skip.

    Rows see keys from their position less WINDOW to last.

    top and total are each row's largest score and its sum of exp(score - top), mixed the sum of exp(score - top) * value.
    Not MASKED: every row sees every key. VISIBLE: but those that visible_ptr hides; only with MASKED.
    """
    row = tl.arange(0, BLOCK_N)
    block = begin + tl.where(begin >= skip_from, skip, 0)
    page = _page_of(table_ptr, block, begin < end, PAGE, BLOCK_N)
    for i in range(begin, end):
        # One block ahead: loads whose address is a load of the same step are fetched a stage later.
        following = i + 1 + tl.where(i + 1 >= skip_from, skip, 0)
        following_page = _page_of(table_ptr, following, i + 1 < end, PAGE, BLOCK_N)
        first = block * BLOCK_N
        within = (first % PAGE).to(tl.int64)
        key_block = keys_ptr + page * key_page_stride + within * key_row_stride
        value_block = values_ptr + page * value_page_stride + within * value_row_stride

        keys = _load_page_rows(key_block, row, key_row_stride, stop - first, DIM, q.shape[1], MASKED).to(q.dtype)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if MASKED:
            key = first + row[None, :]
            seen = key <= last[:, None]
            if WINDOW:
                seen &= key > position[:, None] - WINDOW
            if VISIBLE:
                seen &= tl.load(visible_ptr + key, key < stop, other=0) != 0
            scores = tl.where(seen, scores, float("-inf"))

        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher  # a row that has seen no key yet
        weights = _exponential(scores - base[:, None], q.dtype)
        kept = _exponential(top - base, q.dtype)
        total = total * kept + tl.sum(weights, axis=1)
        top = higher

        values = _load_page_rows(value_block, row, value_row_stride, stop - first, DIM, q.shape[1], MASKED).to(q.dtype)
        mixed = tl.dot(weights.to(q.dtype), values, mixed * kept[:, None], input_precision="ieee")
        block = following
        page = following_page
    return mixed, top, total


@jit(do_not_specialize=["rows", "requests", "table_stride", "visible_stride"])  # one compilation for all token counts
def _attention_kernel(
    q_ptr, keys_ptr, values_ptr, table_ptr, positions_ptr, until_ptr, starts_ptr, visible_ptr, out_ptr, tops_ptr, totals_ptr,
    rows, requests, q_token_stride, q_head_stride, key_page_stride, key_row_stride, key_head_stride,
    value_page_stride, value_row_stride, value_head_stride, table_stride, visible_stride, scale,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    VISIBLE: tl.constexpr, AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q rows of one request times the GROUP query heads of one KV head, over one of SPLITS shares of their keys.

    Request r has the tiles from starts[r] // BLOCK_Q + r on: as many as it can need, whatever the starts are. One more
    request without keys stands for the padding. With SPLITS > 1 out is [rows, heads, SPLITS, DIM], not divided by totals yet.
    """
    start(DEPENDENT)
    scale = pinned(scale)
    # Of a long request the last tiles see the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    request = _request_of(tile, starts_ptr, requests, BLOCK_Q, 128)
    begins = tl.load(starts_ptr + request)
    real = request < requests
    ends = tl.load(starts_ptr + request + 1, real, other=rows)
    first_row = begins + (tile - begins // BLOCK_Q - request) * BLOCK_Q
    if first_row >= ends:
        return

    lane = tl.arange(0, BLOCK_Q * GROUP_BLOCK)
    row = first_row + lane // GROUP_BLOCK
    head = lane % GROUP_BLOCK
    mine = (row < ends) & (head < GROUP)
    column = tl.arange(0, DIM_BLOCK)[None, :]
    position = tl.load(positions_ptr + row, (row < ends) & real, other=-1).to(tl.int32)
    q_ptr += row.to(tl.int64)[:, None] * q_token_stride + (kv_head * GROUP + head).to(tl.int64)[:, None] * q_head_stride
    q = tl.load(q_ptr + column, mine[:, None] & (column < DIM), other=0.0)
    keys_ptr += kv_head * key_head_stride
    values_ptr += kv_head * value_head_stride
    table_ptr += request.to(tl.int64) * table_stride
    visible_ptr += request.to(tl.int64) * visible_stride

    highest = tl.max(position)
    lowest = tl.min(tl.where(position < 0, highest, position))
    last = tl.load(until_ptr + row, (row < ends) & real, other=-1) if AHEAD else position
    stop = tl.max(last) + 1
    first_block = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK_N if WINDOW else 0
    last_block = tl.cdiv(stop, BLOCK_N)
    share = tl.cdiv(last_block - first_block, SPLITS)
    begin = first_block + split * share
    end = tl.minimum(begin + share, last_block)

    mixed = tl.zeros((BLOCK_Q * GROUP_BLOCK, DIM_BLOCK), tl.float32)
    top = tl.full((BLOCK_Q * GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q * GROUP_BLOCK,), tl.float32)
    whole_begin = begin
    whole_end = begin
    if BLOCK_Q * GROUP_BLOCK >= 64 and not VISIBLE:  # large tiles have most blocks whole: all rows see all keys
        whole_end = tl.minimum((lowest + 1) // BLOCK_N, end)
        if WINDOW:
            whole_begin = tl.maximum(tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), BLOCK_N), begin)
        whole_end = tl.maximum(whole_begin, whole_end)
        mixed, top, total = _attend(
            q, mixed, top, total, position, last, stop, whole_begin, whole_end, 0, 0, keys_ptr, values_ptr, table_ptr,
            visible_ptr, key_page_stride, key_row_stride, value_page_stride, value_row_stride, scale,
            DIM, PAGE, WINDOW, BLOCK_N, False, False,
        )  # fmt: skip
    skip = whole_end - whole_begin
    mixed, top, total = _attend(
        q, mixed, top, total, position, last, stop, begin, end - skip, whole_begin, skip, keys_ptr, values_ptr, table_ptr,
        visible_ptr, key_page_stride, key_row_stride, value_page_stride, value_row_stride, scale,
        DIM, PAGE, WINDOW, BLOCK_N, True, VISIBLE,
    )  # fmt: skip

    target = (row.to(tl.int64) * tl.num_programs(1) + kv_head) * GROUP + head
    if SPLITS == 1:
        mixed /= tl.where(total > 0.0, total, 1.0)[:, None]  # padding has seen nothing
    else:
        target = target * SPLITS + split
        tl.store(tops_ptr + target, top, mine)
        tl.store(totals_ptr + target, total, mine)
        mine &= total > 0.0
    tl.store(out_ptr + target[:, None] * DIM + column, mixed, mine[:, None] & (column < DIM))


@jit
def _combine_kernel(
    mixed_ptr, tops_ptr, totals_ptr, out_ptr, DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row of one head from its SPLITS shares. A share that saw no key has total 0, and its row was not
    written. By one warp, whose threads have all shares of their columns: no sum but the totals' leaves a thread."""
    start(DEPENDENT)
    head = tl.program_id(0).to(tl.int64)
    share = head * SPLITS + tl.arange(0, SPLITS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)

    total = tl.load(totals_ptr + share)
    top = tl.load(tops_ptr + share)
    # All at once: a load that waits for the totals is a second way to memory, and what was not written is left out behind it.
    mixed = tl.load(mixed_ptr + share[:, None] * DIM + column[None, :], (column < DIM)[None, :], other=0.0)
    mixed = tl.where((total > 0.0)[:, None], mixed, 0.0)

    highest = tl.max(top)
    weight = exponential(top - tl.where(highest == float("-inf"), 0.0, highest))
    whole = tl.sum(weight * total)
    mixed = tl.sum(mixed * weight[:, None], axis=0) / tl.where(whole > 0.0, whole, 1.0)

    tl.store(out_ptr + head * DIM + column, mixed, column < DIM)


class AttentionPlan(NamedTuple):
    """block_q rows times the query heads of one KV head are a tile, block_n keys a block; splits programs share a tile."""

    block_q: int
    block_n: int
    splits: int
    warps: int
    stages: int


def attention_plan(
    rows: int, requests: int, kv_heads: int, group: int, dim: int, max_keys: int, window: int = 0, itemsize: int = 2
) -> AttentionPlan:
    """Launch parameters by shape class, measured with scripts/bench_attention.py. group is Hq / Hk, max_keys what a request can
    hold, itemsize q's."""
    group_block, dim_block = power_of_two(group), _dim_block(dim)
    average = -(-rows // max(requests, 1))
    few = average <= 8
    if itemsize == 4:  # no tensor cores: products in registers
        block_m, block_n, warps, stages = 16, 16, 4, 1
    elif few:
        idle = requests * kv_heads < 32  # smaller tiles then, as there are processors for more of them
        block_m = 16 if dim_block <= 256 or idle else min(max(16, average * group_block), 32)
        block_n, warps, stages = 32 if dim_block > 256 and requests * kv_heads <= 8 else 64, 4, 2
    elif dim_block <= 256:
        block_m, block_n, warps, stages = 128, 64, 8, 2
    else:
        block_m, block_n, warps, stages = 64, 32, 8, 2
    block_q = max(1, power_of_two(block_m) // group_block)

    tiles = max(requests * -(-average // block_q) * kv_heads, 1)
    # A window has few blocks: a share more costs its sum as much as its program saves.
    if few and window and dim_block <= 256 and itemsize < 4:
        blocks = -(-min(window, max_keys) // block_n)
        splits = min(power_of_two_within(PROCESSORS * blocks // (16 * tiles)), 8)
        splits = min(max(splits, 2 if tiles <= PROCESSORS else 1), power_of_two_within(blocks))
        # A third block under way takes a processor's memory for one program.
        return AttentionPlan(block_q, block_n, splits, warps, 3 if splits < 8 and tiles * splits <= PROCESSORS else 2)
    # Partial results are fp32 rows of each split: what many rows would write costs more than idle processors.
    if few:  # two programs a processor, and never one alone for a request's keys
        splits = max(2, power_of_two(-(-power_of_two_within(2 * PROCESSORS) // tiles)))
    else:
        splits = power_of_two_within((PROCESSORS if rows <= 512 else 0) // tiles)
    if window and window < max_keys:
        most = power_of_two(-(-window // 32) + 1)  # one more: a window may begin within a block
    else:
        most = power_of_two_within(max_keys // (64 if dim_block > 256 and requests * kv_heads >= 32 else 32))
    # Their sum has all splits of a row in registers: 64 of 512 columns took 10 us longer than 32.
    return AttentionPlan(block_q, block_n, min(splits, most, 64 if dim_block <= 256 else 32), warps, stages)


def attention_kernels(
    shape: tuple[int, int, int, int], max_keys: int, itemsize: int, rows: int, requests: int
) -> Iterator[tuple[Any, ...]]:
    """What `rows` of so many requests can be launched with: each stands for a compiled kernel.

    shape  of a layer: KV heads, query heads of each, their size, window"""
    kv_heads, group, dim, window = shape
    yield shape, attention_plan(rows, requests, kv_heads, group, dim, max_keys, window, itemsize)
    yield shape, hopper_plan(rows, requests, kv_heads, group, dim, max_keys)


def _dim_block(dim: int) -> int:
    return max(16, power_of_two(dim))  # a product of tiles takes no side below 16


def _launch(
    q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, slots: Tensor, table: Tensor,
    positions: Tensor, starts: Tensor, layer: int, window: int, scale: float, visible: Tensor | None = None,
    until: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = fresh(q)
    step = k, v, keys, values, slots, table, positions, starts, window, scale
    launch_planned(out, q, *step, visible=visible, until=until)
    return out


def launch_planned(
    out: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, slots: Tensor, table: Tensor,
    positions: Tensor, starts: Tensor, window: int, scale: float, plan: AttentionPlan | HopperPlan | None = None,
    visible: Tensor | None = None, until: Tensor | None = None,
) -> None:  # fmt: skip
    """The kernels, by `plan` or the plan of the shapes: launches depend on shapes alone, so a CUDA graph may hold them."""
    check_lengths(q, k, slots, table, positions, starts, visible, until)
    check_pages(keys, values)
    _, rows, heads, dim = q.shape
    _, page, kv_heads, _ = keys.shape
    requests = table.shape[0]
    if k is not None and v is not None and k.shape[1]:
        k, v = unit_stride(k), unit_stride(v)
        dependent, options = alone()
        _write_rows_kernel[(k.shape[1], 2)](
            k, v, keys, values, slots.contiguous(), *k.stride()[1:3], *v.stride()[1:3],
            *keys.stride()[:3], *values.stride()[:3], kv_heads, dim, page, power_of_two(kv_heads * dim), dependent,
            num_warps=4, **options,
        )  # fmt: skip
    if not q.numel():
        return

    group, dim_block = heads // kv_heads, _dim_block(dim)
    q, table, positions, starts = unit_stride(q), unit_stride(table), positions.contiguous(), starts.contiguous()
    if plan is None and not masks(visible) and until is None and hopper_takes(q, keys, values, table):
        plan = hopper_plan(rows, requests, kv_heads, group, dim, table.shape[1] * page)
    if plan is None:
        plan = attention_plan(rows, requests, kv_heads, group, dim, table.shape[1] * page, window, q.element_size())
    mixed, tops, totals, splits = out, out, out, plan.splits
    if splits > 1:
        mixed = q.new_empty((rows, heads, splits, dim), dtype=torch.float32)
        tops, totals = q.new_empty((2, rows, heads, splits), dtype=torch.float32)
    if isinstance(plan, HopperPlan):
        launch_hopper(mixed, tops, totals, q, keys, values, table, positions, starts, window, scale, plan)
    else:
        block_q, group_block, block_n = plan.block_q, power_of_two(group), min(plan.block_n, page & -page)
        expect("attention", "a tile must have 16 rows or more", block_q * group_block >= 16, True, "raise block_q")
        shown = unit_stride(visible).view(torch.uint8) if masks(visible) else table
        last = table if until is None else until.contiguous()
        dependent, options = alone()
        _attention_kernel[(rows // block_q + requests + 1, kv_heads, splits)](
            q, keys, values, table, positions, last, starts, shown, mixed, tops, totals, rows, requests,
            *q.stride()[1:3], *keys.stride()[:3], *values.stride()[:3], table.stride(0), shown.stride(0), scale,
            group, group_block, dim, dim_block, page, window, block_q, block_n, splits, masks(visible),
            until is not None, dependent, num_warps=plan.warps, num_stages=plan.stages, **options,
        )  # fmt: skip
    if splits > 1:
        dependent, options = alone()
        block = min(dim_block, 128 if splits <= 32 else 64)  # what a warp has registers for
        _combine_kernel[(rows * heads, -(-dim // block))](
            mixed, tops, totals, out, dim, block, splits, dependent, num_warps=1, **options
        )


@op(launch=_launch, like="q", check=check_attention, mutates=("keys", "values"))
def attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, slots: Tensor, table: Tensor,
    positions: Tensor, starts: Tensor, layer: int, window: int, scale: float, visible: Tensor | None = None,
    until: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of N packed query rows of R requests over their pages.

    q          [1, N, Hq, D]     fp32, fp16 or bf16; rows of one request stand together
    k, v       [1, T, Hk, D]     new rows, written before anything is read; None where another layer owns the pages
    keys       [P, page, Hk, D]  written in place, in a dtype of their own; on CUDA page is a multiple of 16 and D has stride 1
    values     [P, page, Hk, D]  written in place
    slots      [T] int64         page * page size + offset for each new row; negative for padding, which is not written
    table      [R, pages] int32  the pages of each request, in order of position
    positions  [N] int64         of each query row within its request; it sees the keys at positions up to its own
    starts     [R + 1] int32     from 0 on: rows of request r are starts[r] to starts[r + 1], rows from starts[R] on padding
    layer      the layer's index, for messages
    window     keys further back than window - 1 positions are not seen; 0 sees all
    visible    [R, keys] bool    keys of each request, by position, that may be seen at all, as many as any row reaches; None
                                 or [R, 0]: all
    until      [N] int32         the last position that each query row sees, its own or a later one whose key is written by
                                 now; None: its own
    returns    [1, N, Hq, D]     q.dtype, contiguous; zero for padding rows and rows that see no key

    Raises ValueError for shapes that do not fit.
    """
    check_lengths(q, k, slots, table, positions, starts, visible, until)
    if k is not None and v is not None:
        write_reference(k, v, keys, values, slots)
    out = q.new_zeros(q.shape)
    page = keys.shape[1]
    bounds = starts.tolist()
    for request, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if first == last:
            continue
        rows = positions[first:last]
        ends = rows if until is None else until[first:last]
        length = int(ends.max()) + 1
        pages = table[request, : -(-length // page)].long()
        seen_keys, seen_values = (cache[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (keys, values))
        column = torch.arange(length, device=q.device)
        seen = column <= ends[:, None]
        if window:
            seen &= column > rows[:, None] - window
        if masks(visible):
            seen &= visible[request, :length]
        # Heads are expanded here: enable_gqa takes another path, with another sum, for one query row.
        group = q.shape[2] // keys.shape[2]
        seen_keys, seen_values = (rows.to(q.dtype).repeat_interleave(group, dim=1) for rows in (seen_keys, seen_values))
        queries = q[:, first:last].transpose(1, 2)
        mixed = F.scaled_dot_product_attention(queries, seen_keys, seen_values, seen[None, None], scale=scale)
        out[:, first:last] = mixed.transpose(1, 2)
    return out


def attention_into(
    out: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, slots: Tensor, table: Tensor,
    positions: Tensor, starts: Tensor, layer: int, window: int = 0, scale: float = 1.0, visible: Tensor | None = None,
    until: Tensor | None = None,
) -> None:  # fmt: skip
    """As `attention`, written to `out`: [1, N, Hq, D], contiguous, q.dtype. For a CUDA graph whose output has one address."""
    check_attention("attention", q, k, v, keys, values, slots, table, positions, starts)
    if takes(out, q):
        with torch.cuda.device(q.device):  # Triton launches on the current device, whatever the tensors' own is
            pages = k, v, keys, values, slots, table, positions, starts
            launch_planned(out, q, *pages, window, scale, visible=visible, until=until)
    else:
        pages = k, v, keys, values, slots, table, positions, starts
        out.copy_(attention.reference(q, *pages, layer, window, scale, visible, until))


def takes(out: Tensor, q: Tensor) -> bool:
    """Whether the kernels write `out`, else the reference does. Raises ValueError if `out` is no place for the result."""
    expect("attention", "out must have q's shape and dtype", (*out.shape, out.dtype), (*q.shape, q.dtype), "allocate it as q")
    expect("attention", "out must be contiguous", out.is_contiguous(), True, "allocate it as q")
    if q.is_cuda and triton is None:
        raise ValueError("attention on CUDA needs Triton, found none; install the triton that torch pins")
    return q.is_cuda
