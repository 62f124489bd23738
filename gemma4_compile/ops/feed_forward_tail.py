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
    expect(op, "residual must have the input's shape", residual.shape, x.shape, "pass the state before the block")
    expect(op, "residual must have the input's dtype", residual.dtype, x.dtype, "cast one of them")
    for weight in weights:
        expect(op, "each weight must be [H] for [..., H]", weight.shape, x.shape[-1:], "pass this layer's weights")
    if layer_scalar is not None:
        expect(op, "layer_scalar must be one number", layer_scalar.numel(), 1, "pass the layer's buffer, or None")


def _check_experts(op: str, experts: Tensor, residual: Tensor) -> None:
    expect(
        op,
        "experts must be [..., H] with as many elements as residual",
        (experts.numel(), experts.shape[-1]),
        (residual.numel(), residual.shape[-1]),
        "pass the experts' output for the same tokens",
    )
    expect(op, "experts must have residual's dtype", experts.dtype, residual.dtype, "cast one of them")


@jit
def _tail_kernel(
    x_ptr, experts_ptr, residual_ptr, dense_weight_ptr, expert_weight_ptr, weight_ptr, scalar_ptr, next_weight_ptr,
    hidden_ptr, normed_ptr, rows, x_stride, experts_stride, residual_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    eps = pinned(eps)
    dtype = hidden_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    if PDL:
        await_previous()
    # All loads stand before the first reduction: a lone row waits for memory once.
    if experts_ptr is not None:
        dense_weight = tl.load(dense_weight_ptr + column, inside, other=0.0)
        expert_weight = tl.load(expert_weight_ptr + column, inside, other=0.0)
    weight = tl.load(weight_ptr + column, inside, other=0.0)
    if next_weight_ptr is not None:
        next_weight = tl.load(next_weight_ptr + column, inside, other=0.0)
    if scalar_ptr is not None:
        scalar = tl.load(scalar_ptr).to(tl.float32)

    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * x_stride + column, inside, other=0.0).to(tl.float32)
        if experts_ptr is not None:
            experts = tl.load(experts_ptr + row * experts_stride + column, inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + row * residual_stride + column, inside, other=0.0).to(tl.float32)

        if experts_ptr is not None:
            x = rounded(mean_square_norm(x, WIDTH, eps) * dense_weight.to(tl.float32), dtype)
            x += rounded(mean_square_norm(experts, WIDTH, eps) * expert_weight.to(tl.float32), dtype)
            x = rounded(x, dtype)
        hidden = residual + rounded(mean_square_norm(x, WIDTH, eps) * weight.to(tl.float32), dtype)
        hidden = rounded(hidden, dtype)
        if scalar_ptr is not None:
            hidden = rounded(hidden * scalar, dtype)
        tl.store(hidden_ptr + row * WIDTH + column, hidden, inside)
        if next_weight_ptr is not None:
            normed = mean_square_norm(hidden, WIDTH, eps) * next_weight.to(tl.float32)
            tl.store(normed_ptr + row * WIDTH + column, normed, inside)


def launch_tail(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    experts: Tensor | None = None,
    dense_weight: Tensor | None = None,
    expert_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The one launcher of every chain that ends in residual + norm [* scalar] [, next norm]; arguments are checked."""
    hidden = fresh(residual)
    normed = None if next_weight is None else fresh(residual)
    if hidden.numel():
        x_rows, residual_rows = as_rows(x), as_rows(residual)
        expert_rows = None if experts is None else as_rows(experts)
        rows, width = x_rows.shape
        block = power_of_two(width)
        programs, warps = row_plan(rows, block)
        weights = (t if t is None else t.contiguous() for t in (dense_weight, expert_weight, weight))
        _tail_kernel[(programs,)](
            x_rows, expert_rows, residual_rows, *weights, layer_scalar,
            next_weight if next_weight is None else next_weight.contiguous(), hidden, normed,
            rows, x_rows.stride(0), 0 if expert_rows is None else expert_rows.stride(0), residual_rows.stride(0), eps,
            width, block, num_warps=warps, **pdl_options(),
        )  # fmt: skip
    return hidden, normed


def launch_feed_forward_tail(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, eps: float
) -> Tensor:
    _check("feed_forward_tail", x, residual, layer_scalar, weight)
    return launch_tail(x, residual, weight, layer_scalar, None, eps)[0]


def launch_feed_forward_tail_norm(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    _check("feed_forward_tail_norm", x, residual, layer_scalar, weight, next_weight)
    return launch_tail(x, residual, weight, layer_scalar, next_weight, eps)


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
    _check("moe_feed_forward_tail", dense, residual, layer_scalar, dense_weight, expert_weight, weight)
    _check_experts("moe_feed_forward_tail", experts, residual)
    return launch_tail(dense, residual, weight, layer_scalar, None, eps, experts, dense_weight, expert_weight)[0]


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
) -> tuple[Tensor, Tensor | None]:
    _check(
        "moe_feed_forward_tail_norm", dense, residual, layer_scalar, dense_weight, expert_weight, weight, next_weight
    )
    _check_experts("moe_feed_forward_tail_norm", experts, residual)
    return launch_tail(dense, residual, weight, layer_scalar, next_weight, eps, experts, dense_weight, expert_weight)


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
