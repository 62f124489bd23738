"""ordered_argmax: the token that an assistant's ordered embeddings score highest, without a tensor of vocabulary size;
ordered_scores: all that they score.

Source: Gemma4AssistantMaskedEmbedder (transformers), for the first followed by argmax. The vocabulary lies in clusters; only
tokens of the clusters whose centroids score highest are scored. There the scattered row has a place for every token.

What a row costs: two launches, and the embeddings of its clusters read once. One program a row finds the clusters by bisection
of the scores' bits (_clusters_kernel), then one program a row and cluster scores its tokens; the last of a row's to finish has
the answer (_tokens_kernel).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_compile.ops.library import expect, jit, op, power_of_two, tl, unit_stride

from .sample import index_of, ordered, packed


def _check(op: str, states: Tensor, scores: Tensor, ordering: Tensor, weight: Tensor, top_k: int) -> None:
    expect(op, "states must be [R, H]", states.dim(), 2, "flatten them")
    expect(op, "scores must be [R, C] for states [R, H]", scores.shape[:1], states.shape[:1], "pass a row for each state")
    expect(op, "weight must be [V, H] for states [R, H]", weight.shape[1:], states.shape[1:], "pass the head's weight")
    expect(op, "ordering must be [V] for weight [V, H]", ordering.shape, weight.shape[:1], "pass each token once")
    expect(op, "C must divide V", weight.shape[0] % max(scores.shape[1], 1), 0, "pass a score for each cluster")
    expect(op, "top_k must lie in 1..C", bool(1 <= top_k <= scores.shape[1]), True, "take the checkpoint's")


@jit
def _clusters_kernel(
    scores_ptr, clusters_ptr, best_ptr, count_ptr, stride, CLUSTERS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """The TOP_K clusters of one row, ascending; among equal scores at the border the lowest."""
    row = tl.program_id(0).to(tl.int64)
    cluster = tl.arange(0, BLOCK)
    inside = cluster < CLUSTERS
    key = ordered(tl.load(scores_ptr + row * stride + cluster, inside, other=float("-inf")).to(tl.float32)) >> (32 - BITS)
    low = tl.full((), -(1 << (BITS - 1)), tl.int64)  # the largest key that TOP_K clusters reach lies in low to high
    high = tl.full((), (1 << (BITS - 1)) - 1, tl.int64)
    for _ in range(BITS):
        middle = low + (high - low + 1) // 2
        enough = tl.sum((inside & (key >= middle)).to(tl.int32)) >= TOP_K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = inside & (key > low)
    equal = inside & (key == low)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= TOP_K - tl.sum(above.to(tl.int32))))
    tl.store(clusters_ptr + row * TOP_K + tl.cumsum(chosen.to(tl.int32), 0) - 1, cluster, chosen)
    tl.store(best_ptr + row, -0x8000000000000000)
    tl.store(count_ptr + row, 0)


@jit
def _tokens_kernel(
    states_ptr, weight_ptr, ordering_ptr, clusters_ptr, best_ptr, count_ptr, out_ptr, logits_ptr, states_stride,
    weight_stride, TOP_K: tl.constexpr, TOKENS: tl.constexpr, TOKENS_BLOCK: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The highest of one cluster's tokens, and the row's if no other cluster is still at work; or ALL of them with logits."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TOKENS_BLOCK)
    inside = place < TOKENS
    cluster = tl.load(clusters_ptr + row * TOP_K + tl.program_id(1)).to(tl.int64)
    token = tl.load(ordering_ptr + cluster * TOKENS + place, inside, other=0).to(tl.int64)
    logits = tl.zeros((TOKENS_BLOCK,), tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = column < HIDDEN
        state = tl.load(states_ptr + row * states_stride + column, real, other=0.0).to(tl.float32)
        at = weight_ptr + token[:, None] * weight_stride + column[None, :]
        weight = tl.load(at, inside[:, None] & real[None, :], other=0.0).to(tl.float32)
        logits += tl.sum(weight * state[None, :], axis=1)
    if ALL:
        at = (row * TOP_K + tl.program_id(1)) * TOKENS + place
        tl.store(logits_ptr + at, logits, inside)
        tl.store(out_ptr + at, token, inside)
        return
    best = tl.max(tl.where(inside, packed(logits, token), -0x8000000000000000))
    tl.atomic_max(best_ptr + row, best)
    if tl.atomic_add(count_ptr + row, 1) == TOP_K - 1:
        tl.store(out_ptr + row, index_of(tl.atomic_max(best_ptr + row, best)).to(tl.int64))


def _launch(every: bool, states: Tensor, scores: Tensor, ordering: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    states, scores, weight, ordering = unit_stride(states), unit_stride(scores), unit_stride(weight), ordering.contiguous()
    (rows, hidden), clusters = states.shape, scores.shape[1]
    tokens = weight.shape[0] // clusters
    shape = (rows, top_k * tokens) if every else (rows,)
    out = torch.empty(shape, dtype=torch.int64, device=states.device)
    logits = torch.empty(shape, dtype=torch.float32, device=states.device)
    if not rows:
        return logits, out
    best, count = (torch.empty(rows, dtype=dtype, device=states.device) for dtype in (torch.int64, torch.int32))
    chosen = torch.empty((rows, top_k), dtype=torch.int32, device=states.device)
    _clusters_kernel[(rows,)](
        scores, chosen, best, count, scores.stride(0), clusters, top_k, power_of_two(clusters),
        16 if scores.dtype == torch.bfloat16 else 32, num_warps=8,
    )  # fmt: skip
    _tokens_kernel[(rows, top_k)](
        states, weight, ordering, chosen, best, count, out, logits, states.stride(0), weight.stride(0), top_k, tokens,
        power_of_two(tokens), hidden, min(64, power_of_two(hidden)), every, num_warps=4,
    )  # fmt: skip
    return logits, out


@op(
    launch=lambda *args: _launch(False, *args)[1],
    fake=lambda states, *_: states.new_empty(states.shape[:1], dtype=torch.int64),
    check=_check,
)
def ordered_argmax(states: Tensor, scores: Tensor, ordering: Tensor, weight: Tensor, top_k: int) -> Tensor:
    """The highest-scored token of the top_k clusters, before it is rounded; the lowest among equals.

    states    [R, H]
    scores    [R, C] of the clusters' centroids
    ordering  [V] int64: the tokens of the first cluster, of the next, V / C each
    weight    [V, H] of the head
    returns   [R] int64; any token for a row that is not a number

    Raises ValueError for shapes that do not fit, and top_k outside of 1 to C.
    """
    vocabulary = weight.shape[0]
    logits, tokens = ordered_scores.reference(states, scores, ordering, weight, top_k)
    highest = logits.amax(-1, keepdim=True)
    return torch.where(logits == highest, tokens, vocabulary).amin(-1).clamp(max=vocabulary - 1)


def _scores_fake(states: Tensor, scores: Tensor, ordering: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = states.shape[0], top_k * (weight.shape[0] // scores.shape[1])
    return states.new_empty(shape, dtype=torch.float32), states.new_empty(shape, dtype=torch.int64)


@op(launch=lambda *args: _launch(True, *args), fake=_scores_fake, check=_check)
def ordered_scores(
    states: Tensor, scores: Tensor, ordering: Tensor, weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All tokens of the top_k clusters: logits [R, top_k * V / C] fp32, and the tokens int64; arguments of ordered_argmax.

    Raises ValueError as ordered_argmax.
    """
    clusters = torch.topk(scores, k=top_k, dim=-1).indices.sort(-1).values
    tokens = ordering.long().view(scores.shape[1], -1)[clusters].flatten(1)
    return (weight[tokens].float() * states[:, None].float()).sum(-1), tokens
