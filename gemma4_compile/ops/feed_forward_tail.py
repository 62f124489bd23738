"""feed_forward_tail[_norm], moe_feed_forward_tail[_norm]: from the feed-forward output to the next layer's input.

Source: Gemma4TextDecoderLayer.forward (transformers):
    y = mlp(...)                                                      dense layers
    y = post_feedforward_layernorm_1(mlp) + post_feedforward_layernorm_2(experts)    layers with experts
    hidden = (residual + post_feedforward_layernorm(y)) * layer_scalar
and, in the `_norm` forms, the input_layernorm of the next layer (or the final norm) over that. Layers with per-layer
inputs have no scalar here: theirs comes in ple_tail. All tensors are [..., H]; the weights are [H].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import expect, fresh, register
from .rms_norm import normalize


def scale_by(hidden: Tensor, layer_scalar: Tensor | None) -> Tensor:
    """`hidden_states *= self.layer_scalar`: the product keeps hidden's dtype."""
    return hidden if layer_scalar is None else (hidden * layer_scalar).to(hidden.dtype)


def feed_forward_tail_reference(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, eps: float
) -> Tensor:
    _check("feed_forward_tail", x, residual, layer_scalar, weight)
    return scale_by(residual + normalize(x, weight, eps), layer_scalar)


def feed_forward_tail_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check("feed_forward_tail_norm", x, residual, layer_scalar, weight, next_weight)
    hidden = scale_by(residual + normalize(x, weight, eps), layer_scalar)
    return hidden, normalize(hidden, next_weight, eps)


