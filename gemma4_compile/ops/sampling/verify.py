"""verify: which drafts of each request are accepted, and the token after them, by rejection sampling; draw_draft draws a draft.

A draft x was drawn from q, the target would draw from p: what gemma4::sample draws from. Two forms, and in both the new tokens
are distributed as p has them, whatever q is:

    by token   x is accepted with probability min(1, p(x) / q(x)). The first that is not is replaced by a draw from the
               residual, (p - q)+ over its sum. Leviathan et al. 2023, https://arxiv.org/abs/2211.17192.
    by block   c, 1 before the first draft, becomes min(1, c p(x) / q(x)) at each draft x. With S, the sum of (c p - q)+ over
               the tokens that may follow, the drafts up to here are accepted with probability S / (S + 1 - c), all drafts with
               c. The longest run that is accepted counts, and the token after it is drawn from (c p - q)+ / S. Accepts at
               least as many on average. Sun et al. 2024, https://arxiv.org/abs/2403.10444.

The token after the last draft is the one that gemma4::sample draws there, so a request without drafts has its very token.

Random numbers. By token, nothing is asked of a draft behind the first that is rejected, and its numbers are as good as new. By
block it is: what the later drafts were decides where the run ends. Were numbers those of a place, the next round would use
again at that place what has decided this one, and be biased. So drafts and decisions are numbered by the place where their
round begins, which no two rounds share, and by their own in it. Residuals are numbered by place: each has one new token.

Reference and kernels agree to the bit: p and q are integer weights (sample.py) times the reciprocal of their sum in fp64, S
is c less a sum of min(c p, q) as integers, for p sums to 1, and all else is elementwise. So tokens that q lacks cost S nothing.

What it costs. The rows of all requests go through sample's three launches. The drafter's scores are read once, and once more
those of the one draft of each request that is rejected, and its row of logits whole: a bit a token says which are candidates.
By block, rows and scores of drafts with c between 0 and 1 are read again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.ops.examples import Draw
from gemma4_compile.ops.library import UNFUSED, constant, expect, jit, op, power_of_two, tl, unit_stride

from . import bitwise
from .bitwise import (
    ACCEPT,
    DRAFT,
    RESIDUAL,
    STREAMS,
    gumbel,
    gumbel_kernel,
    gumbel_of,
    gumbel_of_kernel,
    log_kernel,
    philox_kernel,
    uniform,
    uniform_kernel,
    weights,
    weights_kernel,
)
from .sample import (
    MOST,
    PARAMETERS,
    SamplePlan,
    index_of,
    kept_reference,
    launch_kept,
    ordered,
    packed,
    sample,
    scaled,
    value_of,
)

TILE = 1024  # candidates that are weighed at their own highest score: the drafter's scores are read once
_NORMAL = 2.0**-126  # the least fp32 whose log bitwise.py has
# As kernels see them.
ACCEPT_WORD, RESIDUAL_WORD, NORMAL = constant(ACCEPT), constant(RESIDUAL), constant(_NORMAL)


def accept_tokens(p: Tensor, q: Tensor, limit: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Of drafts' probabilities p and q and of uniform u, each [R, K] fp64, and of limit, how many count, [R]: how many are
    accepted, [R] int64, and c there, [R] fp64."""
    counted = torch.arange(p.shape[1], device=p.device) < limit[:, None]
    return ((u * q < p) & counted).long().cumprod(1).sum(1), torch.ones_like(p[:, 0])


