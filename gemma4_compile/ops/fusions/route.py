"""route: from router logits to the chosen experts and their weights.

Source: Gemma4TextRouter.forward (transformers) after its projection: softmax in fp32, top-k, renormalize, times the
scale of each expert. The kernel breaks ties by the lowest index; torch.topk leaves them open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_compile.ops.dependent import alone, start
from gemma4_compile.ops.library import expect, exponential, jit, op, power_of_two, tl
from gemma4_compile.ops.plans import route_plan


def _check(op: str, logits: Tensor, per_expert_scale: Tensor, top_k: int) -> None:
    expect(op, "logits must be [N, E]", logits.dim(), 2, "flatten the tokens first")
    scales, experts = per_expert_scale.shape, logits.shape[-1:]
    expect(op, "per_expert_scale must be [E] for logits [N, E]", scales, experts, "pass the scale of this router")
    expect(op, "top_k must lie in 1..E", bool(1 <= top_k <= logits.shape[1]), True, "use the model's top_k_experts")


@jit(do_not_specialize=["tokens"])  # one compilation for all token counts
def _route_kernel(
    logits_ptr, scale_ptr, weights_ptr, indices_ptr, tokens, logits_stride, expert_stride,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOP_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    start(DEPENDENT)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK)[None, :]
    place = tl.arange(0, TOP_BLOCK)[None, :]
    inside = (row[:, None] < tokens) & (expert < EXPERTS)
    logits_ptr += row.to(tl.int64)[:, None] * logits_stride

    logits = tl.load(logits_ptr + expert * expert_stride, inside, other=0.0).to(tl.float32)
    logits = tl.where(expert < EXPERTS, logits, float("-inf"))

    # A lane outside the table has probability 0, like an expert whose probability underflows: the index decides.
    exponent = exponential(logits - tl.max(logits, axis=1)[:, None])
    probability = tl.where(inside, tl.div_rn(exponent, tl.broadcast_to(tl.sum(exponent, axis=1)[:, None], (ROWS, BLOCK))), 0.0)
    # Positive floats order as their bits do: one integer maximum finds the value and, among equals, the least index.
    key = (probability.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (BLOCK - 1 - expert)
    weights = tl.zeros((ROWS, TOP_BLOCK), tl.float32)
    indices = tl.zeros((ROWS, TOP_BLOCK), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.max(key, axis=1)[:, None]
        key = tl.where(key == best, -1, key)
        weights = tl.where(place == k, (best >> 32).to(tl.int32).to(tl.float32, bitcast=True), weights)
        indices = tl.where(place == k, BLOCK - 1 - (best & 0xFFFFFFFF).to(tl.int32), indices)
    chosen = (row[:, None] < tokens) & (place < TOP_K)
    scale = tl.load(scale_ptr + indices, chosen, other=0.0).to(tl.float32)
    weights = tl.div_rn(weights, tl.broadcast_to(tl.sum(weights, axis=1)[:, None], (ROWS, TOP_BLOCK))) * scale

    target = row.to(tl.int64)[:, None] * TOP_K + place
    tl.store(weights_ptr + target, weights, chosen)
    tl.store(indices_ptr + target, indices.to(tl.int64), chosen)


def _empty(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _launch(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    weights, indices = _empty(logits, per_expert_scale, top_k)
    if tokens:
        rows, warps = route_plan(tokens)
        dependent, options = alone()
        _route_kernel[(-(-tokens // rows),)](
            logits, per_expert_scale.contiguous(), weights, indices, tokens, *logits.stride(),
            experts, power_of_two(experts), top_k, power_of_two(top_k), rows, dependent, num_warps=warps, **options,
        )  # fmt: skip
    return weights, indices


@op(launch=_launch, fake=_empty, check=_check, example=lambda d: (d.logits(), d.weight(d.sizes.experts), d.sizes.top_k))
def route(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose top_k experts for each token.

    logits            [N, E]      fp32, fp16 or bf16
    per_expert_scale  [E]
    returns           weights     [N, top_k] fp32, summing to 1 before the scale
                      indices     [N, top_k] int64, by falling probability, ties by the lowest index

    Raises ValueError for shapes that do not fit, and top_k outside of 1 to E.
    """
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, indices = torch.topk(probabilities, k=top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * per_expert_scale[indices], indices
