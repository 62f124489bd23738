"""Sampling from a rank's part of the vocabulary: what each rank computes by itself, between the sums of vocabulary.py.

All of it is integers that ranks combine by a sum or a maximum, which no order of the ranks can change. A value of x is known
by its key, an integer from 0 to 2**32 - 1 that orders as x does; a threshold is found digit by digit of it, the highest first,
from histograms of the values that agree with the digits found so far. A prefix of -1 agrees with none, and becomes a threshold
below all keys: so rows without a threshold, and rows that are not drawn from, are not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bitwise import gumbel, weights
from .sample import scaled

BITS = (11, 11, 10)  # of the digits: few sums over the ranks, and histograms that stay small beside a rank's logits
_LAST = 0x7FFFFFFF


def keys(x: Tensor) -> Tensor:
    """int64 from 0 to 2**32 - 1 that orders as x in fp32: zeros alike, NaN the largest."""
    bits = torch.where(x == 0, 0.0, x).contiguous().view(torch.int32)
    order = torch.where(x.isnan(), _LAST, torch.where(bits < 0, bits ^ _LAST, bits))
    return order.long() + 2**31


def packed(x: Tensor, tokens: Tensor) -> Tensor:
    """int64 whose maximum is the largest x and, among equals, the lowest token."""
    return (keys(x) - 2**31) * 2**32 + (_LAST - tokens)


def value_of(best: Tensor) -> Tensor:
    order = (best >> 32).int()
    return torch.where(order < 0, order ^ _LAST, order).view(torch.float32)


def token_of(best: Tensor) -> Tensor:
    return _LAST - (best & _LAST)


def local_highest(logits: Tensor, first: int) -> Tensor:
    """The highest logit of each row, packed with its token: logits [N, here] of tokens from `first` on -> [N] int64."""
    tokens = torch.arange(first, first + logits.shape[1], device=logits.device)
    return packed(logits.float(), tokens).amax(dim=1)


def local_draw(
    logits: Tensor, temperature: Tensor, seeds: Tensor, offsets: Tensor, first: int,
    least: Tensor | None, highest: Tensor | None, min_p: Tensor | None,
) -> Tensor:  # fmt: skip
    """The highest logit of each row, and the highest x + gumbel of its kept tokens, packed with their tokens.

    logits       [N, here]  fp32, fp16 or bf16, of tokens from `first` on, a multiple of 4
    temperature, seeds, offsets  as in `sample`
    least        [N] int64  the least key of x that is kept; None: all
    highest      [N] fp32   the largest x of all ranks, for min_p
    min_p        [N] fp32   as in `sample`; None: all are kept
    returns      [2, N] int64
    """
    width = logits.shape[1]
    x = scaled(logits, temperature)
    score = x + gumbel(seeds, offsets, width, first=first)
    if least is not None:
        score = torch.where(keys(x) >= least[:, None], score, -torch.inf)
    if highest is not None and min_p is not None:
        likely = weights(x - highest[:, None]) >= (min_p.clamp(max=1.0) * 2.0**40)[:, None]
        score = torch.where(likely, score, -torch.inf)
    tokens = torch.arange(first, first + width, device=logits.device)
    return torch.stack((packed(logits.float(), tokens).amax(dim=1), packed(score, tokens).amax(dim=1)))


def digit_histogram(
    logits: Tensor, temperature: Tensor, prefix: Tensor, least: Tensor | None, highest: Tensor | None, digit: int
) -> Tensor:
    """How many values of x, or what weight of them, have each digit behind a prefix.

    logits       [N, here]  fp32, fp16 or bf16
    temperature  [N] fp32   x = logits / temperature, as in `sample`
    prefix       [N] int64  the digits of the key before this one; -1: an empty histogram
    least        [N] int64  only keys from this on; None: all
    highest      [N] fp32   values weigh exp(x - highest) * 2**40; None: 1
    digit        0..2       the length of each is in BITS
    returns      [N, 2**BITS[digit]] int64
    """
    shift, count = sum(BITS[digit + 1 :]), 1 << BITS[digit]
    x = scaled(logits, temperature)
    key = keys(x)
    agrees = key >> (shift + BITS[digit]) == prefix[:, None]
    if least is not None:
        agrees &= key >= least[:, None]
    amounts = torch.ones_like(key) if highest is None else weights(x - highest[:, None]).long()
    found = amounts.new_zeros((len(x), count))
    return found.scatter_add_(1, key >> shift & count - 1, torch.where(agrees, amounts, 0))


def next_digit(histogram: Tensor, prefix: Tensor, above: Tensor, wanted: Tensor, share: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The largest digit from which on values suffice, behind those that all higher prefixes have.

    histogram  [N, C] int64  of all ranks
    prefix     [N] int64     the digits before
    above      [N] int64     what values with a higher prefix amount to
    wanted     [N] fp64      the amount that suffices
    share      wanted is a share of the histogram's sum
    returns    prefix, above and wanted (an amount) for the digit behind this one
    """
    from_here = histogram.flip(1).cumsum(1).flip(1)
    if share:
        wanted = (wanted * from_here[:, 0].double()).clamp(min=1.0)  # of a share of 0, that is something: the largest value
    enough = (above[:, None] + from_here).double() >= wanted[:, None]
    digit = (enough.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    above = above + (from_here - histogram).gather(1, digit)[:, 0]
    return prefix * histogram.shape[1] + digit[:, 0], above, wanted
