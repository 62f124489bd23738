"""Sampling from a rank's part of the vocabulary: what each rank computes by itself, between the sums of vocabulary.py.

All of it is integers that ranks combine by a sum or a maximum, which no order of the ranks can change. A value of x is known
by its key, an integer from 0 to 2**32 - 1 that orders as x does; a threshold is found digit by digit of it, the highest first,
from histograms of the values that agree with the digits found so far. A prefix of -1 agrees with none, and becomes a threshold
below all keys: so rows without a threshold, and rows that are not drawn from, are not read.

References and kernels agree to the bit, as those of `sample` do. Each kernel that reads logits reads them once; what many
programs find of a row is brought together by a second launch (the highest), or by atomic sums (histograms).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_compile.ops.library import UNFUSED, expect, jit, op, power_of_two, tl, unit_stride

from .bitwise import gumbel, gumbel_kernel, philox_kernel, weights, weights_kernel
from .sample import index_of, ordered, packed, scaled, value_of

BITS = (11, 11, 10)  # of the digits: few sums over the ranks, and histograms that stay small beside a rank's logits
_LAST = 0x7FFFFFFF
Search = tuple[Tensor, Tensor, Tensor]
"""A threshold's prefix so far [N] int64, what values of a higher prefix amount to [N] int64, and what suffices [N] fp64."""


def keys(x: Tensor) -> Tensor:
    """int64 from 0 to 2**32 - 1 that orders as x in fp32: zeros alike, NaN the largest."""
    bits = torch.where(x == 0, 0.0, x).contiguous().view(torch.int32)
    order = torch.where(x.isnan(), _LAST, torch.where(bits < 0, bits ^ _LAST, bits))
    return order.long() + 2**31


def pack(x: Tensor, tokens: Tensor) -> Tensor:
    """int64 whose maximum is the largest x and, among equals, the lowest token."""
    return (keys(x) - 2**31) * 2**32 + (_LAST - tokens)


def token_of(best: Tensor) -> Tensor:
    return _LAST - (best & _LAST)


def highest_x(best: Tensor, temperature: Tensor) -> Tensor:
    """The largest x of each row, from its packed highest logit: dividing by what is positive keeps the order."""
    order = (best >> 32).int()
    highest = torch.where(order < 0, order ^ _LAST, order).view(torch.float32)
    return highest / torch.where(temperature > 0, temperature, 1.0)


def _check(op: str, logits: Tensor, **given: Tensor | int | None) -> None:
    expect("local_sample", "logits must be [N, shard]", logits.dim(), 2, "pass the rows that ask for a token")
    for value in given.values():
        if isinstance(value, Tensor):
            expect("local_sample", "parameters must be [N] for logits [N, shard]", value.shape, logits.shape[:1], "one a row")


@jit
def _finite_highest(best, temperature):
    """The largest x of a row, and whether it is finite."""
    highest = tl.div_rn(value_of(best), tl.where(temperature > 0.0, temperature, 1.0))
    return highest, tl.abs(highest) < float("inf")


@jit
def _key(x):
    return ordered(x).to(tl.int64) + 0x80000000


@jit
def _best_kernel(
    logits_ptr, temperature_ptr, seeds_ptr, offsets_ptr, least_ptr, row_best_ptr, min_p_ptr, best_ptr, stride, first,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of one tile of a row the highest logit and, with a temperature, the highest x + gumbel of kept tokens, both packed."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    place = row * tl.num_programs(1) + tile
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < WIDTH

    logits = tl.load(logits_ptr + row * stride + at, inside, other=float("-inf")).to(tl.float32)

    top = tl.max(tl.where(inside, packed(logits, first + at), -0x8000000000000000))
    tl.store(best_ptr + place, top)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0.0:
            x = tl.div_rn(logits, temperature)
            kept = inside
            if least_ptr is not None:
                kept &= _key(x) >= tl.load(least_ptr + row)
            if min_p_ptr is not None:
                highest, _ = _finite_highest(tl.load(row_best_ptr + row), temperature)
                kept &= weights_kernel(x - highest) >= tl.minimum(tl.load(min_p_ptr + row), 1.0) * 1099511627776.0
            top = packed(tl.full((), float("-inf"), tl.float32), first + tile * TILE)
            if tl.max(kept.to(tl.int32)) > 0:  # few tiles have any, and noise is most of the work
                quad = first // 4 + tile * (TILE // 4) + tl.arange(0, TILE // 4)
                r0, r1, r2, r3 = philox_kernel(tl.load(seeds_ptr + row), tl.load(offsets_ptr + row), quad)
                words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (TILE,))
                score = tl.where(kept, x + gumbel_kernel(words), float("-inf"))
                top = tl.max(tl.where(inside, packed(score, first + at), -0x8000000000000000))
        tl.store(best_ptr + tl.num_programs(0).to(tl.int64) * tl.num_programs(1) + place, top)


