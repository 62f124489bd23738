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
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import bitwise
from .bitwise import ACCEPT, DRAFT, RESIDUAL, STREAMS, gumbel, gumbel_of, uniform, weights
from .library import expect, register
from .sample import MOST, PARAMETERS, kept_reference, sample_reference, scaled

_NORMAL = 2.0**-126  # the least fp32 whose log bitwise.py has


def verify_reference(
    logits: Tensor, first: Tensor, counts: Tensor, drafts: Tensor, draft_scores: Tensor, draft_tokens: Tensor | None,
    temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, offsets: Tensor, block: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(logits, first, counts, drafts, draft_scores, draft_tokens, temperature, top_k, top_p, min_p, seeds, offsets)
    requests, most = drafts.shape
    place = torch.arange(most + 1, device=drafts.device)
    rows = first[:, None] + torch.minimum(place, counts[:, None])  # behind the last row of a request: that row
    given = logits[rows]
    shaping = [t.repeat_interleave(most + 1) for t in (temperature, top_k, top_p, min_p, seeds)]
    shaping.append((offsets[:, None] + place).flatten())
    sampled = sample_reference(given.flatten(0, 1), *shaping).view(requests, most + 1)
    p, possible = _target(given, *shaping[:4])
    q, known = _drafter(draft_scores, draft_tokens, logits.shape[1])

    greedy = ~(temperature > 0)
    known |= greedy[:, None]  # nothing is asked of q
    usable = (place[:-1] < counts[:, None]) & (drafts >= 0) & (drafts < logits.shape[1]) & possible[:, :-1] & known
    limit = usable.long().cumprod(1).sum(1)
    x = drafts.clamp(0, logits.shape[1] - 1)[:, :, None]
    chances = p[:, :-1].gather(2, x)[:, :, 0], q.gather(2, x)[:, :, 0]
    u = uniform(seeds, offsets, most, ACCEPT)
    accepted, carried = accept_block(p, q, *chances, limit, u) if block else accept_tokens(*chances, limit, u)
    equal = (drafts == sampled[:, :-1]) & usable
    accepted = torch.where(greedy, equal.long().cumprod(1).sum(1), accepted)

    here = accepted[:, None, None].expand(-1, 1, p.shape[2])
    left = residual(p.gather(1, here)[:, 0], q.gather(1, here.clamp(max=most - 1))[:, 0], carried).float()
    noise = gumbel(seeds, offsets + accepted, p.shape[2], RESIDUAL)
    score = torch.where(left >= _NORMAL, bitwise.log(left.clamp(min=_NORMAL)) + noise, -torch.inf)
    drawn = ~greedy & (accepted < limit) & (score.amax(1) > -torch.inf)  # rounding may leave nothing where p is q
    return accepted, torch.where(drawn, score.argmax(1), sampled.gather(1, accepted[:, None])[:, 0])


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
    p, possible = _shares(x, kept_reference(x, top_k, top_p, min_p))
    return p.view(logits.shape), possible.view(logits.shape[:2])


def _drafter(scores: Tensor, tokens: Tensor | None, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Softmax of the candidates, [R, K, V] fp64, and whether it is one, [R, K]."""
    q, known = _shares(scores, None)
    if tokens is not None:
        q = q.new_zeros((*q.shape[:2], vocabulary)).scatter_add(2, tokens.clamp(0, vocabulary - 1), q)
    return q, known


def _shares(x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    highest = x.amax(-1, keepdim=True)
    amounts = weights(x - highest).long()
    if kept is not None:
        amounts = torch.where(kept, amounts, 0)
    return amounts.double() * (1.0 / amounts.sum(-1, keepdim=True).double()), highest[..., 0].isfinite()


def _check(
    logits: Tensor, first: Tensor, counts: Tensor, drafts: Tensor, draft_scores: Tensor, draft_tokens: Tensor | None,
    *parameters: Tensor,
) -> None:  # fmt: skip
    op = "verify"
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
    of_requests = zip(("first", "counts", *PARAMETERS), (first, counts, *parameters), strict=True)
    for name, value in of_requests:
        dtype = PARAMETERS.get(name, torch.int64)
        expect(op, f"{name} must be [R] for drafts [R, K]", value.shape, drafts.shape[:1], "pass one a request")
        expect(op, f"{name} has a dtype of its own", value.dtype, dtype, f"build it with dtype={dtype}")
    expect(op, "drafts has a dtype of its own", drafts.dtype, torch.int64, "build it with dtype=torch.int64")


def launch_verify(
    logits: Tensor, first: Tensor, counts: Tensor, drafts: Tensor, draft_scores: Tensor, draft_tokens: Tensor | None,
    temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, offsets: Tensor, block: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference, which waits for nothing and runs on CUDA too."""
    return verify_reference(
        logits, first, counts, drafts, draft_scores, draft_tokens, temperature, top_k, top_p, min_p, seeds, offsets, block
    )


def _verify_fake(
    logits: Tensor, first: Tensor, counts: Tensor, drafts: Tensor, draft_scores: Tensor, draft_tokens: Tensor | None,
    temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, offsets: Tensor, block: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(logits, first, counts, drafts, draft_scores, draft_tokens, temperature, top_k, top_p, min_p, seeds, offsets)
    return counts.new_empty(counts.shape), counts.new_empty(counts.shape)


register(
    "verify(Tensor logits, Tensor first, Tensor counts, Tensor drafts, Tensor draft_scores, Tensor? draft_tokens,"
    " Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor offsets, bool block)"
    " -> (Tensor, Tensor)",
    reference=verify_reference,
    launch=launch_verify,
    fake=_verify_fake,
)


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
    return torch.ops.gemma4.verify(
        logits, first, counts, drafts, draft_scores, draft_tokens, temperature, top_k, top_p, min_p, seeds, offsets, block
    )


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
