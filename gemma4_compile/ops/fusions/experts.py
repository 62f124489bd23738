"""experts: the routed experts of a layer, from the tokens and their routes to the weighted sum of what the experts say.

Source: Gemma4TextExperts as transformers' `grouped_mm` and `batched_mm` compute it: both products and gelu are rounded to the
input's dtype, as is gelu(gate) * up; the routing weight is multiplied in the wider of both dtypes, the sum over a token's
experts is made in fp32 and rounded once. (Its `eager` form rounds after each addition.)

A pair is a token and one of its experts; it has the number token * top_k + place. Four ways, by `experts_plan`:

    pairs     few tokens, hardly two on one expert: each pair reads its expert's weights. up, then down with the sum: 2 launches
    tiles     pairs are sorted by expert; up to `rows` of one expert are a tile, which reads its weights once. sort, up, down,
              sum: 4 launches, or 5. Tensor cores, with the weights as the left operand: 16 rows are enough to fill one
    hopper    the same for prefills on Hopper, with kernels of their own (experts_hopper.py)
    vendor    the same sort and sum around torch's grouped products, for prefills elsewhere

The kernels of the first two overlap their starts (ops/dependent.py); the second kernel of a few tokens reads its weights while
the first still runs. No way waits for the GPU, and no grid depends on the routes: tiles that are
not needed return at once. Nothing is added by atomics, so the result does not depend on the order in which programs run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.ops.dependent import Launch, alone, behind, first, ready, start
from gemma4_compile.ops.examples import Draw
from gemma4_compile.ops.library import as_rows, expect, jit, op, power_of_two, rounded, tl
from gemma4_compile.ops.plans import HopperTilesPlan, PairPlan, TiledPlan, TilePlan, experts_plan

from .experts_hopper import ROWS as HOPPER_ROWS
from .experts_hopper import hopper_takes, launch_hopper_tiles
from .geglu import geglu, launch_geglu
from .linear import add_products, gated_product, load_weights, stacked_rows


def _check(op: str, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    expect(op, "x must be [T, H]", x.dim(), 2, "flatten the tokens first")
    expect(op, "indices must be [T, k]", (indices.dim(), indices.shape[:1]), (2, x.shape[:1]), "pass the router's indices")
    expect(op, "weights must have the shape of indices", weights.shape, indices.shape, "pass the router's weights")
    expect(op, "gate_up must be [E, 2I, H]", (gate_up.dim(), gate_up.shape[2]), (3, x.shape[1]), "pass gate_up_proj")
    shape = (gate_up.shape[0], x.shape[1], gate_up.shape[1] // 2)
    expect(op, "down must be [E, H, I] for gate_up [E, 2I, H]", tuple(down.shape), shape, "pass down_proj")
    for weight in (gate_up, down):
        expect(op, "each weight must have the input's dtype", weight.dtype, x.dtype, "cast one of them")
    known = weights.dtype in (x.dtype, torch.float32)
    expect(op, "weights must be fp32 or of the input's dtype", known, True, "cast them to float32")


@jit
def _weighted(product, weight_ptr, present, dtype: tl.constexpr):
    """A product rounded, times its routing weight as Hugging Face rounds that."""
    weight = tl.load(weight_ptr, present, other=0.0)
    weighted = rounded(product, dtype) * weight.to(tl.float32)
    if weight_ptr.dtype.element_ty != tl.float32:
        weighted = rounded(weighted, dtype)
    return tl.where(present, weighted, 0.0)


@jit
def _pair_up_kernel(
    x_ptr, indices_ptr, weight_ptr, hidden_ptr, x_stride,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """hidden[pair] = gelu_tanh(gate) * up, OUTPUTS // 2 elements a program."""
    start(DEPENDENT)
    pair = tl.program_id(1)
    row = stacked_rows(ROWS, OUTPUTS, True)
    expert = tl.load(indices_ptr + pair).to(tl.int64)
    known = (expert >= 0) & (expert < EXPERTS)
    present = known & (row < 2 * ROWS)
    weight_ptr += (tl.where(known, expert, 0) * (2 * ROWS) + row) * WIDTH
    x_ptr += (pair // TOP_K).to(tl.int64) * x_stride

    sums = (tl.zeros((OUTPUTS, BLOCK // 8), tl.float32),)
    for begin in range(0, WIDTH, BLOCK * BLOCKS):
        weights = load_weights(weight_ptr, present, begin, WIDTH, BLOCK, BLOCKS, WHOLE)
        sums = add_products(sums, weights, x_ptr, 0, begin, WIDTH, OUTPUTS, BLOCK, WHOLE)

    total = tl.sum(sums[0], axis=1)
    gate, up = tl.split(tl.trans(tl.reshape(total, (2, OUTPUTS // 2))))
    output = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
    value = gated_product(gate, up, hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + pair.to(tl.int64) * ROWS + output, value, output < ROWS)


@jit
def _pair_down_kernel(
    hidden_ptr, indices_ptr, routing_ptr, weight_ptr, out_ptr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOP_BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[token] = the weighted sum over its experts, OUTPUTS elements a program: the same rows of all its experts at once.

    When it starts, only the op's first kernel may still run: the routes are there, and with them it is known which weights."""
    start(DEPENDENT)
    token = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, TOP_BLOCK * OUTPUTS)
    place = lane // OUTPUTS
    row = tl.program_id(0) * OUTPUTS + lane % OUTPUTS
    expert = tl.load(indices_ptr + token * TOP_K + place, place < TOP_K, other=-1).to(tl.int64)
    known = (expert >= 0) & (expert < EXPERTS)
    present = known & (row < ROWS)
    weight_ptr += (tl.where(known, expert, 0) * ROWS + row) * WIDTH
    # Lanes past TOP_K read the last pair's row; their weights are zeros, and _weighted drops them.
    hidden_ptr += (token * TOP_K + tl.minimum(place, TOP_K - 1))[:, None] * WIDTH

    sums = (tl.zeros((TOP_BLOCK * OUTPUTS, BLOCK // 8), tl.float32),)
    for begin in range(0, WIDTH, BLOCK * BLOCKS):
        weights = load_weights(weight_ptr, present, begin, WIDTH, BLOCK, BLOCKS, WHOLE)
        ready(DEPENDENT)
        sums = add_products(sums, weights, hidden_ptr, 0, begin, WIDTH, TOP_BLOCK * OUTPUTS, BLOCK, WHOLE)

    weighted = _weighted(tl.sum(sums[0], axis=1), routing_ptr + token * TOP_K + place, present, out_ptr.dtype.element_ty)
    total = tl.sum(tl.reshape(weighted, (TOP_BLOCK, OUTPUTS)), axis=0)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tl.store(out_ptr + token * ROWS + output, total, output < ROWS)


@jit
def _list_tiles(tiles_ptr, bound, tile, expert, first, end, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """An expert's tiles, from number `tile` on, of its sorted positions first to end."""
    lane = tl.arange(0, BLOCK)
    for begin in range(0, (end - first + ROWS - 1) // ROWS, BLOCK):
        position = first + (begin + lane) * ROWS
        tl.store(tiles_ptr + tile + begin + lane, expert, position < end)
        tl.store(tiles_ptr + bound + tile + begin + lane, position, position < end)


@jit
def _fill_rest(order_ptr, tiles_ptr, known, pairs, tiles, bound, BLOCK: tl.constexpr):
    """No tile behind the last, and a pair in the places of those that are not here: the vendor's product is given rows for
    them too."""
    lane = tl.arange(0, BLOCK)
    for begin in range(tiles, bound, BLOCK):
        tl.store(tiles_ptr + begin + lane, -1, begin + lane < bound)
    for begin in range(known, pairs, BLOCK):
        tl.store(order_ptr + begin + lane, 0, begin + lane < pairs)


@jit(do_not_specialize=["pairs", "bound"])  # one compilation for all token counts
def _sort_kernel(
    indices_ptr, order_ptr, place_ptr, ends_ptr, tiles_ptr, pairs, bound,
    EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program e lists the pairs of expert e in their order: all programs read all indices, and none waits for another.

    order    [pairs]      sorted position -> pair
    place    [pairs]      pair -> sorted position; -1 if its expert is not here
    ends     [EXPERTS]    sorted position behind each expert's last pair
    tiles    [2, bound]   expert and first position of each tile of ROWS; expert -1 where there is no tile
    """
    start(DEPENDENT)
    mine = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS_BLOCK)
    counts = tl.zeros((EXPERTS_BLOCK,), tl.int32)
    for begin in range(0, pairs, BLOCK):
        chosen = tl.load(indices_ptr + begin + lane, begin + lane < pairs, other=-1).to(tl.int32)
        known = (chosen >= 0) & (chosen < EXPERTS)
        counts += tl.histogram(tl.where(known, chosen, 0), EXPERTS_BLOCK, mask=known)
    tiles = (counts + ROWS - 1) // ROWS
    first = tl.sum(tl.where(expert < mine, counts, 0))
    end = first + tl.sum(tl.where(expert == mine, counts, 0))
    first_tile = tl.sum(tl.where(expert < mine, tiles, 0))
    tl.store(ends_ptr + mine, end)

    seen = first
    for begin in range(0, pairs, BLOCK):
        pair = begin + lane
        chosen = tl.load(indices_ptr + pair, pair < pairs, other=-1).to(tl.int32)
        ours = chosen == mine
        position = seen + tl.cumsum(ours.to(tl.int32), axis=0) - 1
        tl.store(order_ptr + position, pair, ours)
        tl.store(place_ptr + pair, position, ours)
        if mine == 0:
            tl.store(place_ptr + pair, -1, (pair < pairs) & ((chosen < 0) | (chosen >= EXPERTS)))
        seen += tl.sum(ours.to(tl.int32))
    _list_tiles(tiles_ptr, bound, first_tile, mine, first, end, ROWS, BLOCK)
    if mine == 0:
        _fill_rest(order_ptr, tiles_ptr, tl.sum(counts), pairs, tl.sum(tiles), bound, BLOCK)


@jit(do_not_specialize=["pairs"])
def _count_kernel(
    indices_ptr, counts_ptr, pairs, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """counts[chunk, expert] of CHUNK pairs."""
    start(DEPENDENT)
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    chosen = tl.load(indices_ptr + pair, pair < pairs, other=-1).to(tl.int32)
    known = (chosen >= 0) & (chosen < EXPERTS)
    counts = tl.histogram(tl.where(known, chosen, 0), EXPERTS_BLOCK, mask=known)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS_BLOCK + tl.arange(0, EXPERTS_BLOCK), counts)


@jit(do_not_specialize=["pairs", "bound"])
def _place_kernel(
    indices_ptr, counts_ptr, order_ptr, place_ptr, ends_ptr, tiles_ptr, pairs, bound,
    EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """As _sort_kernel, a chunk of pairs a program: their places are counted from the chunks before."""
    start(DEPENDENT)
    mine = tl.program_id(0)
    chunks = tl.num_programs(0)
    expert = tl.arange(0, EXPERTS_BLOCK)
    counts = tl.zeros((EXPERTS_BLOCK,), tl.int32)
    before = tl.zeros((EXPERTS_BLOCK,), tl.int32)
    for begin in range(0, chunks, BLOCK):
        chunk = begin + tl.arange(0, BLOCK)
        some = tl.load(counts_ptr + chunk[:, None] * EXPERTS_BLOCK + expert[None, :], (chunk < chunks)[:, None], other=0)
        counts += tl.sum(some, axis=0)
        before += tl.sum(tl.where((chunk < mine)[:, None], some, 0), axis=0)
    ends = tl.cumsum(counts, axis=0)
    tiles = (counts + ROWS - 1) // ROWS
    end_tiles = tl.cumsum(tiles, axis=0)

    lane = tl.arange(0, CHUNK)
    pair = mine * CHUNK + lane
    chosen = tl.load(indices_ptr + pair, pair < pairs, other=-1).to(tl.int32)
    known = (chosen >= 0) & (chosen < EXPERTS)
    earlier = (chosen[:, None] == chosen[None, :]) & (lane[None, :] < lane[:, None])
    position = tl.sum(earlier.to(tl.int32), axis=1)
    position += tl.sum(tl.where(chosen[:, None] == expert[None, :], (ends - counts + before)[None, :], 0), axis=1)
    tl.store(order_ptr + position, pair, known)
    tl.store(place_ptr + pair, tl.where(known, position, -1), pair < pairs)

    for one in range(mine, EXPERTS, chunks):
        end = tl.sum(tl.where(expert == one, ends, 0))
        first = end - tl.sum(tl.where(expert == one, counts, 0))
        first_tile = tl.sum(tl.where(expert == one, end_tiles - tiles, 0))
        tl.store(ends_ptr + one, end)
        _list_tiles(tiles_ptr, bound, first_tile, one, first, end, ROWS, CHUNK)
    if mine == 0:
        _fill_rest(order_ptr, tiles_ptr, tl.sum(counts), pairs, tl.sum(tiles), bound, CHUNK)


@jit(do_not_specialize=["bound"])  # one compilation for all token counts
def _tile_kernel(
    x_ptr, weight_ptr, out_ptr, order_ptr, ends_ptr, tiles_ptr, bound, x_stride,
    TOP_K: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, GATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[position] for a tile of positions, OUTPUTS rows of the tile's expert a program.

    GATED    x is by token, weight [E, 2 COUNT, WIDTH], out gelu_tanh(gate) * up; else x by position, weight [E, COUNT, WIDTH]
    """
    start(DEPENDENT)
    tile = tl.program_id(1)
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    position = tl.load(tiles_ptr + bound + tile) + tl.arange(0, ROWS)
    inside = position < tl.load(ends_ptr + expert)
    # Positions and rows past the end read what is there anyway, and are not stored: no load needs a mask for them.
    if GATED:
        source = tl.load(order_ptr + position, inside, other=0) // TOP_K
        row = tl.minimum(stacked_rows(COUNT, OUTPUTS, True), 2 * COUNT - 1)
        weight_ptr += expert * (2 * COUNT * WIDTH)
    else:
        source = tl.where(inside, position, 0)
        row = tl.minimum(stacked_rows(COUNT, OUTPUTS, False), COUNT - 1)
        weight_ptr += expert * (COUNT * WIDTH)
    x_ptr += source.to(tl.int64)[None, :] * x_stride
    weight_ptr += row[:, None] * WIDTH
    lane = tl.arange(0, BLOCK)

    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + lane
        if WHOLE:
            weight = tl.load(weight_ptr + column[None, :])
            x = tl.load(x_ptr + column[:, None])
        else:
            weight = tl.load(weight_ptr + column[None, :], (column < WIDTH)[None, :], other=0.0)
            x = tl.load(x_ptr + column[:, None], (column < WIDTH)[:, None], other=0.0)
        if x.dtype == tl.float32:
            # A dot would be one chain of WIDTH additions, five times less exact than eager's; with the sum along the middle
            # axis, Triton makes a dot of this too, and one in tf32.
            total += tl.sum(weight[:, None, :] * tl.trans(x)[None, :, :], axis=2)
        else:
            total = tl.dot(weight, x, total)

    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, OUTPUTS // 2, ROWS)), (1, 2, 0)))
        total = gated_product(gate, up, out_ptr.dtype.element_ty)
        output = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
    else:
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    out_ptrs = out_ptr + position.to(tl.int64)[None, :] * COUNT + output[:, None]
    tl.store(out_ptrs, total, inside[None, :] & (output < COUNT)[:, None])


@jit
def _sum_kernel(
    products_ptr, place_ptr, routing_ptr, out_ptr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[token] = the sum over its experts of weight * product, in the order of the routes."""
    start(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)

    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        position = tl.load(place_ptr + token * TOP_K + k)
        present = (position >= 0) & (column < WIDTH)
        product = tl.load(products_ptr + position.to(tl.int64) * WIDTH + column, present, other=0.0)
        total += _weighted(product, routing_ptr + token * TOP_K + k, position >= 0, out_ptr.dtype.element_ty)

    tl.store(out_ptr + token * WIDTH + column, total, column < WIDTH)


def _launch(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    (count, hidden, inner), top_k = down.shape, indices.shape[1]
    plan = experts_plan(x.shape[0], top_k, count, x.dtype, hidden, inner, hopper_takes(x, down))
    return run_plan(plan, x, indices, weights, gate_up, down)


def run_plan(
    plan: PairPlan | TiledPlan | HopperTilesPlan | None,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:  # fmt: skip
    """The kernels by a given plan; None is torch's grouped product, which takes bf16 whose rows are multiples of 16 bytes."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel() or not indices.numel():
        return out.zero_()
    contiguous = as_rows(x), indices.contiguous(), weights.contiguous(), gate_up.contiguous(), down.contiguous()
    if isinstance(plan, PairPlan):
        _by_pairs(*contiguous, out, plan)
    elif isinstance(plan, TiledPlan):
        _by_tiles(*contiguous, out, plan)
    elif isinstance(plan, HopperTilesPlan):
        _by_hopper(*contiguous, out)
    else:
        _by_vendor(*contiguous, out)
    return out


def _by_pairs(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, out: Tensor, plan: PairPlan) -> None:
    (tokens, width), top_k, (experts, _, inner) = x.shape, indices.shape[1], down.shape
    hidden = x.new_empty((tokens * top_k, inner))
    up, last = plan.up, plan.down
    dependent, options = first()
    _pair_up_kernel[(-(-2 * inner // up.outputs), tokens * top_k)](
        x, indices, gate_up, hidden, x.stride(0),
        experts, top_k, inner, width, up.outputs, up.block, up.blocks, width % (up.block * up.blocks) == 0, dependent,
        num_warps=up.warps, **options,
    )  # fmt: skip
    dependent, options = behind(down)
    _pair_down_kernel[(-(-width // last.outputs), tokens)](
        hidden, indices, weights, down, out,
        experts, top_k, power_of_two(top_k), width, inner,
        last.outputs, last.block, last.blocks, inner % (last.block * last.blocks) == 0, dependent,
        num_warps=last.warps, **options,
    )  # fmt: skip


def _by_tiles(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, out: Tensor, plan: TiledPlan) -> None:
    order, place, ends, tiles = sorted_pairs(indices, down.shape[0], plan.rows)
    hidden, products = (x.new_empty((indices.numel(), width)) for width in (down.shape[2], down.shape[1]))
    _launch_tiles(x, gate_up, hidden, order, ends, tiles, indices.shape[1], plan.rows, plan.up, gated=True)
    _launch_tiles(hidden, down, products, order, ends, tiles, indices.shape[1], plan.rows, plan.down, gated=False)
    _sum(products, place, weights, out, behind())


def _launch_tiles(
    x: Tensor, weight: Tensor, out: Tensor, order: Tensor, ends: Tensor, tiles: Tensor, top_k: int, rows: int, plan: TilePlan,
    gated: bool,
) -> None:  # fmt: skip
    bound, (count, width) = tiles.shape[1], weight.shape[1:]
    dependent, options = behind()
    _tile_kernel[(-(-count // plan.outputs), bound)](
        x, weight, out, order, ends, tiles, bound, x.stride(0), top_k, out.shape[1], width,
        rows, plan.outputs, plan.block, width % plan.block == 0, gated, dependent,
        num_warps=plan.warps, num_stages=plan.stages, **options,
    )  # fmt: skip


def _by_hopper(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, out: Tensor) -> None:
    order, place, ends, tiles = sorted_pairs(indices, down.shape[0], HOPPER_ROWS)
    hidden, products = (x.new_empty((indices.numel(), width)) for width in (down.shape[2], down.shape[1]))
    launch_hopper_tiles(x, gate_up, hidden, order, ends, tiles, indices.shape[1], gated=True)
    launch_hopper_tiles(hidden, down, products, order, ends, tiles, indices.shape[1], gated=False)
    _sum(products, place, weights, out, alone())


def _by_vendor(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, out: Tensor) -> None:
    order, place, ends, _ = sorted_pairs(indices, down.shape[0], 128)
    rows = x.index_select(0, order // indices.shape[1])
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    _sum(F.grouped_mm(launch_geglu(gate, up), down.transpose(1, 2), offs=ends), place, weights, out, alone())


def sorted_pairs(indices: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, place, ends and tiles of `rows`, all int32: see _sort_kernel."""
    pairs = indices.numel()
    bound = min(pairs, experts + pairs // rows)  # each expert's last tile may be partly filled
    order, place, ends, tiles = (indices.new_empty(n, dtype=torch.int32) for n in (pairs, pairs, experts, 2 * bound))
    experts_block = max(power_of_two(experts), 32)
    dependent, options = first()
    if pairs <= 4096:
        block = 128 if pairs <= 128 else 1024
        _sort_kernel[(experts,)](
            indices, order, place, ends, tiles, pairs, bound, experts, experts_block, rows, block, dependent, num_warps=4,
            **options,
        )  # fmt: skip
    else:  # where each program's look at all pairs would take longer than a second launch
        chunk = 256
        counts = indices.new_empty((-(-pairs // chunk), experts_block), dtype=torch.int32)
        _count_kernel[(len(counts),)](
            indices, counts, pairs, experts, experts_block, chunk, dependent, num_warps=4, **options
        )  # fmt: skip
        dependent, options = behind()
        _place_kernel[(len(counts),)](
            indices, counts, order, place, ends, tiles, pairs, bound, experts, experts_block, rows, chunk, 32, dependent,
            num_warps=8, **options,
        )  # fmt: skip
    return order, place, ends, tiles.view(2, bound)


def _sum(products: Tensor, place: Tensor, weights: Tensor, out: Tensor, launch: Launch) -> None:
    (tokens, width), top_k = out.shape, weights.shape[1]
    block = min(power_of_two(width), 1024)
    _sum_kernel[(tokens, -(-width // block))](
        products, place, weights, out, width, top_k, block, launch.kind, num_warps=4, **launch.options
    )


def _example(d: Draw) -> tuple[Any, ...]:
    s = d.sizes
    indices = torch.rand(d.batch * d.tokens, s.experts, device=d.device).argsort(-1)[:, : s.top_k].contiguous()
    weights = torch.rand(d.batch * d.tokens, s.top_k, device=d.device).softmax(-1)
    gate_up = s.hidden**-0.5 * d.normal(s.experts, 2 * s.expert_intermediate, s.hidden)
    down = s.expert_intermediate**-0.5 * d.normal(s.experts, s.hidden, s.expert_intermediate)
    return d.flat(s.hidden), indices, weights, gate_up, down


@op(launch=_launch, like="x", check=_check, example=_example)
def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """For each token the sum over its experts e of weight * (down[e] @ (gelu_tanh(gate) * up)), gate and up = gate_up[e] @ x.

    x        [T, H]        fp32, fp16 or bf16
    indices  [T, k]        int64 or int32; a pair whose index is not in 0..E-1 adds nothing (expert parallelism)
    weights  [T, k]        fp32, or x.dtype
    gate_up  [E, 2I, H]    the gate's rows first; x.dtype
    down     [E, H, I]     x.dtype
    returns  [T, H]        x.dtype, contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    # Sorted by expert as `grouped_mm` sorts them: on the CPU the number of rows of a product decides how it is added.
    (tokens, hidden), top_k = x.shape, indices.shape[1]
    chosen, order = torch.sort(indices.reshape(-1), stable=True)
    rows, products = x[order // top_k], x.new_zeros((tokens * top_k, hidden))
    for expert in chosen.unique().tolist():
        if 0 <= expert < gate_up.shape[0]:
            mine = chosen == expert
            gate, up = torch.mm(rows[mine], gate_up[expert].T).chunk(2, dim=-1)
            products[order[mine]] = torch.mm(geglu.reference(gate, up), down[expert].T)
    weighted = products * weights.reshape(-1, 1)
    return weighted.view(tokens, top_k, hidden).sum(dim=1).to(x.dtype)
