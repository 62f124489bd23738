"""post_attention_norm, post_attention_norms: from the attention output to everything that reads the new hidden state.

Source: Gemma4TextDecoderLayer.forward and Gemma4TextRouter.forward (transformers):
    hidden = residual + post_attention_layernorm(x)
then pre_feedforward_layernorm(hidden); with experts also the router's norm and scales, and pre_feedforward_layernorm_2.
All tensors are [..., H]; the weights are [H].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .feed_forward_tail import launch_tail
from .library import (
    as_rows,
    await_previous,
    expect,
    fresh,
    jit,
    mean_square_norm,
    pinned,
    power_of_two,
    register,
    rounded,
    tl,
)
from .plans import pdl_options, row_plan
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
    expect(op, "residual must have x's shape", residual.shape, x.shape, "pass the hidden state before attention")
    expect(op, "residual must have x's dtype", residual.dtype, x.dtype, "cast one of them")
    for weight in weights:
        expect(op, "each weight must be [H] for x [..., H]", weight.shape, x.shape[-1:], "pass this layer's weights")


@jit
def _post_attention_norms_kernel(
    x_ptr, residual_ptr, weight_ptr, feed_forward_weight_ptr, router_scale_ptr, expert_weight_ptr,
    hidden_ptr, feed_forward_ptr, router_ptr, expert_ptr, rows, x_stride, residual_stride, router_root, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    eps = pinned(eps)
    router_root = pinned(router_root)
    dtype = hidden_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    if PDL:
        await_previous()
    weight = tl.load(weight_ptr + column, inside, other=0.0)
    feed_forward_weight = tl.load(feed_forward_weight_ptr + column, inside, other=0.0)
    router_scale = tl.load(router_scale_ptr + column, inside, other=0.0)
    expert_weight = tl.load(expert_weight_ptr + column, inside, other=0.0)

    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + row * residual_stride + column, inside, other=0.0).to(tl.float32)

        hidden = residual + rounded(mean_square_norm(x, WIDTH, eps) * weight.to(tl.float32), dtype)
        hidden = rounded(hidden, dtype)
        normed = mean_square_norm(hidden, WIDTH, eps)
        router = rounded(rounded(normed, dtype) * router_scale.to(tl.float32), dtype) * router_root

        target = row * WIDTH + column
        tl.store(hidden_ptr + target, hidden, inside)
        tl.store(feed_forward_ptr + target, normed * feed_forward_weight.to(tl.float32), inside)
        tl.store(router_ptr + target, router, inside)
        tl.store(expert_ptr + target, normed * expert_weight.to(tl.float32), inside)


def launch_post_attention_norm(
    x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    _check("post_attention_norm", x, residual, weight, next_weight)
    return launch_tail(x, residual, weight, None, next_weight, eps)


def launch_post_attention_norms(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    feed_forward_weight: Tensor,
    router_scale: Tensor,
    router_root: float,
    expert_weight: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    _check("post_attention_norms", x, residual, weight, feed_forward_weight, router_scale, expert_weight)
    outputs = fresh(x), fresh(x), fresh(x), fresh(x)
    if x.numel():
        x_rows, residual_rows = as_rows(x), as_rows(residual)
        rows, width = x_rows.shape
        block = power_of_two(width)
        programs, warps = row_plan(rows, block)
        weights = (t.contiguous() for t in (weight, feed_forward_weight, router_scale, expert_weight))
        _post_attention_norms_kernel[(programs,)](
            x_rows, residual_rows, *weights, *outputs, rows, x_rows.stride(0), residual_rows.stride(0),
            router_root, eps, width, block, num_warps=warps, **pdl_options(),
        )  # fmt: skip
    return outputs


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
