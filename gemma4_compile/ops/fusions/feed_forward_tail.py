"""feed_forward_tail[_norm], moe_feed_forward_tail[_norm]: from the feed-forward output to the next layer's input.

Source: Gemma4TextDecoderLayer.forward (transformers):
    y = mlp(...)                                                      dense layers
    y = post_feedforward_layernorm_1(mlp) + post_feedforward_layernorm_2(experts)    layers with experts
    hidden = (residual + post_feedforward_layernorm(y)) * layer_scalar
and, in the `_norm` forms, the input_layernorm of the next layer (or the final norm) over that. Layers with per-layer
inputs have no scalar here: theirs comes in ple_tail. All tensors are [..., H]; the weights are [H].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gemma4_compile.ops.dependent import PLAIN, alone, behind, ready, start
from gemma4_compile.ops.examples import Draw
from gemma4_compile.ops.library import as_rows, expect, fresh, jit, op, pinned, tl
from gemma4_compile.ops.plans import row_plan
from gemma4_compile.ops.rms_norm import normalize
from gemma4_compile.ops.rows import add_rows, chunk_size, load_row, loads_together, norm_row, store_row, times_row


def scale_by(hidden: Tensor, layer_scalar: Tensor | None) -> Tensor:
    """`hidden_states *= self.layer_scalar`: the product keeps hidden's dtype."""
    return hidden if layer_scalar is None else (hidden * layer_scalar).to(hidden.dtype)


def check_tail(op: str, x: Tensor, residual: Tensor, layer_scalar: Tensor | None, **others: Tensor | float) -> None:
    expect(op, "residual must have the input's shape", residual.shape, x.shape, "pass the state before the block")
    expect(op, "residual must have the input's dtype", residual.dtype, x.dtype, "cast one of them")
    for weight in others.values():
        if isinstance(weight, Tensor):
            expect(op, "each weight must be [H] for [..., H]", weight.shape, x.shape[-1:], "pass this layer's weights")
    if layer_scalar is not None:
        expect(op, "layer_scalar must be one number", layer_scalar.numel(), 1, "pass the layer's buffer, or None")


def _check_moe(
    op: str, dense: Tensor, experts: Tensor, residual: Tensor, layer_scalar: Tensor | None, **others: Tensor | float
) -> None:
    check_tail(op, dense, residual, layer_scalar, **others)
    expect(
        op,
        "experts must be [..., H] with as many elements as residual",
        (experts.numel(), experts.shape[-1]),
        (residual.numel(), residual.shape[-1]),
        "pass the experts' output for the same tokens",
    )
    expect(op, "experts must have residual's dtype", experts.dtype, residual.dtype, "cast one of them")


@jit
def finish_tail(
    x, experts, residual, weight, dense_weight, expert_weight, next_weight,
    weight_ptr, dense_weight_ptr, expert_weight_ptr, next_weight_ptr, scalar, hidden_ptr, normed_ptr,
    row, WIDTH: tl.constexpr, CHUNK: tl.constexpr, eps,
):  # fmt: skip
    """A row from the inputs to both outputs. Residual None: the norm alone; weights None: read where they are used."""
    if experts is not None:
        x = norm_row(x, dense_weight, dense_weight_ptr, WIDTH, CHUNK, eps)
        x = add_rows(x, norm_row(experts, expert_weight, expert_weight_ptr, WIDTH, CHUNK, eps))
    hidden = norm_row(x, weight, weight_ptr, WIDTH, CHUNK, eps)
    if residual is not None:
        hidden = add_rows(residual, hidden)
    if scalar is not None:
        hidden = times_row(hidden, scalar)
    store_row(hidden_ptr + row * WIDTH, hidden, WIDTH, CHUNK)
    if next_weight_ptr is not None:
        normed = norm_row(hidden, next_weight, next_weight_ptr, WIDTH, CHUNK, eps)
        store_row(normed_ptr + row * WIDTH, normed, WIDTH, CHUNK)


