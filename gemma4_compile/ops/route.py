"""route: from router logits to the chosen experts and their weights.

Source: Gemma4TextRouter.forward (transformers) after its projection: softmax in fp32, top-k, renormalize, times the
scale of each expert. The kernel breaks ties by the lowest index; torch.topk leaves them open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import expect, register


def route_reference(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    _check(logits, per_expert_scale)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, indices = torch.topk(probabilities, k=top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * per_expert_scale[indices], indices


def _check(logits: Tensor, per_expert_scale: Tensor) -> None:
    expect("route: logits must be [N, E]", logits.dim(), 2, "flatten the tokens first")
    expect(
        "route: per_expert_scale must be [E] for logits [N, E]",
        per_expert_scale.shape,
        logits.shape[-1:],
        "pass the scale of this router",
    )


def launch_route(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return route_reference(logits, per_expert_scale, top_k)


def _route_fake(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    _check(logits, per_expert_scale)
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


register(
    "route(Tensor logits, Tensor per_expert_scale, int top_k) -> (Tensor weights, Tensor indices)",
    reference=route_reference,
    launch=launch_route,
    fake=_route_fake,
)


def route(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose top_k experts for each token.

    logits            [N, E]      fp32, fp16 or bf16
    per_expert_scale  [E]
    returns           weights     [N, top_k] fp32, summing to 1 before the scale
                      indices     [N, top_k] int64, by falling probability, ties by the lowest index
    """
    return torch.ops.gemma4.route(logits, per_expert_scale, top_k)
