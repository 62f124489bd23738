"""post_attention_norm, post_attention_norms: from the attention output to everything that reads the new hidden state.

Source: Gemma4TextDecoderLayer.forward and Gemma4TextRouter.forward (transformers):
    hidden = residual + post_attention_layernorm(x)
then pre_feedforward_layernorm(hidden); with experts also the router's norm and scales, and pre_feedforward_layernorm_2.
All tensors are [..., H]; the weights are [H].
"""

from __future__ import annotations

from torch import Tensor

from gemma4_compile.ops.dependent import PLAIN, alone, ready, start
from gemma4_compile.ops.library import as_rows, expect, fresh, jit, op, pinned, tl
from gemma4_compile.ops.plans import row_plan
from gemma4_compile.ops.rms_norm import normalize
from gemma4_compile.ops.rows import (
    add_rows,
    chunk_size,
    inverse_rms,
    late_row,
    load_row,
    loads_together,
    norm_row,
    scale_row,
    store_row,
    times_row,
)

from .feed_forward_tail import launch_tail


def _check(op: str, x: Tensor, residual: Tensor, **others: Tensor | float) -> None:
    expect(op, "residual must have x's shape", residual.shape, x.shape, "pass the hidden state before attention")
    expect(op, "residual must have x's dtype", residual.dtype, x.dtype, "cast one of them")
    for weight in others.values():
        if isinstance(weight, Tensor):
            expect(op, "each weight must be [H] for x [..., H]", weight.shape, x.shape[-1:], "pass this layer's weights")


@jit
def finish_norms(
    x, residual, weight, feed_forward_weight, router_scale, expert_weight,
    weight_ptr, feed_forward_weight_ptr, router_scale_ptr, expert_weight_ptr,
    hidden_ptr, feed_forward_ptr, router_ptr, expert_ptr, router_root, row, WIDTH: tl.constexpr, CHUNK: tl.constexpr, eps,
):  # fmt: skip
    """A row from the inputs to all outputs. Weights None: read where they are used."""
    dtype = hidden_ptr.dtype.element_ty
    hidden = add_rows(residual, norm_row(x, weight, weight_ptr, WIDTH, CHUNK, eps))
    store_row(hidden_ptr + row * WIDTH, hidden, WIDTH, CHUNK)
    scale = inverse_rms(hidden, WIDTH, eps)  # one for all three norms
    feed_forward_weight = late_row(feed_forward_weight, feed_forward_weight_ptr, WIDTH, CHUNK)
    router_scale = late_row(router_scale, router_scale_ptr, WIDTH, CHUNK)
    expert_weight = late_row(expert_weight, expert_weight_ptr, WIDTH, CHUNK)
    store_row(feed_forward_ptr + row * WIDTH, scale_row(hidden, scale, feed_forward_weight, dtype), WIDTH, CHUNK)
    router = scale_row(scale_row(hidden, scale, None, dtype), 1.0, router_scale, dtype)
    store_row(router_ptr + row * WIDTH, times_row(router, router_root), WIDTH, CHUNK)
    store_row(expert_ptr + row * WIDTH, scale_row(hidden, scale, expert_weight, dtype), WIDTH, CHUNK)


@jit
def _post_attention_norms_kernel(
    x_ptr, residual_ptr, weight_ptr, feed_forward_weight_ptr, router_scale_ptr, expert_weight_ptr,
    hidden_ptr, feed_forward_ptr, router_ptr, expert_ptr, x_stride, residual_stride, router_root, eps,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, WEIGHTS_FIRST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    eps = pinned(eps)
    router_root = pinned(router_root)

    weight = load_row(weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST else None
    feed_forward_weight = load_row(feed_forward_weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST else None
    router_scale = load_row(router_scale_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST else None
    expert_weight = load_row(expert_weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST else None
    ready(DEPENDENT)
    x = load_row(x_ptr + row * x_stride, WIDTH, CHUNK)
    residual = load_row(residual_ptr + row * residual_stride, WIDTH, CHUNK)
    if DEPENDENT != PLAIN:  # a few rows of a chain, where each wait counts; elsewhere registers do
        x = loads_together(x, residual, x_stride < 0)
    finish_norms(
        x, residual, weight, feed_forward_weight, router_scale, expert_weight,
        weight_ptr, feed_forward_weight_ptr, router_scale_ptr, expert_weight_ptr,
        hidden_ptr, feed_forward_ptr, router_ptr, expert_ptr, router_root, row, WIDTH, CHUNK, eps,
    )  # fmt: skip


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, feed_forward_weight: Tensor, router_scale: Tensor, router_root: float,
    expert_weight: Tensor, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    outputs = fresh(x), fresh(x), fresh(x), fresh(x)
    if x.numel():
        x_rows, residual_rows = as_rows(x), as_rows(residual)
        rows, width = x_rows.shape
        warps, weights_first = row_plan(rows, width)
        norms = weight, feed_forward_weight, router_scale, expert_weight
        dependent, options = alone(*norms) if weights_first else alone()
        _post_attention_norms_kernel[(rows,)](
            x_rows, residual_rows, *(norm.contiguous() for norm in norms), *outputs, x_rows.stride(0), residual_rows.stride(0),
            router_root, eps, width, chunk_size(width, warps), weights_first, dependent, num_warps=warps, **options,
        )  # fmt: skip
    return outputs


@op(
    launch=lambda x, residual, weight, next_weight, eps: launch_tail(x, residual, weight, None, next_weight, eps),
    like=("x", "x"),
    check=_check,
    example=lambda d: (d.states(), d.states(), d.weight(), d.weight(), d.eps),
)
def post_attention_norm(x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """hidden = residual + norm(x, weight); normed = norm(hidden, next_weight).

    x, residual          [..., H]  fp32, fp16 or bf16
    weight, next_weight  [H]
    returns              hidden, normed  [..., H], contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    hidden = residual + normalize(x, weight, eps)
    return hidden, normalize(hidden, next_weight, eps)


@op(
    launch=_launch,
    like=("x", "x", "x", "x"),
    check=_check,
    example=lambda d: (
        d.states(), d.states(), d.weight(), d.weight(), d.weight(), d.sizes.hidden**-0.5, d.weight(), d.eps
    ),
)  # fmt: skip
def post_attention_norms(
    x: Tensor, residual: Tensor, weight: Tensor, feed_forward_weight: Tensor, router_scale: Tensor, router_root: float,
    expert_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """hidden = residual + norm(x, weight), and the three norms of it that a layer with experts reads.

    x, residual                                               [..., H]  fp32, fp16 or bf16
    weight, feed_forward_weight, router_scale, expert_weight  [H]
    router_root                                               H ** -0.5, as the router multiplies by it
    returns  hidden, feed_forward_in, router_in, expert_in    [..., H], contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    hidden = residual + normalize(x, weight, eps)
    router_in = normalize(hidden, None, eps) * router_scale * router_root
    return hidden, normalize(hidden, feed_forward_weight, eps), router_in, normalize(hidden, expert_weight, eps)
