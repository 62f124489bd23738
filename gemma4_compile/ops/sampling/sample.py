"""sample: the next token of each row: temperature, top-k, top-p, min-p, then a draw by Gumbel-max.

Source: TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper (transformers), in this order.

Reference and kernels agree to the bit, however many programs add and in whatever order: a value weighs an integer,
exp(x - highest) * 2**40, and exp, log and the random numbers are those of bitwise.py.

What a row costs. Three launches serve all rows. Many programs read each row once (_scan_kernel): that is all for greedy rows
and for rows without thresholds. Of other rows they collect candidates (_collect_kernel), all values from a safe bound on:
with a top_k only the tiles that reach it are read, with a top_p alone all are. Then one program a row (_finish_kernel)
searches each threshold in at most 11 passes over the candidates. Where those are more than the plan's capacity it searches
the whole row, which is exact but slow: flat distributions with a top_p alone, or a top_k above the number of tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma4_compile.ops.library import UNFUSED, expect, jit, op, power_of_two, tl, unit_stride

from .bitwise import gumbel, gumbel_kernel, gumbel_of_kernel, philox_kernel, weights, weights_kernel

MOST = 2**22  # tokens: their weights then sum to less than 2**63
WAYS = 8  # thresholds a pass of a search
PARAMETERS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seeds": torch.int64,
    "offsets": torch.int64,
}


def scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits over temperature, [N, V] fp32; over 1 where that is not positive."""
    return logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]