@jit
def _tail_kernel(
    x_ptr, experts_ptr, residual_ptr, dense_weight_ptr, expert_weight_ptr, weight_ptr, scalar_ptr, next_weight_ptr,
    hidden_ptr, normed_ptr, x_stride, experts_stride, residual_stride, eps,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, WEIGHTS_FIRST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    eps = pinned(eps)
    experts = None

    scalar = tl.load(scalar_ptr).to(tl.float32) if scalar_ptr is not None else None
    weight = load_row(weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST else None
    dense_weight = load_row(dense_weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST and dense_weight_ptr is not None else None
    expert_weight = load_row(expert_weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST and expert_weight_ptr is not None else None
    next_weight = load_row(next_weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST and next_weight_ptr is not None else None
    ready(DEPENDENT)
    x = load_row(x_ptr + row * x_stride, WIDTH, CHUNK)
    if experts_ptr is not None:
        experts = load_row(experts_ptr + row * experts_stride, WIDTH, CHUNK)
    residual = load_row(residual_ptr + row * residual_stride, WIDTH, CHUNK)
    if DEPENDENT != PLAIN:  # a few rows of a chain, where each wait counts; elsewhere registers do
        x = loads_together(x, residual, x_stride < 0)
        if experts_ptr is not None:
            x = loads_together(x, experts, x_stride < 0)
    finish_tail(
        x, experts, residual, weight, dense_weight, expert_weight, next_weight,
        weight_ptr, dense_weight_ptr, expert_weight_ptr, next_weight_ptr, scalar, hidden_ptr, normed_ptr,
        row, WIDTH, CHUNK, eps,
    )  # fmt: skip


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
    last: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The one launcher of every chain that ends in residual + norm [* scalar] [, next norm]; arguments are checked.

    last: x is the output of another kernel of the op.
    """
    hidden = fresh(residual)
    normed = None if next_weight is None else fresh(residual)
    if hidden.numel():
        x_rows, residual_rows = as_rows(x), as_rows(residual)
        expert_rows = None if experts is None else as_rows(experts)
        rows, width = x_rows.shape
        warps, weights_first = row_plan(rows, width)
        early = (weight, dense_weight, expert_weight, next_weight, layer_scalar) if weights_first else ()
        dependent, options = behind(*early) if last else alone(*early)
        weights = (t if t is None else t.contiguous() for t in (dense_weight, expert_weight, weight))
        _tail_kernel[(rows,)](
            x_rows, expert_rows, residual_rows, *weights, layer_scalar,
            next_weight if next_weight is None else next_weight.contiguous(), hidden, normed,
            x_rows.stride(0), 0 if expert_rows is None else expert_rows.stride(0), residual_rows.stride(0), eps,
            width, chunk_size(width, warps), weights_first, dependent, num_warps=warps, **options,
        )  # fmt: skip
    return hidden, normed


@op(
    launch=lambda x, residual, weight, layer_scalar, eps: launch_tail(x, residual, weight, layer_scalar, None, eps)[0],
    like="residual",
    check=check_tail,
    example=lambda d: (d.states(), d.states(), d.weight(), None, d.eps),
)
def feed_forward_tail(x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, eps: float) -> Tensor:
    """(residual + norm(x, weight)) [* layer_scalar].

    x, residual   [..., H]  fp32, fp16 or bf16
    weight        [H]
    layer_scalar  [1] or None
    returns       [..., H], contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    return scale_by(residual + normalize(x, weight, eps), layer_scalar)


@op(
    launch=launch_tail,
    like=("residual", "residual"),
    check=check_tail,
    example=lambda d: (d.states(), d.states(), d.weight(), d.scalar(), d.weight(), d.eps),
)
def feed_forward_tail_norm(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden as feed_forward_tail gives it, and normed = norm(hidden, next_weight).

    next_weight  [H], the norm that reads hidden next
    returns      hidden, normed  [..., H], contiguous
    """
    hidden = feed_forward_tail.reference(x, residual, weight, layer_scalar, eps)
    return hidden, normalize(hidden, next_weight, eps)


def _moe_example(d: Draw) -> tuple[Any, ...]:
    return d.states(), d.flat(d.sizes.hidden), d.states(), d.weight(), d.weight(), d.weight(), d.scalar()


@op(
    launch=lambda dense, experts, residual, dense_weight, expert_weight, weight, layer_scalar, eps: launch_tail(
        dense, residual, weight, layer_scalar, None, eps, experts, dense_weight, expert_weight
    )[0],
    like="residual",
    check=_check_moe,
    example=lambda d: (*_moe_example(d), d.eps),
)
def moe_feed_forward_tail(
    dense: Tensor, experts: Tensor, residual: Tensor, dense_weight: Tensor, expert_weight: Tensor, weight: Tensor,
    layer_scalar: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """(residual + norm(norm(dense, dense_weight) + norm(experts, expert_weight), weight)) [* layer_scalar].

    dense, residual                      [..., H]  fp32, fp16 or bf16
    experts                              [..., H] or [tokens, H], as many elements as residual
    dense_weight, expert_weight, weight  [H]
    layer_scalar                         [1] or None
    returns                              residual's shape, contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    joined = normalize(dense, dense_weight, eps) + normalize(experts.reshape(residual.shape), expert_weight, eps)
    return scale_by(residual + normalize(joined, weight, eps), layer_scalar)


@op(
    launch=lambda dense, experts, residual, dense_weight, expert_weight, weight, layer_scalar, next_weight, eps: launch_tail(
        dense, residual, weight, layer_scalar, next_weight, eps, experts, dense_weight, expert_weight
    ),
    like=("residual", "residual"),
    check=_check_moe,
    example=lambda d: (*_moe_example(d), d.weight(), d.eps),
)
def moe_feed_forward_tail_norm(
    dense: Tensor, experts: Tensor, residual: Tensor, dense_weight: Tensor, expert_weight: Tensor, weight: Tensor,
    layer_scalar: Tensor | None, next_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden as moe_feed_forward_tail gives it, and normed = norm(hidden, next_weight).

    next_weight  [H], the norm that reads hidden next
    returns      hidden, normed  residual's shape, contiguous
    """
    hidden = moe_feed_forward_tail.reference(dense, experts, residual, dense_weight, expert_weight, weight, layer_scalar, eps)
    return hidden, normalize(hidden, next_weight, eps)