@jit(do_not_specialize=["rows"])
def _token_kernel(best_ptr, temperature_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    temperature = tl.load(temperature_ptr + row, inside, other=0.0)
    best = tl.load(best_ptr + row, inside, other=0)
    drawn = tl.load(best_ptr + rows + row, inside, other=0)
    _, finite = _finite_highest(best, temperature)
    tl.store(out_ptr + row, index_of(tl.where((temperature > 0.0) & finite, drawn, best)), inside)


@jit(do_not_specialize=["rows"])
def _search_kernel(temperature_ptr, limit_ptr, best_ptr, prefix_ptr, above_ptr, wanted_ptr, size, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    temperature = tl.load(temperature_ptr + row, inside, other=0.0)
    limit = tl.load(limit_ptr + row, inside, other=0)
    uses = temperature > 0.0
    if best_ptr is None:
        uses &= (limit > 0) & (limit < size)
    else:
        _, finite = _finite_highest(tl.load(best_ptr + row, inside, other=0), temperature)
        uses &= (limit < 1.0) & finite
    tl.store(prefix_ptr + row, uses.to(tl.int64) - 1, inside)
    tl.store(above_ptr + row, tl.zeros((BLOCK,), tl.int64), inside)
    tl.store(wanted_ptr + row, limit.to(tl.float64), inside)


@jit
def _histogram_kernel(
    logits_ptr, temperature_ptr, prefix_ptr, least_ptr, best_ptr, found_ptr, stride,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Adds the values of one tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    prefix = tl.load(prefix_ptr + row)
    if prefix < 0:
        return
    temperature = tl.load(temperature_ptr + row)

    logits = tl.load(logits_ptr + row * stride + at, at < WIDTH, other=float("-inf")).to(tl.float32)

    x = tl.div_rn(logits, tl.where(temperature > 0.0, temperature, 1.0))
    key = _key(x)
    agrees = (at < WIDTH) & ((key >> (SHIFT + BITS)) == prefix)
    if least_ptr is not None:
        agrees &= key >= tl.load(least_ptr + row)
    amounts = tl.full((TILE,), 1, tl.int64)
    if best_ptr is not None:
        highest, _ = _finite_highest(tl.load(best_ptr + row), temperature)
        amounts = weights_kernel(x - highest).to(tl.int64)
        agrees &= amounts > 0

    place = (row << BITS) + ((key >> SHIFT) & ((1 << BITS) - 1))
    tl.atomic_add(found_ptr + place, amounts, agrees, sem="relaxed")


@jit
def _next_digit_kernel(
    histogram_ptr, prefix_ptr, above_ptr, wanted_ptr, next_prefix_ptr, next_above_ptr, next_wanted_ptr,
    SHARE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, COUNT)
    above = tl.load(above_ptr + row)
    wanted = tl.load(wanted_ptr + row)

    histogram = tl.load(histogram_ptr + row * COUNT + place)

    if SHARE:
        wanted = tl.maximum(wanted * tl.sum(histogram).to(tl.float64), 1.0)
    from_here = tl.cumsum(histogram, 0, reverse=True)
    enough = (above + from_here).to(tl.float64) >= wanted
    digit = tl.maximum(tl.sum(enough.to(tl.int32)) - 1, 0)

    tl.store(next_prefix_ptr + row, tl.load(prefix_ptr + row) * COUNT + digit)
    tl.store(next_above_ptr + row, above + tl.sum(tl.where(place > digit, histogram, 0)))
    tl.store(next_wanted_ptr + row, wanted)


_TILE = 1024  # of _best_kernel: as the sampler's scan
_HISTOGRAM_TILE = 4096
_ROWS = 128  # a program of the kernels that read no logits


def _launch_best(logits: Tensor, temperature: Tensor | None, *rest: Tensor | int | None) -> Tensor:
    seeds, offsets, first, *kept = (t.contiguous() if isinstance(t, Tensor) else t for t in (*rest,))
    logits = unit_stride(logits)
    rows, width = logits.shape
    tile = min(_TILE, max(16, power_of_two(width)))
    tiles = -(-width // tile)
    best = logits.new_empty((1 if temperature is None else 2, rows, tiles), dtype=torch.int64)
    if rows:
        _best_kernel[(rows, tiles)](
            logits, temperature if temperature is None else temperature.contiguous(), seeds, offsets, *kept, best,
            logits.stride(0), first, width, tile, num_warps=4, **UNFUSED,
        )  # fmt: skip
    return best.amax(dim=2)


def _launch_token(best: Tensor, temperature: Tensor) -> Tensor:
    best, temperature, out = best.contiguous(), temperature.contiguous(), torch.empty_like(best[0])
    if len(out):
        _token_kernel[(-(-len(out) // _ROWS),)](best, temperature, out, len(out), _ROWS, **UNFUSED)
    return out


def _launch_search(temperature: Tensor, limit: Tensor, best: Tensor | None, size: int) -> Search:
    found = _search_like(temperature)
    if rows := len(temperature):
        given = temperature.contiguous(), limit.contiguous(), best if best is None else best.contiguous()
        _search_kernel[(-(-rows // _ROWS),)](*given, *found, size, rows, _ROWS, **UNFUSED)
    return found


def _launch_histogram(
    logits: Tensor, temperature: Tensor, prefix: Tensor, least: Tensor | None, best: Tensor | None, digit: int
) -> Tensor:
    logits = unit_stride(logits)
    rows, width = logits.shape
    tile = min(_HISTOGRAM_TILE, max(16, power_of_two(width)))
    found = prefix.new_zeros((rows, 1 << BITS[digit]))
    if rows:
        given = (t if t is None else t.contiguous() for t in (temperature, prefix, least, best))
        _histogram_kernel[(rows, -(-width // tile))](
            logits, *given, found, logits.stride(0), width, tile, sum(BITS[digit + 1 :]), BITS[digit], num_warps=8, **UNFUSED
        )
    return found


def _launch_next_digit(histogram: Tensor, prefix: Tensor, above: Tensor, wanted: Tensor, share: bool) -> Search:
    found = _search_like(prefix)
    rows, count = histogram.shape
    if rows:
        given = (t.contiguous() for t in (histogram, prefix, above, wanted))
        _next_digit_kernel[(rows,)](*given, *found, share, count, num_warps=8)
    return found


def _search_like(row: Tensor) -> Search:
    prefix = row.new_empty(row.shape, dtype=torch.int64)
    return prefix, torch.empty_like(prefix), row.new_empty(row.shape, dtype=torch.float64)


@op(
    launch=lambda logits, first: _launch_best(logits, None, None, None, first, None, None, None)[0],
    fake=lambda logits, first: logits.new_empty(logits.shape[:1], dtype=torch.int64),
    check=_check,
)
def local_highest(logits: Tensor, first: int) -> Tensor:
    """The highest logit of each row, packed with its token: logits [N, shard] of tokens from `first` on -> [N] int64."""
    return pack(logits.float(), torch.arange(first, first + logits.shape[1], device=logits.device)).amax(dim=1)


@op(launch=_launch_best, fake=lambda logits, *_: logits.new_empty((2, logits.shape[0]), dtype=torch.int64), check=_check)
def local_draw(
    logits: Tensor, temperature: Tensor, seeds: Tensor, offsets: Tensor, first: int,
    least: Tensor | None, best: Tensor | None, min_p: Tensor | None,
) -> Tensor:  # fmt: skip
    """The highest logit of each row, and the highest x + gumbel of its kept tokens, packed with their tokens: [2, N] int64.

    logits       [N, shard]  fp32, fp16 or bf16, of tokens from `first` on, a multiple of 4
    temperature, seeds, offsets  as in `sample`; a row that is not drawn from has its highest logit twice
    least        [N] int64  the least key of x that is kept; None: all
    best         [N] int64  what local_highest gives, of all ranks: for min_p
    min_p        [N] fp32   as in `sample`; None: all are kept
    """
    width = logits.shape[1]
    x = scaled(logits, temperature)
    score = x + gumbel(seeds, offsets, width, first=first)
    if least is not None:
        score = torch.where(keys(x) >= least[:, None], score, -torch.inf)
    if best is not None and min_p is not None:
        likely = weights(x - highest_x(best, temperature)[:, None]) >= (min_p.clamp(max=1.0) * 2.0**40)[:, None]
        score = torch.where(likely, score, -torch.inf)
    highest = local_highest.reference(logits, first)
    drawn = pack(score, torch.arange(first, first + width, device=logits.device)).amax(dim=1)
    return torch.stack((highest, torch.where(temperature > 0, drawn, highest)))


@op(launch=_launch_token)
def drawn_token(best: Tensor, temperature: Tensor) -> Tensor:
    """The token [N] int64 of each row: drawn or, as in `sample`, its argmax; best [2, N] int64 is local_draw's of all ranks."""
    highest, drawn = best
    return token_of(torch.where((temperature > 0) & highest_x(highest, temperature).isfinite(), drawn, highest))


@op(launch=_launch_search)
def begin_search(temperature: Tensor, limit: Tensor, best: Tensor | None, size: int) -> Search:
    """Before the first digit: top_k [N] int32 without, or top_p [N] fp32 with the packed highest logits of all ranks."""
    if best is None:
        uses = (temperature > 0) & (limit > 0) & (limit < size)
    else:
        uses = (temperature > 0) & (limit < 1) & highest_x(best, temperature).isfinite()
    return uses.long() - 1, torch.zeros_like(limit, dtype=torch.int64), limit.double()


@op(
    launch=_launch_histogram,
    fake=lambda logits, *rest: logits.new_empty((logits.shape[0], 1 << BITS[rest[-1]]), dtype=torch.int64),
    check=_check,
)
def digit_histogram(
    logits: Tensor, temperature: Tensor, prefix: Tensor, least: Tensor | None, best: Tensor | None, digit: int
) -> Tensor:
    """How many values of x, or what weight of them, have each digit behind a prefix.

    logits       [N, shard]  fp32, fp16 or bf16
    temperature  [N] fp32   x = logits / temperature, as in `sample`
    prefix       [N] int64  the digits of the key before this one; negative: an empty histogram
    least        [N] int64  only keys from this on; None: all
    best         [N] int64  packed highest logits of all ranks: values weigh exp(x - highest) * 2**40; None: 1
    digit        0..2       the length of each is in BITS
    returns      [N, 2**BITS[digit]] int64
    """
    shift, count = sum(BITS[digit + 1 :]), 1 << BITS[digit]
    x = scaled(logits, temperature)
    key = keys(x)
    agrees = key >> (shift + BITS[digit]) == prefix[:, None]
    if least is not None:
        agrees &= key >= least[:, None]
    amounts = torch.ones_like(key) if best is None else weights(x - highest_x(best, temperature)[:, None]).long()
    found = amounts.new_zeros((len(x), count))
    return found.scatter_add_(1, key >> shift & count - 1, torch.where(agrees, amounts, 0))


@op(launch=_launch_next_digit)
def next_digit(histogram: Tensor, prefix: Tensor, above: Tensor, wanted: Tensor, share: bool) -> Search:
    """One digit on: the largest from which on values suffice.

    histogram              [N, C] int64  of all ranks
    prefix, above, wanted  a Search
    share                  what suffices is given as a share of the histogram's sum
    """
    from_here = histogram.flip(1).cumsum(1).flip(1)
    # A share of nothing is more than nothing: the largest value.
    wanted = (wanted * from_here[:, 0].double()).clamp(min=1.0) if share else wanted.clone()
    enough = (above[:, None] + from_here).double() >= wanted[:, None]
    digit = (enough.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    above = above + (from_here - histogram).gather(1, digit)[:, 0]
    return prefix * histogram.shape[1] + digit[:, 0], above, wanted