def kept_reference(x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which of x [N, V] may be drawn, [N, V] bool, for rows whose largest value is finite."""
    width = x.shape[1]
    falling = x.sort(dim=1, descending=True).values
    highest = falling[:, :1]
    count = torch.where(top_k > 0, top_k, width).clamp(max=width).long()
    kth = falling.gather(1, count[:, None] - 1)
    mass = torch.where(falling >= kth, weights(falling - highest).long(), 0).cumsum(dim=1)
    reached = mass.double() >= (top_p.double() * mass[:, -1].double())[:, None]
    last = falling.gather(1, torch.where(top_p < 1, reached.int().argmax(dim=1), width - 1)[:, None])
    likely = weights(x - highest) >= (min_p.clamp(max=1.0) * 2.0**40)[:, None]
    return (x >= kth) & (x >= last) & likely


def _check(op: str, logits: Tensor, **parameters: Tensor) -> None:
    expect(op, "logits must be [N, V]", logits.dim(), 2, "pass the rows that ask for a token")
    expect(op, "V must lie in 1..2**22", bool(1 <= logits.shape[1] <= MOST), True, "pass the model's vocabulary")
    for name, value in parameters.items():
        dtype = PARAMETERS[name]
        expect(op, f"{name} must be [N] for logits [N, V]", value.shape, logits.shape[:1], "pass one a row")
        expect(op, f"{name} has a dtype of its own", value.dtype, dtype, f"build it with dtype={dtype}")


@jit
def ordered(x):
    """int32 that orders as fp32 does: zeros alike, NaN the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@jit
def packed(x, index):
    """int64 whose maximum is the largest x and, among equals, the lowest index."""
    return (ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@jit
def value_of(packed):
    key = (packed >> 32).to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@jit
def index_of(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@jit
def _parameters(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, VOCABULARY: tl.constexpr):
    """Of one row; top_k is 0 where it keeps all."""
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where((top_k > 0) & (top_k < VOCABULARY), top_k, 0)
    min_p = tl.minimum(tl.load(min_p_ptr + row), 1.0)
    return tl.load(temperature_ptr + row), top_k, tl.load(top_p_ptr + row), min_p


@jit
def _scan_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, offsets_ptr, tops_ptr, sums_ptr, best_ptr,
    counters_ptr, stride, VOCABULARY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest logit of one tile of one row; for a row without thresholds its draw, for one with a top_p its sum of exp."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    place = row * tl.num_programs(1) + tile
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < VOCABULARY
    temperature, top_k, top_p, min_p = _parameters(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, VOCABULARY)

    logits = tl.load(logits_ptr + row * stride + token, inside, other=float("-inf")).to(tl.float32)

    top = tl.max(tl.where(inside, packed(logits, token), -0x8000000000000000))
    tl.store(tops_ptr + place, top)
    if tile == 0:
        tl.store(counters_ptr + row * 3, 0)
        tl.store(counters_ptr + row * 3 + 1, 0)
    if temperature > 0.0:
        if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
            if top_p < 1.0:  # an estimate for a bound: any exp will do
                tl.store(sums_ptr + place, tl.sum(tl.exp((logits - value_of(top)) / temperature)))
        else:
            quad = tile * (TILE // 4) + tl.arange(0, TILE // 4)
            r0, r1, r2, r3 = philox_kernel(tl.load(seeds_ptr + row), tl.load(offsets_ptr + row), quad)
            words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (TILE,))
            score = tl.div_rn(logits, temperature) + gumbel_kernel(words)
            tl.store(best_ptr + place, tl.max(tl.where(inside, packed(score, token), -0x8000000000000000)))


@jit
def _bound(tops, top_k, top_p, min_p, temperature, highest, sums_ptr, VOCABULARY: tl.constexpr, TILES: tl.constexpr):
    """A value of x that all kept values reach, from the tiles' largest logits."""
    bound = tl.full((), float("-inf"), tl.float32)
    if top_k > 0:
        if top_k <= TILES:  # the k-th largest of the tiles' largest: k values of the row reach it
            keys = tops >> 32
            low = tl.full((), -0x80000000, tl.int64)
            high = tl.max(keys)
            while low < high:
                middle = low + (high - low + 1) // 2
                enough = tl.sum((keys >= middle).to(tl.int32)) >= top_k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
            bound = tl.div_rn(value_of(low << 32), temperature)
    elif top_p < 1.0:  # all values below the bound weigh less than half of what top_p may leave out
        tile = tl.arange(0, tops.shape[0])
        value = value_of(tops)
        shares = tl.load(sums_ptr + tile, tile < TILES, other=0.0) * tl.exp(tl.div_rn(value, temperature) - highest)
        total = tl.sum(tl.where((tile < TILES) & (value > float("-inf")), shares, 0.0))
        bound = tl.minimum(highest + tl.log((1.0 - tl.maximum(top_p, 0.0)) * total * (0.5 / VOCABULARY)), highest)
    else:
        bound = highest + tl.log(min_p) - 0.01
    return bound


@jit
def _collect_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, tops_ptr, sums_ptr, counters_ptr, found_ptr, found_token_ptr,
    stride, VOCABULARY: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, TILES_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, CAPACITY: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The candidates among GROUP tiles of a row with thresholds, behind those of other programs, in no set order.

    The counters of a row: candidates, the integer weight of the row for a top_p without a top_k, the order of their bound.
    KEPT weighs rows without thresholds too, and collects nothing of them.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    temperature, top_k, top_p, min_p = _parameters(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, VOCABULARY)
    shaped = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if not ((temperature > 0.0) & (shaped | KEPT)):
        return
    tile = tl.arange(0, TILES_BLOCK)
    token = group * GROUP * TILE + tl.arange(0, GROUP * TILE)
    counters_ptr += row * 3

    tops = tl.load(tops_ptr + row * TILES + tile, tile < TILES, other=-0x8000000000000000)
    highest = tl.div_rn(value_of(tl.max(tops)), temperature)
    bound = _bound(tops, top_k, top_p, min_p, temperature, highest, sums_ptr + row * TILES, VOCABULARY, TILES)
    bound = tl.where(shaped, bound, float("inf"))
    tl.store(counters_ptr + 2, ordered(bound).to(tl.int64))  # all programs of the row store the same
    top = tl.max(tl.where(tile // GROUP == group, tops, -0x8000000000000000))
    weigh = (top_k == 0) & ((top_p < 1.0) | (not shaped))
    if (tl.div_rn(value_of(top), temperature) < bound) & (not weigh):
        return
    logits = tl.load(logits_ptr + row * stride + token, token < VOCABULARY, other=float("-inf")).to(tl.float32)

    x = tl.div_rn(logits, temperature)
    if weigh:
        tl.atomic_add(counters_ptr + 1, tl.sum(weights_kernel(x - highest).to(tl.int64)))
    found = (token < VOCABULARY) & (x >= bound)
    count = tl.sum(found.to(tl.int32))
    if count > 0:
        place = tl.atomic_add(counters_ptr, count.to(tl.int64)) + tl.cumsum(found.to(tl.int32), 0) - 1
        found &= place < CAPACITY
        tl.store(found_ptr + row * CAPACITY + place, x, found)
        tl.store(found_token_ptr + row * CAPACITY + place, token, found)


@jit
def _x_of(candidates, i):
    """x of the candidates i, -inf past the end: of those found, or of the row itself where it is searched whole."""
    length, whole, row_ptr, found_ptr, temperature, _ = candidates
    logits = tl.load(row_ptr + i, (i < length) & whole, other=float("-inf")).to(tl.float32)
    found = tl.load(found_ptr + i, (i < length) & (not whole), other=float("-inf"))
    return tl.where(whole, tl.div_rn(logits, temperature), found)


@jit
def _reaching(thresholds, candidates, WEIGH: tl.constexpr, BLOCK: tl.constexpr):
    """How many candidates reach each of the thresholds, or what these weigh."""
    totals = tl.zeros(thresholds.shape, tl.int64)
    for first in range(0, candidates[0], BLOCK):
        x = _x_of(candidates, first + tl.arange(0, BLOCK))
        amounts = weights_kernel(x - candidates[5]).to(tl.int64) if WEIGH else tl.full((BLOCK,), 1, tl.int64)
        totals += tl.sum(tl.where(ordered(x)[:, None] >= thresholds[None, :], amounts[:, None], 0), axis=0)
    return totals


@jit
def _search(wanted, low, high, candidates, WEIGH: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr):
    """The largest threshold of low to high that candidates as many, or as heavy, as wanted reach; for low these suffice."""
    way = 1 + tl.arange(0, WAYS)
    while low < high:
        step = (high - low + WAYS - 1) // WAYS
        totals = _reaching(tl.minimum(low + step * way, high), candidates, WEIGH, BLOCK)
        enough = tl.sum((totals.to(tl.float64) >= wanted).to(tl.int64))
        above = tl.minimum(low + step * (enough + 1), high) - 1
        low = tl.minimum(low + step * enough, high)
        high = above  # less than low if high itself was enough
    return low


@jit
def _finish_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, offsets_ptr, tops_ptr, best_ptr, counters_ptr,
    found_ptr, found_token_ptr, out_ptr, least_ptr, mass_ptr, highest_ptr, stride, VOCABULARY: tl.constexpr,
    TILES: tl.constexpr, TILES_BLOCK: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """The token of one row; with KEPT what else `Kept` holds."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES_BLOCK)
    temperature, top_k, top_p, min_p = _parameters(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, VOCABULARY)
    best = tl.max(tl.load(tops_ptr + row * TILES + tile, tile < TILES, other=-0x8000000000000000))
    highest = tl.div_rn(value_of(best), tl.where(temperature > 0.0, temperature, 1.0))
    if KEPT:
        tl.store(highest_ptr + row, highest)

    if (temperature > 0.0) & (tl.abs(highest) < float("inf")):
        if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
            count = tl.load(counters_ptr + row * 3)
            total = tl.load(counters_ptr + row * 3 + 1)
            low = tl.load(counters_ptr + row * 3 + 2)
            high = ordered(highest).to(tl.int64)
            whole = count > CAPACITY
            length = tl.where(whole, VOCABULARY, count).to(tl.int32)
            candidates = (length, whole, logits_ptr + row * stride, found_ptr + row * CAPACITY, temperature, highest)
            if top_k > 0:
                low = _search(top_k, low, high, candidates, False, BLOCK, WAYS)
                if top_p < 1.0:
                    total = tl.max(_reaching(low + tl.zeros((WAYS,), tl.int64), candidates, True, BLOCK))
            if top_p < 1.0:
                low = _search(top_p.to(tl.float64) * total.to(tl.float64), low, high, candidates, True, BLOCK, WAYS)

            seed = tl.load(seeds_ptr + row)
            offset = tl.load(offsets_ptr + row)
            best = tl.full((), -0x8000000000000000, tl.int64)
            mass = tl.full((), 0, tl.int64)
            for first in range(0, length, BLOCK):
                i = first + tl.arange(0, BLOCK)
                x = _x_of(candidates, i)
                weight = weights_kernel(x - highest)
                kept = (i < length) & (ordered(x) >= low) & (weight >= min_p * 1099511627776.0)
                if tl.max(kept.to(tl.int32)) > 0:
                    token = tl.load(found_token_ptr + row * CAPACITY + i, kept & (not whole), other=0)
                    token = tl.where(whole, i, token)
                    score = x + gumbel_of_kernel(seed, offset, token)
                    score = tl.where(kept, packed(score, token), -0x8000000000000000)
                    best = tl.maximum(best, tl.max(score))
                    if KEPT:
                        mass += tl.sum(tl.where(kept, weight.to(tl.int64), 0))
            if KEPT:
                tl.store(least_ptr + row, low)
                tl.store(mass_ptr + row, mass)
        else:
            best = tl.max(tl.load(best_ptr + row * TILES + tile, tile < TILES, other=-0x8000000000000000))
            if KEPT:
                tl.store(least_ptr + row, -0x80000000)
                tl.store(mass_ptr + row, tl.load(counters_ptr + row * 3 + 1))
    tl.store(out_ptr + row, index_of(best))


class SamplePlan(NamedTuple):
    """tile tokens a program of the scan, group tiles a program that collects up to capacity candidates; block at a time of
    them are searched."""

    tile: int = 1024
    group: int = 4
    capacity: int = 16384
    block: int = 2048


class Kept(NamedTuple):
    """What the kernels know of the rows that they draw from: a token is kept if x reaches `least` and its weight min_p's.

    tokens   [N] int64  as the op gives them
    least    [N] int64  order of the least x that top-k and top-p keep, see `ordered`; unset for rows that are not drawn from
    mass     [N] int64  what all kept tokens weigh; likewise
    highest  [N] fp32   the largest x
    """

    tokens: Tensor
    least: Tensor
    mass: Tensor
    highest: Tensor


def _launch_sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, offsets: Tensor,
    *, plan: SamplePlan | None = None,
) -> Tensor:  # fmt: skip
    return _launch(logits, (temperature, top_k, top_p, min_p), seeds, offsets, plan, None)


def launch_kept(
    logits: Tensor, parameters: tuple[Tensor, ...], seeds: Tensor, offsets: Tensor, plan: SamplePlan | None = None
) -> Kept:
    """As sample.launch, for callers that go on to ask what a token's probability is. Rows without thresholds are read twice."""
    kept = Kept(torch.empty_like(seeds), torch.empty_like(seeds), torch.empty_like(seeds), torch.empty_like(parameters[0]))
    _launch(logits, parameters, seeds, offsets, plan, kept)
    return kept


def _launch(
    logits: Tensor, parameters: tuple[Tensor, ...], seeds: Tensor, offsets: Tensor, plan: SamplePlan | None, kept: Kept | None
) -> Tensor:
    logits = unit_stride(logits)
    temperature, top_k, top_p, min_p, seeds, offsets = (t.contiguous() for t in (*parameters, seeds, offsets))
    rows, width = logits.shape
    out, least, mass, highest = kept or Kept(*(torch.empty_like(seeds),) * 3, temperature)  # three that nothing writes
    if not rows:
        return out
    tile, group, capacity, block = plan or SamplePlan()
    tile = min(tile, max(16, power_of_two(width)))
    capacity = min(capacity, width)
    tiles = -(-width // tile)
    tiles_block = power_of_two(tiles)
    tops, best = seeds.new_empty((rows, tiles)), seeds.new_empty((rows, tiles))  # two, so that both are aligned
    counters = seeds.new_empty((rows, 3))
    sums = temperature.new_empty((rows, tiles))
    found, found_token = temperature.new_empty((rows, capacity)), top_k.new_empty((rows, capacity))
    parameters = temperature, top_k, top_p, min_p
    stride = logits.stride(0)
    _scan_kernel[(rows, tiles)](
        logits, *parameters, seeds, offsets, tops, sums, best, counters, stride, width, tile, num_warps=4, **UNFUSED
    )
    _collect_kernel[(rows, -(-tiles // group))](
        logits, *parameters, tops, sums, counters, found, found_token, stride,
        width, tile, tiles, tiles_block, group, capacity, kept is not None, num_warps=8, **UNFUSED,
    )  # fmt: skip
    _finish_kernel[(rows,)](
        logits, *parameters, seeds, offsets, tops, best, counters, found, found_token, out, least, mass, highest, stride,
        width, tiles, tiles_block, capacity, min(block, power_of_two(width)), WAYS, kept is not None, num_warps=16, **UNFUSED,
    )  # fmt: skip
    return out


@op(
    launch=_launch_sample,
    fake=lambda logits, *_: logits.new_empty(logits.shape[:1], dtype=torch.int64),
    check=_check,
)
def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, offsets: Tensor
) -> Tensor:
    """The next token of each row: its own logits, parameters, seed and offset decide it, never its place or other rows.

    logits       [N, V]     fp32, fp16 or bf16
    temperature  [N] fp32   x = logits / temperature; not positive: argmax, the lowest index among equals
    top_k        [N] int32  keeps the largest k of x and all equal to the k-th; not positive, or V and more: all
    top_p        [N] fp32   of those, keeps the least set of largest values, whole groups of equals, whose share of exp(x)
                            reaches top_p, and always the largest value; 1: all
    min_p        [N] fp32   of those, keeps values whose probability is min_p times the highest or more; 0: all
    seeds        [N] int64  of each request
    offsets      [N] int64  how many tokens the request has sampled: with the seed, what numbers its draw
    returns      [N] int64  argmax of x + gumbel over the kept, x of -inf never; a row whose largest x is NaN, infinite
                            or -inf: its argmax, as torch has it (the first NaN, if there is one)

    Raises ValueError for shapes and dtypes that do not fit. The same tokens on CPU and CUDA.
    """
    best = logits.argmax(dim=1)
    x = scaled(logits, temperature)
    score = torch.where(kept_reference(x, top_k, top_p, min_p), x + gumbel(seeds, offsets, x.shape[1]), -torch.inf)
    drawn = (temperature > 0) & x.amax(dim=1).isfinite()
    return torch.where(drawn, score.argmax(dim=1), best)