def accept_block(p: Tensor, q: Tensor, px: Tensor, qx: Tensor, limit: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """As accept_tokens, with p [R, K+1, V] and q [R, K, V] of all tokens, px and qx of the drafts."""
    c = torch.ones_like(px[:, 0])
    accepted, carried = torch.zeros_like(limit), c
    for j in range(px.shape[1]):
        cp = c * px[:, j]
        c = torch.where(cp >= qx[:, j], (cp > 0).double(), cp / qx[:, j])
        chance = c
        if j + 1 < px.shape[1]:
            common = (torch.minimum(c[:, None] * p[:, j + 1], q[:, j + 1]) * 2.0**60).long().sum(1)
            left = (c - common.double() * 2.0**-60).clamp(min=0.0)
            chance = torch.where((j + 1 < limit) & (c < 1), left / (left + (1.0 - c)), c)
        longer = (j < limit) & (u[:, j] < chance)
        accepted, carried = torch.where(longer, j + 1, accepted), torch.where(longer, c, carried)
    return accepted, carried


def residual(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
    """What the token after a rejected draft is drawn from, [R, V], not divided by its sum."""
    return c[:, None] * p - q


def _target(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """What gemma4::sample draws from, [R, K+1, V] fp64, and whether it draws, [R, K+1]."""
    x = scaled(logits.flatten(0, 1), temperature)
    highest = x.amax(1, keepdim=True)
    amounts = torch.where(kept_reference(x, top_k, top_p, min_p), weights(x - highest).long(), 0)
    p = amounts.double() * (1.0 / amounts.sum(1, keepdim=True).double())
    return p.view(logits.shape), highest.isfinite().view(logits.shape[:2])


def _drafter(scores: Tensor, tokens: Tensor | None, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Softmax of the candidates, [R, K, V] fp64, and whether it is one, [R, K]."""
    highest = scores.amax(2, keepdim=True)
    tile = min(TILE, scores.shape[2])
    tiles = F.pad(scores, (0, -scores.shape[2] % tile), value=-torch.inf).unflatten(2, (-1, tile))
    tops = tiles.amax(3)
    sums, factors = weights(tiles - tops[..., None]).long().sum(3), weights(tops - highest).long()
    mass = (sums.double() * factors.double() * 2.0**-40).long().sum(2, keepdim=True)
    q = weights(scores - highest).long().double() * (1.0 / mass.double())
    if tokens is not None:
        q = q.new_zeros((*q.shape[:2], vocabulary)).scatter_add(2, tokens.clamp(0, vocabulary - 1), q)
    return q, highest[..., 0].isfinite()


def _check(
    op: str, logits: Tensor, first: Tensor, counts: Tensor, drafts: Tensor, draft_scores: Tensor, draft_tokens: Tensor | None,
    block: bool, **parameters: Tensor,
) -> None:  # fmt: skip
    expect(op, "logits must be [S, V]", logits.dim(), 2, "pass the rows of the step")
    expect(op, "V must lie in 1..2**22", bool(1 <= logits.shape[1] <= MOST), True, "pass the model's vocabulary")
    expect(op, "drafts must be [R, K]", drafts.dim(), 2, "pass -1 where a request has fewer")
    expect(op, "K must be 1 or more", bool(drafts.shape[1] >= 1), True, "call gemma4::sample where nothing is drafted")
    expect(
        op, "draft_scores must be [R, K, C] for drafts [R, K]", draft_scores.shape[:-1], drafts.shape, "pass one row a draft"
    )
    expect(op, "C must be 1 or more", bool(draft_scores.shape[2] >= 1), True, "pass the candidates that drafts were drawn from")
    if draft_tokens is None:
        expect(op, "C must be V without draft_tokens", draft_scores.shape[2], logits.shape[1], "pass the candidates' tokens")
    else:
        shape = draft_scores.shape
        expect(op, "draft_tokens must have the shape of draft_scores", draft_tokens.shape, shape, "pass one a candidate")
        expect(op, "draft_tokens has a dtype of its own", draft_tokens.dtype, torch.int64, "build it with dtype=torch.int64")
    expect(op, "draft_scores has a dtype of its own", draft_scores.dtype, torch.float32, "divide by temperature in fp32")
    for name, value in {"first": first, "counts": counts, **parameters}.items():
        dtype = PARAMETERS.get(name, torch.int64)
        expect(op, f"{name} must be [R] for drafts [R, K]", value.shape, drafts.shape[:1], "pass one a request")
        expect(op, f"{name} has a dtype of its own", value.dtype, dtype, f"build it with dtype={dtype}")
    expect(op, "drafts has a dtype of its own", drafts.dtype, torch.int64, "build it with dtype=torch.int64")


@jit
def _rows_kernel(
    first_ptr, counts_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, offsets_ptr, row_temperature_ptr,
    row_top_k_ptr, row_top_p_ptr, row_min_p_ptr, row_seeds_ptr, row_offsets_ptr, PLACES: tl.constexpr,
):  # fmt: skip
    """A request's parameters, for each of its rows."""
    request = tl.program_id(0)
    place = tl.arange(0, PLACES)
    row = tl.load(first_ptr + request) + place
    own = place <= tl.load(counts_ptr + request)
    tl.store(row_temperature_ptr + row, tl.load(temperature_ptr + request), own)
    tl.store(row_top_k_ptr + row, tl.load(top_k_ptr + request), own)
    tl.store(row_top_p_ptr + row, tl.load(top_p_ptr + request), own)
    tl.store(row_min_p_ptr + row, tl.load(min_p_ptr + request), own)
    tl.store(row_seeds_ptr + row, tl.load(seeds_ptr + request), own)
    tl.store(row_offsets_ptr + row, tl.load(offsets_ptr + request) + place, own)


@jit
def _draft_scan_kernel(
    scores_ptr, tokens_ptr, counts_ptr, drafts_ptr, temperature_ptr, tops_ptr, sums_ptr, own_ptr, common_ptr,
    CANDIDATES: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, MOST: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Of one tile of a draft's candidates the largest score, their weight beside it, and the draft's own score if it is one."""
    draft = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    request = draft // MOST
    if not ((draft % MOST < tl.load(counts_ptr + request)) & (tl.load(temperature_ptr + request) > 0.0)):
        return
    i = tile * TILE + tl.arange(0, TILE)
    inside = i < CANDIDATES

    scores = tl.load(scores_ptr + draft * CANDIDATES + i, inside, other=float("-inf"))
    token = i if DENSE else tl.load(tokens_ptr + draft * CANDIDATES + i, inside, other=-1)

    top = tl.max(tl.where(inside, packed(scores, i), -0x8000000000000000))
    own = tl.max(tl.where(inside & (token == tl.load(drafts_ptr + draft)), scores, float("-inf")))
    tl.store(tops_ptr + draft * TILES + tile, top)
    tl.store(sums_ptr + draft * TILES + tile, tl.sum(weights_kernel(scores - value_of(top)).to(tl.int64)))
    tl.store(own_ptr + draft * TILES + tile, own)
    if tile == 0:
        tl.store(common_ptr + draft, 0)


@jit
def _row(least_ptr, mass_ptr, row_highest_ptr, temperature_ptr, min_p_ptr, request, row, mask):
    """What `_target_kernel` must know of a row."""
    mass = tl.load(mass_ptr + row, mask, other=1).to(tl.float64)
    return (
        tl.load(temperature_ptr + request),
        tl.load(least_ptr + row, mask, other=0),
        tl.minimum(tl.load(min_p_ptr + request), 1.0) * 1099511627776.0,
        tl.load(row_highest_ptr + row, mask, other=0.0),
        1.0 / mass,
    )


@jit
def _target_kernel(logits, of_row):
    """p of these logits of a row, fp64, as `_target` has it."""
    temperature, least, likely, highest, share = of_row
    x = tl.div_rn(logits, temperature)
    weight = weights_kernel(x - highest)
    kept = (ordered(x) >= least) & (weight >= likely)
    return tl.where(kept, weight.to(tl.int64), 0).to(tl.float64) * share


@jit
def _drafter_kernel(scores, highest, mass):
    """q of these scores, fp64, as `_drafter` has it."""
    return weights_kernel(scores - highest).to(tl.int64).to(tl.float64) * (1.0 / mass.to(tl.float64))


@jit
def _chain_kernel(
    logits_ptr, first_ptr, counts_ptr, drafts_ptr, temperature_ptr, min_p_ptr, seeds_ptr, offsets_ptr, sampled_ptr, least_ptr,
    mass_ptr, row_highest_ptr, tops_ptr, sums_ptr, own_ptr, highest_ptr, draft_mass_ptr, limit_ptr, accepted_ptr, carried_ptr,
    stride, VOCABULARY: tl.constexpr, MOST: tl.constexpr, TILES: tl.constexpr, TILES_BLOCK: tl.constexpr,
    BY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one request how many drafts count (0 if it is greedy: nothing is left to decide), how many are accepted unless
    _decide_kernel says it, and c behind each of them. Also the highest score of each draft, and its candidates' weight."""
    request = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES_BLOCK)
    first = tl.load(first_ptr + request)
    count = tl.load(counts_ptr + request)
    greedy = not (tl.load(temperature_ptr + request) > 0.0)
    seed = tl.load(seeds_ptr + request)
    offset = tl.load(offsets_ptr + request)
    limit = tl.full((), 0, tl.int64)
    accepted = tl.full((), 0, tl.int64)
    c = tl.full((), 1.0, tl.float64)
    tl.store(carried_ptr + request * (MOST + 1), c)
    usable = count > 0
    running = usable

    for j in tl.static_range(MOST):
        draft = request * MOST + j
        row = first + j
        usable &= j < count
        x = tl.load(drafts_ptr + draft, usable, other=-1)
        usable &= (x >= 0) & (x < VOCABULARY)
        usable &= tl.abs(tl.load(row_highest_ptr + row, usable, other=float("inf"))) < float("inf")
        sampled = tl.load(sampled_ptr + row, usable, other=-1)
        asked = usable & (not greedy)
        known = (tile < TILES) & asked
        tops = tl.load(tops_ptr + draft * TILES + tile, known, other=-0x8000000000000000)
        highest = value_of(tl.max(tops))
        asked &= tl.abs(highest) < float("inf")
        usable = asked | (usable & greedy)

        of_row = _row(least_ptr, mass_ptr, row_highest_ptr, temperature_ptr, min_p_ptr, request, row, asked)
        p = _target_kernel(tl.load(logits_ptr + row * stride + x, asked, other=0.0).to(tl.float32), of_row)
        sums = tl.load(sums_ptr + draft * TILES + tile, known, other=0).to(tl.float64)
        factors = tl.where(known, weights_kernel(value_of(tops) - highest), 0.0).to(tl.int64).to(tl.float64)
        mass = tl.sum((sums * factors * 9.094947017729282e-13).to(tl.int64))
        own = tl.max(tl.load(own_ptr + draft * TILES + tile, known, other=float("-inf")))
        q = tl.where(asked, _drafter_kernel(own, highest, mass), 0.0)
        tl.store(highest_ptr + draft, highest, asked)
        tl.store(draft_mass_ptr + draft, mass, asked)

        if BY_BLOCK:
            cp = c * p
            c = tl.where(cp >= q, (cp > 0.0).to(tl.float64), cp / tl.where(q > 0.0, q, 1.0))
            tl.store(carried_ptr + request * (MOST + 1) + j + 1, c)
            running &= usable & (sampled == x)
        else:
            r0, r1, r2, r3 = philox_kernel(seed, offset, tl.full((), j, tl.int32), ACCEPT_WORD)
            running &= tl.where(greedy, usable & (sampled == x), asked & (uniform_kernel(r0) * q < p))
            tl.store(carried_ptr + request * (MOST + 1) + j + 1, c)
        limit += usable.to(tl.int64)
        accepted += running.to(tl.int64)
    tl.store(limit_ptr + request, tl.where(greedy, 0, limit))
    tl.store(accepted_ptr + request, accepted)


@jit
def _common_kernel(
    logits_ptr, scores_ptr, tokens_ptr, first_ptr, temperature_ptr, min_p_ptr, least_ptr, mass_ptr, row_highest_ptr,
    highest_ptr, draft_mass_ptr, limit_ptr, carried_ptr, common_ptr, stride, VOCABULARY: tl.constexpr,
    CANDIDATES: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """What one tile of a draft's candidates adds to the sum of min(c p, q), in units of 2**-60."""
    draft = tl.program_id(0).to(tl.int64)
    request = draft // MOST
    j = draft % MOST
    if (j == 0) | (j >= tl.load(limit_ptr + request)):
        return
    c = tl.load(carried_ptr + request * (MOST + 1) + j)
    if (c == 1.0) | (c == 0.0):  # accepted for certain up to here, or for certain not
        return
    row = tl.load(first_ptr + request) + j
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = i < CANDIDATES
    of_row = _row(least_ptr, mass_ptr, row_highest_ptr, temperature_ptr, min_p_ptr, request, row, True)

    token = i if DENSE else tl.load(tokens_ptr + draft * CANDIDATES + i, inside, other=-1)
    known = inside & (token >= 0) & (token < VOCABULARY)
    cp = c * _target_kernel(tl.load(logits_ptr + row * stride + token, known, other=float("-inf")).to(tl.float32), of_row)
    known &= cp > 0.0
    if tl.max(known.to(tl.int32)) > 0:
        scores = tl.load(scores_ptr + draft * CANDIDATES + i, known, other=float("-inf"))
        q = _drafter_kernel(scores, tl.load(highest_ptr + draft), tl.load(draft_mass_ptr + draft))
        common = (tl.minimum(cp, q) * 1152921504606846976.0).to(tl.int64)
        tl.atomic_add(common_ptr + draft, tl.sum(tl.where(known, common, 0)))


@jit
def _decide_kernel(
    seeds_ptr, offsets_ptr, limit_ptr, carried_ptr, common_ptr, accepted_ptr, MOST: tl.constexpr,
):  # fmt: skip
    """By block, the longest run of drafts of one request that is accepted."""
    request = tl.program_id(0).to(tl.int64)
    limit = tl.load(limit_ptr + request)
    if limit == 0:
        return
    seed = tl.load(seeds_ptr + request)
    offset = tl.load(offsets_ptr + request)
    accepted = tl.full((), 0, tl.int64)
    for j in tl.static_range(1, MOST + 1):
        c = tl.load(carried_ptr + request * (MOST + 1) + j)
        common = tl.load(common_ptr + request * MOST + j, j < limit, other=0).to(tl.float64) * 8.673617379884035e-19
        left = tl.maximum(c - common, 0.0)
        asked = (j < limit) & (c < 1.0)
        chance = tl.where(asked, left / tl.where(asked, left + (1.0 - c), 1.0), c)
        r0, r1, r2, r3 = philox_kernel(seed, offset, tl.full((), j - 1, tl.int32), ACCEPT_WORD)
        accepted = tl.where((j <= limit) & (uniform_kernel(r0) < chance), j, accepted)
    tl.store(accepted_ptr + request, accepted)


@jit
def _mark_kernel(
    tokens_ptr, limit_ptr, accepted_ptr, marks_ptr, VOCABULARY: tl.constexpr, CANDIDATES: tl.constexpr, TILE: tl.constexpr,
    MOST: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A bit for each token among a rejected draft's candidates."""
    request = tl.program_id(0).to(tl.int64)
    accepted = tl.load(accepted_ptr + request)
    if accepted >= tl.load(limit_ptr + request):
        return
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    token = tl.load(tokens_ptr + (request * MOST + accepted) * CANDIDATES + i, i < CANDIDATES, other=-1)
    known = (token >= 0) & (token < VOCABULARY)
    bit = tl.full((TILE,), 1, tl.int32) << (token % 32).to(tl.int32)
    tl.atomic_or(marks_ptr + request * WORDS + token // 32, bit, known)


@jit
def _noise_of_tile(seed, place, tile, TILE: tl.constexpr):
    """The residual's noise of the tokens of one tile."""
    quad = tile * (TILE // 4) + tl.arange(0, TILE // 4)
    r0, r1, r2, r3 = philox_kernel(seed, place, quad, RESIDUAL_WORD)
    return gumbel_kernel(tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (TILE,)))


@jit
def _candidates_kernel(
    logits_ptr, scores_ptr, tokens_ptr, first_ptr, temperature_ptr, min_p_ptr, seeds_ptr, offsets_ptr, least_ptr, mass_ptr,
    row_highest_ptr, highest_ptr, draft_mass_ptr, limit_ptr, accepted_ptr, carried_ptr, best_ptr, stride,
    VOCABULARY: tl.constexpr, CANDIDATES: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr, PARTS: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """The draw of one request's residual from one tile of the candidates of the draft that is rejected."""
    request = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    accepted = tl.load(accepted_ptr + request)
    if accepted >= tl.load(limit_ptr + request):
        return
    draft = request * MOST + accepted
    row = tl.load(first_ptr + request) + accepted
    place = tl.load(offsets_ptr + request) + accepted
    c = tl.load(carried_ptr + request * (MOST + 1) + accepted)
    i = tile * TILE + tl.arange(0, TILE)
    of_row = _row(least_ptr, mass_ptr, row_highest_ptr, temperature_ptr, min_p_ptr, request, row, True)

    token = i if DENSE else tl.load(tokens_ptr + draft * CANDIDATES + i, i < CANDIDATES, other=-1)
    known = (i < CANDIDATES) & (token >= 0) & (token < VOCABULARY)
    cp = c * _target_kernel(tl.load(logits_ptr + row * stride + token, known, other=float("-inf")).to(tl.float32), of_row)
    known &= cp > 0.0
    best = tl.full((), -0x8000000000000000, tl.int64)
    if tl.max(known.to(tl.int32)) > 0:
        scores = tl.load(scores_ptr + draft * CANDIDATES + i, known, other=float("-inf"))
        q = _drafter_kernel(scores, tl.load(highest_ptr + draft), tl.load(draft_mass_ptr + draft))
        left = (cp - q).to(tl.float32)
        known &= left >= NORMAL
        seed = tl.load(seeds_ptr + request)
        noise = _noise_of_tile(seed, place, tile, TILE) if DENSE else gumbel_of_kernel(seed, place, token, RESIDUAL_WORD)
        score = log_kernel(tl.maximum(left, NORMAL)) + noise
        best = tl.max(tl.where(known, packed(score, token), -0x8000000000000000))
    tl.store(best_ptr + request * PARTS + tile, best)


@jit
def _others_kernel(
    logits_ptr, first_ptr, temperature_ptr, min_p_ptr, seeds_ptr, offsets_ptr, least_ptr, mass_ptr, row_highest_ptr, limit_ptr,
    accepted_ptr, carried_ptr, marks_ptr, best_ptr, stride, VOCABULARY: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """As _candidates_kernel, of one tile of the vocabulary without the candidates."""
    request = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    accepted = tl.load(accepted_ptr + request)
    if accepted >= tl.load(limit_ptr + request):
        return
    row = tl.load(first_ptr + request) + accepted
    place = tl.load(offsets_ptr + request) + accepted
    c = tl.load(carried_ptr + request * (MOST + 1) + accepted)
    token = tile * TILE + tl.arange(0, TILE)
    of_row = _row(least_ptr, mass_ptr, row_highest_ptr, temperature_ptr, min_p_ptr, request, row, True)

    logits = tl.load(logits_ptr + row * stride + token, token < VOCABULARY, other=float("-inf")).to(tl.float32)
    left = (c * _target_kernel(logits, of_row)).to(tl.float32)
    known = left >= NORMAL
    best = tl.full((), -0x8000000000000000, tl.int64)
    if tl.max(known.to(tl.int32)) > 0:
        marks = tl.load(marks_ptr + request * WORDS + token // 32, known, other=0)
        known &= ((marks >> (token % 32)) & 1) == 0
        score = log_kernel(tl.maximum(left, NORMAL)) + _noise_of_tile(tl.load(seeds_ptr + request), place, tile, TILE)
        best = tl.max(tl.where(known, packed(score, token), -0x8000000000000000))
    tl.store(best_ptr + request * PARTS + TILES + tile, best)


@jit
def _token_kernel(
    first_ptr, sampled_ptr, limit_ptr, accepted_ptr, best_ptr, token_ptr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr
):
    request = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_BLOCK)
    accepted = tl.load(accepted_ptr + request)
    token = tl.load(sampled_ptr + tl.load(first_ptr + request) + accepted)
    if accepted < tl.load(limit_ptr + request):
        best = tl.max(tl.load(best_ptr + request * PARTS + part, part < PARTS, other=-0x8000000000000000))
        token = tl.where(best == -0x8000000000000000, token, index_of(best))
    tl.store(token_ptr + request, token)


def _launch(
    logits: Tensor, first: Tensor, counts: Tensor, drafts: Tensor, draft_scores: Tensor, draft_tokens: Tensor | None,
    temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, offsets: Tensor, block: bool,
    *, plan: SamplePlan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    requests, most = drafts.shape
    rows, width = logits.shape
    accepted, token = torch.empty_like(counts), torch.empty_like(counts)
    if not requests:
        return accepted, token
    logits = unit_stride(logits)
    first, counts, drafts, scores = (t.contiguous() for t in (first, counts, drafts, draft_scores))
    dense = draft_tokens is None
    tokens = drafts if draft_tokens is None else draft_tokens.contiguous()
    parameters = tuple(t.contiguous() for t in (temperature, top_k, top_p, min_p))
    seeds, offsets = seeds.contiguous(), offsets.contiguous()
    temperature, _, _, min_p = parameters

    # A row that is no request's is greedy: the least work.
    of_rows = temperature.new_zeros(rows), *(t.new_empty(rows) for t in (*parameters[1:], seeds, offsets))
    _rows_kernel[(requests,)](
        first, counts, *parameters, seeds, offsets, *of_rows, power_of_two(most + 1), num_warps=1, **UNFUSED
    )
    sampled, *target = launch_kept(logits, of_rows[:4], of_rows[4], of_rows[5], plan)

    candidates = scores.shape[2]
    tile = min(TILE, max(16, power_of_two(candidates)))
    tiles = -(-candidates // tile)
    grid = requests * most, tiles
    tops, sums, own = seeds.new_empty(grid), seeds.new_empty(grid), temperature.new_empty(grid)
    highest, draft_mass, common = (t.new_empty(requests * most) for t in (temperature, seeds, seeds))
    _draft_scan_kernel[grid](
        scores, tokens, counts, drafts, temperature, tops, sums, own, common, candidates, tile, tiles, most, dense,
        num_warps=4, **UNFUSED,
    )  # fmt: skip
    limit, carried = torch.empty_like(counts), seeds.new_empty((requests, most + 1), dtype=torch.float64)
    _chain_kernel[(requests,)](
        logits, first, counts, drafts, temperature, min_p, seeds, offsets, sampled, *target, tops, sums, own, highest,
        draft_mass, limit, accepted, carried, logits.stride(0), width, most, tiles, power_of_two(tiles), block,
        num_warps=4 if tiles > 32 else 1, **UNFUSED,
    )  # fmt: skip
    if block and most > 1:
        _common_kernel[grid](
            logits, scores, tokens, first, temperature, min_p, *target, highest, draft_mass, limit, carried, common,
            logits.stride(0), width, candidates, tile, most, dense, num_warps=4, **UNFUSED,
        )  # fmt: skip
    if block:
        _decide_kernel[(requests,)](
            seeds, offsets, limit, carried, common, accepted, most, num_warps=1, **UNFUSED
        )  # fmt: skip

    tile_of_all = min(TILE, max(16, power_of_two(width)))
    tiles_of_all = 0 if dense else -(-width // tile_of_all)
    parts = tiles + tiles_of_all
    best = seeds.new_empty((requests, parts))
    _candidates_kernel[(requests, tiles)](
        logits, scores, tokens, first, temperature, min_p, seeds, offsets, *target, highest, draft_mass, limit, accepted,
        carried, best, logits.stride(0), width, candidates, tile, most, parts, dense, num_warps=4, **UNFUSED,
    )  # fmt: skip
    if not dense:
        words = -(-width // 32)
        marks = counts.new_zeros((requests, words), dtype=torch.int32)
        _mark_kernel[(requests, tiles)](
            tokens, limit, accepted, marks, width, candidates, tile, most, words, num_warps=4, **UNFUSED
        )
        _others_kernel[(requests, tiles_of_all)](
            logits, first, temperature, min_p, seeds, offsets, *target, limit, accepted, carried, marks, best,
            logits.stride(0), width, tile_of_all, most, tiles, parts, words, num_warps=4, **UNFUSED,
        )  # fmt: skip
    _token_kernel[(requests,)](first, sampled, limit, accepted, best, token, parts, power_of_two(parts), num_warps=4, **UNFUSED)
    return accepted, token


def _example(d: Draw) -> tuple[Any, ...]:
    """A request a token, with three drafts or fewer of five candidates; four in eight are greedy."""
    requests, most, width = d.batch * d.tokens, 3, d.sizes.vocabulary
    counts = torch.arange(requests, device=d.device) % (most + 1)
    first = (counts + 1).cumsum(0) - counts - 1
    rows = sum(r % (most + 1) + 1 for r in range(requests))
    logits = 2 * d.normal(rows, width)
    tokens = torch.rand((requests, most, width), device=d.device).argsort(-1)[..., :5].contiguous()
    behind = first[:, None] + torch.minimum(torch.arange(most, device=d.device), counts[:, None])
    scores = logits[behind].float().gather(2, tokens) + torch.randn(tokens.shape, device=d.device)
    drafts = tokens.gather(2, (scores - torch.empty_like(scores).exponential_().log()).argmax(2, keepdim=True))[..., 0]
    temperature = (torch.arange(requests, device=d.device) // 4 + 1) % 2 * 0.8
    top_k = torch.full((requests,), 7, dtype=torch.int32, device=d.device)
    top_p, min_p = torch.full_like(temperature, 0.9), torch.full_like(temperature, 0.01)
    seeds = torch.randint(2**62, (requests,), device=d.device)
    return logits, first, counts, drafts, scores, tokens, temperature, top_k, top_p, min_p, seeds, seeds % 1000, True


@op(launch=_launch, like=("counts", "counts"), check=_check, example=_example)
def verify(
    logits: Tensor, first: Tensor, counts: Tensor, drafts: Tensor, draft_scores: Tensor, draft_tokens: Tensor | None,
    temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, offsets: Tensor, block: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How many drafts of each request are accepted, and the token that follows them.

    logits        [S, V]            fp32, fp16 or bf16, the target's own; those of a draft are in the row before its own place
    first         [R]       int64   the first row of each request; no row belongs to two
    counts        [R]       int64   drafts to verify, 0 to K; a request has one row more
    drafts        [R, K]    int64   drawn from softmax(draft_scores), by draw_draft for example; unread beyond counts
    draft_scores  [R, K, C] fp32    the drafter's logits / temperature; unread beyond counts and for greedy requests
    draft_tokens  [R, K, C] int64   the candidates' tokens, distinct; None: C is V
    temperature, top_k, top_p, min_p, seeds  [R]  as of gemma4::sample, of each request
    offsets       [R]       int64   new tokens before that of the first row
    block                   bool    by block, not by token
    returns       [R] int64, [R] int64  drafts accepted, and the token: distributed as gemma4::sample draws one by one

    Greedy requests accept leading drafts that are the argmax, and then have the argmax. Drafts end before the first that is no
    token or whose row, of the target or of the drafter, has no finite highest value: no more are accepted, and the token there
    is gemma4::sample's, as it is behind the last draft. A request depends on nothing of others.

    Raises ValueError for shapes and dtypes that do not fit. The same results on CPU and CUDA.
    """
    most, vocabulary = drafts.shape[1], logits.shape[1]
    place = torch.arange(most + 1, device=drafts.device)
    given = logits[first[:, None] + torch.minimum(place, counts[:, None])]  # behind a request's last row: that row
    shaping = temperature, top_k, top_p, min_p
    p, possible = _target(given, *(t.repeat_interleave(most + 1) for t in shaping))
    q, known = _drafter(draft_scores, draft_tokens, vocabulary)

    greedy = ~(temperature > 0)
    known |= greedy[:, None]  # nothing is asked of q
    usable = (place[:-1] < counts[:, None]) & (drafts >= 0) & (drafts < vocabulary) & possible[:, :-1] & known
    limit = usable.long().cumprod(1).sum(1)
    x = drafts.clamp(0, vocabulary - 1)[:, :, None]
    chances = p[:, :-1].gather(2, x)[:, :, 0], q.gather(2, x)[:, :, 0]
    u = uniform(seeds, offsets, most, ACCEPT)
    accepted, carried = accept_block(p, q, *chances, limit, u) if block else accept_tokens(*chances, limit, u)
    equal = usable & (drafts == given[:, :-1].argmax(2))
    accepted = torch.where(greedy, equal.long().cumprod(1).sum(1), accepted)

    here = accepted[:, None, None].expand(-1, 1, vocabulary)
    left = residual(p.gather(1, here)[:, 0], q.gather(1, here.clamp(max=most - 1))[:, 0], carried).float()
    noise = gumbel(seeds, offsets + accepted, vocabulary, RESIDUAL)
    score = torch.where(left >= _NORMAL, bitwise.log(left.clamp(min=_NORMAL)) + noise, -torch.inf)
    drawn = ~greedy & (accepted < limit) & (score.amax(1) > -torch.inf)  # rounding may leave nothing where p is q
    sampled = sample.reference(given.gather(1, here)[:, 0], *shaping, seeds, offsets + accepted)
    return accepted, torch.where(drawn, score.argmax(1), sampled)


def draw_draft(
    scores: Tensor, tokens: Tensor | None, seeds: Tensor, offsets: Tensor, step: int | Tensor, greedy: Tensor
) -> Tensor:
    """The next draft of each request, drawn from softmax(scores). Plain PyTorch: it may be compiled, and captured.

    scores   [R, C] fp32          logits / temperature of the candidates; for greedy rows any multiple of the logits
    tokens   [R, C] int64         the candidates, distinct, in any order; None: C is the vocabulary
    seeds    [R]    int64         as of gemma4::sample
    offsets  [R]    int64         new tokens before the first draft of the round: what `verify` is given for it
    step     int, or [] int64     the draft's place in the round, from 0 on
    greedy   [R]    bool          the highest score instead, the lowest token among equals
    returns  [R]    int64         any candidate for a row that is not a number
    """
    stream = DRAFT + STREAMS * step
    if tokens is None:
        noise = gumbel(seeds, offsets, scores.shape[1], stream)
        tokens = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    else:
        noise = gumbel_of(seeds, offsets, tokens, stream)
    drawn = tokens.gather(1, (scores + noise).argmax(1, keepdim=True))[:, 0]
    highest = torch.where(scores == scores.amax(1, keepdim=True), tokens, tokens.amax(1, keepdim=True)).amin(1)
    return torch.where(greedy, highest, drawn)
