"""post_attention_norm, post_attention_norms: from the attention output to everything that reads the new hidden state.

Source: Gemma4TextDecoderLayer.forward and Gemma4TextRouter.forward (transformers):
    hidden = residual + post_attention_layernorm(x)
then pre_feedforward_layernorm(hidden); with experts also the router's norm and scales, and pre_feedforward_layernorm_2.
All tensors are [..., H]; the weights are [H].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import expect, fresh, register
from .rms_norm import normalize


def post_attention_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check("post_attention_norm", x, residual, weight, next_weight)
    hidden = residual + normalize(x, weight, eps)
    return hidden, normalize(hidden, next_weight, eps)


def post_attention_norms_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    feed_forward_weight: Tensor,
    router_scale: Tensor,
    router_root: float,
    expert_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("post_attention_norms", x, residual, weight, feed_forward_weight, router_scale, expert_weight)
    hidden = residual + normalize(x, weight, eps)
    router_in = normalize(hidden, None, eps) * router_scale * router_root
    return hidden, normalize(hidden, feed_forward_weight, eps), router_in, normalize(hidden, expert_weight, eps)


def _check(op: str, x: Tensor, residual: Tensor, *weights: Tensor) -> None:
    expect(f"{op}: residual must have x's shape", residual.shape, x.shape, "pass the hidden state before attention")
    for weight in weights:
        expect(f"{op}: each weight must be [H] for x [..., H]", weight.shape, x.shape[-1:], "pass this layer's weights")


def launch_post_attention_norm(
    x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return post_attention_norm_reference(x, residual, weight, next_weight, eps)


def launch_post_attention_norms(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    feed_forward_weight: Tensor,
    router_scale: Tensor,
    router_root: float,
    expert_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return post_attention_norms_reference(
        x, residual, weight, feed_forward_weight, router_scale, router_root, expert_weight, eps
    )


def _post_attention_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check("post_attention_norm", x, residual, weight, next_weight)
    return fresh(x), fresh(x)


def _post_attention_norms_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    feed_forward_weight: Tensor,
    router_scale: Tensor,
    router_root: float,
    expert_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("post_attention_norms", x, residual, weight, feed_forward_weight, router_scale, expert_weight)
    return fresh(x), fresh(x), fresh(x), fresh(x)


register(
    "post_attention_norm(Tensor x, Tensor residual, Tensor weight, Tensor next_weight, float eps)"
    " -> (Tensor hidden, Tensor normed)",
    reference=post_attention_norm_reference,
    launch=launch_post_attention_norm,
    fake=_post_attention_norm_fake,
)
register(
    "post_attention_norms(Tensor x, Tensor residual, Tensor weight, Tensor feed_forward_weight, Tensor router_scale,"
    " float router_root, Tensor expert_weight, float eps)"
    " -> (Tensor hidden, Tensor feed_forward_in, Tensor router_in, Tensor expert_in)",
    reference=post_attention_norms_reference,
    launch=launch_post_attention_norms,
    fake=_post_attention_norms_fake,
)


def post_attention_norm(
    x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden = residual + norm(x, weight); normed = norm(hidden, next_weight).

    x, residual          [..., H]  fp32, fp16 or bf16
    weight, next_weight  [H]
    returns              hidden, normed  [..., H], contiguous
    """
    return torch.ops.gemma4.post_attention_norm(x, residual, weight, next_weight, eps)


def post_attention_norms(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    feed_forward_weight: Tensor,
    router_scale: Tensor,
    router_root: float,
    expert_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden = residual + norm(x, weight), and the three norms of it that a layer with experts reads.

    x, residual                                               [..., H]  fp32, fp16 or bf16
    weight, feed_forward_weight, router_scale, expert_weight  [H]
    router_root                                               H ** -0.5, as the router multiplies by it
    returns  hidden, feed_forward_in, router_in, expert_in    [..., H], contiguous
    """
    return torch.ops.gemma4.post_attention_norms(
        x, residual, weight, feed_forward_weight, router_scale, router_root, expert_weight, eps
    )