def moe_feed_forward_tail_reference(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    _check("moe_feed_forward_tail", dense, residual, layer_scalar, dense_weight, expert_weight, weight)
    _check_experts("moe_feed_forward_tail", experts, residual)
    joined = normalize(dense, dense_weight, eps) + normalize(experts.reshape(residual.shape), expert_weight, eps)
    return scale_by(residual + normalize(joined, weight, eps), layer_scalar)


def moe_feed_forward_tail_norm_reference(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    hidden = moe_feed_forward_tail_reference(
        dense, experts, residual, dense_weight, expert_weight, weight, layer_scalar, eps
    )
    return hidden, normalize(hidden, next_weight, eps)


def _check(op: str, x: Tensor, residual: Tensor, layer_scalar: Tensor | None, *weights: Tensor) -> None:
    expect(f"{op}: residual must have the input's shape", residual.shape, x.shape, "pass the state before the block")
    for weight in weights:
        expect(f"{op}: each weight must be [H] for [..., H]", weight.shape, x.shape[-1:], "pass this layer's weights")
    if layer_scalar is not None:
        expect(f"{op}: layer_scalar must be one number", layer_scalar.numel(), 1, "pass the layer's buffer, or None")


def _check_experts(op: str, experts: Tensor, residual: Tensor) -> None:
    expect(
        f"{op}: experts must be [..., H] with as many elements as residual",
        (experts.numel(), experts.shape[-1]),
        (residual.numel(), residual.shape[-1]),
        "pass the experts' output for the same tokens",
    )


def launch_feed_forward_tail(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, eps: float
) -> Tensor:
    return feed_forward_tail_reference(x, residual, weight, layer_scalar, eps)


def launch_feed_forward_tail_norm(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return feed_forward_tail_norm_reference(x, residual, weight, layer_scalar, next_weight, eps)


def launch_moe_feed_forward_tail(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    return moe_feed_forward_tail_reference(
        dense, experts, residual, dense_weight, expert_weight, weight, layer_scalar, eps
    )


def launch_moe_feed_forward_tail_norm(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return moe_feed_forward_tail_norm_reference(
        dense, experts, residual, dense_weight, expert_weight, weight, layer_scalar, next_weight, eps
    )


def _feed_forward_tail_fake(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, eps: float
) -> Tensor:
    _check("feed_forward_tail", x, residual, layer_scalar, weight)
    return fresh(residual)


def _feed_forward_tail_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check("feed_forward_tail_norm", x, residual, layer_scalar, weight, next_weight)
    return fresh(residual), fresh(residual)


def _moe_feed_forward_tail_fake(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    _check("moe_feed_forward_tail", dense, residual, layer_scalar, dense_weight, expert_weight, weight)
    _check_experts("moe_feed_forward_tail", experts, residual)
    return fresh(residual)


def _moe_feed_forward_tail_norm_fake(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check("moe_feed_forward_tail_norm", dense, residual, layer_scalar, dense_weight, expert_weight, weight)
    _check_experts("moe_feed_forward_tail_norm", experts, residual)
    return fresh(residual), fresh(residual)


register(
    "feed_forward_tail(Tensor x, Tensor residual, Tensor weight, Tensor? layer_scalar, float eps) -> Tensor",
    reference=feed_forward_tail_reference,
    launch=launch_feed_forward_tail,
    fake=_feed_forward_tail_fake,
)
register(
    "feed_forward_tail_norm(Tensor x, Tensor residual, Tensor weight, Tensor? layer_scalar, Tensor next_weight,"
    " float eps) -> (Tensor hidden, Tensor normed)",
    reference=feed_forward_tail_norm_reference,
    launch=launch_feed_forward_tail_norm,
    fake=_feed_forward_tail_norm_fake,
)
register(
    "moe_feed_forward_tail(Tensor dense, Tensor experts, Tensor residual, Tensor dense_weight, Tensor expert_weight,"
    " Tensor weight, Tensor? layer_scalar, float eps) -> Tensor",
    reference=moe_feed_forward_tail_reference,
    launch=launch_moe_feed_forward_tail,
    fake=_moe_feed_forward_tail_fake,
)
register(
    "moe_feed_forward_tail_norm(Tensor dense, Tensor experts, Tensor residual, Tensor dense_weight,"
    " Tensor expert_weight, Tensor weight, Tensor? layer_scalar, Tensor next_weight, float eps)"
    " -> (Tensor hidden, Tensor normed)",
    reference=moe_feed_forward_tail_norm_reference,
    launch=launch_moe_feed_forward_tail_norm,
    fake=_moe_feed_forward_tail_norm_fake,
)


def feed_forward_tail(x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, eps: float) -> Tensor:
    """(residual + norm(x, weight)) [* layer_scalar].

    x, residual   [..., H]  fp32, fp16 or bf16
    weight        [H]
    layer_scalar  [1] or None
    returns       [..., H], contiguous
    """
    return torch.ops.gemma4.feed_forward_tail(x, residual, weight, layer_scalar, eps)


def feed_forward_tail_norm(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden as feed_forward_tail gives it, and normed = norm(hidden, next_weight).

    next_weight  [H], the norm that reads hidden next
    returns      hidden, normed  [..., H], contiguous
    """
    return torch.ops.gemma4.feed_forward_tail_norm(x, residual, weight, layer_scalar, next_weight, eps)


def moe_feed_forward_tail(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    """(residual + norm(norm(dense, dense_weight) + norm(experts, expert_weight), weight)) [* layer_scalar].

    dense, residual                      [..., H]  fp32, fp16 or bf16
    experts                              [..., H] or [tokens, H], as many elements as residual
    dense_weight, expert_weight, weight  [H]
    layer_scalar                         [1] or None
    returns                              residual's shape, contiguous
    """
    return torch.ops.gemma4.moe_feed_forward_tail(
        dense, experts, residual, dense_weight, expert_weight, weight, layer_scalar, eps
    )


def moe_feed_forward_tail_norm(
    dense: Tensor,
    experts: Tensor,
    residual: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """hidden as moe_feed_forward_tail gives it, and normed = norm(hidden, next_weight).

    next_weight  [H], the norm that reads hidden next
    returns      hidden, normed  residual's shape, contiguous
    """
    return torch.ops.gemma4.moe_feed_forward_tail_norm(
        dense, experts, residual, dense_weight, expert_weight, weight, layer_scalar, next_weight, eps
    )
