"""norm_gate_up, norm_linear, norm_linear_pair, norm_linear_triple: the norm before a block and the block's first products.

Source: Gemma4TextDecoderLayer.forward (transformers), the new hidden state between two blocks and what reads it next:
    hidden = (residual + norm(x)) [* layer_scalar]
    products of norm(hidden): gate and up behind attention; q, k and v behind the layer before.
x, residual [..., H]; norm weights [H].

A norm of one row is a kernel that does nothing but wait: for its start, for the row, for two sums over it. Each program of a
product waits for the row anyway. Here every program has its weights under way when the row comes, norms it as
post_attention_norm does and goes on; the first one writes the new hidden state. All programs do the same few operations for
that, so it pays for a row or two and widths of some thousand: elsewhere, by `norm_products_plan`, the kernels are the norm's
and the product's, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.ops.dependent import alone, ready, start
from gemma4_compile.ops.examples import Draw
from gemma4_compile.ops.library import as_rows, fresh, jit, op, pinned, tl
from gemma4_compile.ops.plans import VectorPlan, norm_products_plan
from gemma4_compile.ops.rms_norm import normalize
from gemma4_compile.ops.rows import load_row, loads_together, new_state, norm_row, store_row

from .feed_forward_tail import check_tail, feed_forward_tail, launch_tail
from .linear import (
    check_gate_up,
    check_matrices,
    gate_up,
    launch_gate_up,
    launch_linear,
    load_weights,
    rows_of_program,
    store_products,
)


@jit
def _norm_vector_kernel(
    x_ptr, residual_ptr, weight_ptr, scalar_ptr, next_weight_ptr, hidden_ptr,
    first_ptr, second_ptr, third_ptr, first_out_ptr, second_out_ptr, third_out_ptr,
    first_rows, second_rows, third_rows, x_stride, residual_stride, eps, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """OUTPUTS rows of weights times the norms of TOKENS new rows of hidden; BLOCKS loads of BLOCK columns at a time."""
    start(DEPENDENT)
    row, local, present, matrix_ptr = rows_of_program(
        first_ptr, second_ptr, third_ptr, first_rows, second_rows, third_rows, WIDTH, OUTPUTS, GATED
    )
    eps = pinned(eps)

    matrix = load_weights(matrix_ptr, present, 0, WIDTH, BLOCK, BLOCKS, WIDTH % (BLOCK * BLOCKS) == 0)
    weight = load_row(weight_ptr, WIDTH, BLOCK)
    next_weight = load_row(next_weight_ptr, WIDTH, BLOCK)
    scalar = tl.load(scalar_ptr).to(tl.float32) if scalar_ptr is not None else None
    ready(DEPENDENT)
    given, residuals = (), ()
    for token in tl.static_range(TOKENS):
        given = given + (load_row(x_ptr + token * x_stride, WIDTH, BLOCK),)  # type: ignore[assignment]
        residuals = residuals + (load_row(residual_ptr + token * residual_stride, WIDTH, BLOCK),)  # type: ignore[assignment]

    normed, sums = (), ()
    for token in tl.static_range(TOKENS):
        x = loads_together(given[token], residuals[token], x_stride < 0)
        hidden = new_state(x, residuals[token], weight, scalar, WIDTH, BLOCK, eps)
        if tl.program_id(0) == 0:
            store_row(hidden_ptr + token * WIDTH, hidden, WIDTH, BLOCK)
        normed = normed + (norm_row(hidden, next_weight, None, WIDTH, BLOCK, eps),)  # type: ignore[assignment]
        sums = sums + (tl.zeros((OUTPUTS, BLOCK // 8), tl.float32),)  # type: ignore[assignment]
    for group in tl.static_range((WIDTH + BLOCK * BLOCKS - 1) // (BLOCK * BLOCKS)):
        if group > 0:
            matrix = load_weights(
                matrix_ptr, present, group * BLOCK * BLOCKS, WIDTH, BLOCK, BLOCKS, WIDTH % (BLOCK * BLOCKS) == 0
            )
        sums = _add_normed(sums, matrix, normed, group * BLOCKS, OUTPUTS, BLOCK)

    for token in tl.static_range(TOKENS):
        store_products(
            tl.sum(sums[token], axis=1), token, row, local, present, first_out_ptr, second_out_ptr, third_out_ptr,
            first_rows, second_rows, third_rows, OUTPUTS, GATED,
        )  # fmt: skip


@jit
def _add_normed(sums, matrix, normed, FIRST: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """sums, [OUTPUTS, BLOCK // 8] for each token, plus the products of the loaded columns, from block FIRST on."""
    longer = ()
    for token in tl.static_range(len(sums)):
        total = sums[token]
        for block in tl.static_range(len(matrix)):
            if FIRST + block < len(normed[token]):  # the last group may reach past the row's end
                x = normed[token][FIRST + block].to(tl.float32)[None, :]
                product = matrix[block].to(tl.float32) * x
                total += tl.sum(tl.reshape(product, (OUTPUTS, BLOCK // 8, 8)), axis=2)  # within a thread
        longer = longer + (total,)  # type: ignore[assignment]
    return longer


def launch_norm_products(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, matrices: tuple[Tensor, ...],
    eps: float, gated: bool, plan: VectorPlan,
) -> tuple[Tensor, ...]:  # fmt: skip
    """hidden and the products by a given plan; there are rows, and the matrices are contiguous."""
    inputs, residuals, hidden = as_rows(x), as_rows(residual), fresh(residual)
    rows, width = inputs.shape
    counts = [matrix.shape[0] for matrix in matrices]
    outputs = [x.new_empty((*x.shape[:-1], count)) for count in (counts[:1] if gated else counts)]
    missing = 3 - len(matrices)
    dependent, options = alone(weight, next_weight, layer_scalar, *matrices)
    _norm_vector_kernel[(-(-sum(counts) // plan.outputs),)](
        inputs, residuals, weight.contiguous(), layer_scalar, next_weight.contiguous(), hidden,
        *matrices, *[None] * missing, *outputs, *[None] * (3 - len(outputs)), *counts, *[0] * missing,
        inputs.stride(0), residuals.stride(0), eps, rows, width, plan.outputs, plan.block, plan.blocks, gated, dependent,
        num_warps=plan.warps, **options,
    )  # fmt: skip
    return hidden, *outputs


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, matrices: tuple[Tensor, ...],
    eps: float, gated: bool, plan: VectorPlan | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """plan None: by the number of rows, one kernel or the norm's and the products'."""
    if plan is None and x.numel() and all(matrix.numel() and matrix.is_contiguous() for matrix in matrices):
        width = x.shape[-1]
        plan = norm_products_plan(x.numel() // width, sum(matrix.shape[0] for matrix in matrices), width, gated)
    if plan is not None:
        return launch_norm_products(x, residual, weight, layer_scalar, next_weight, matrices, eps, gated, plan)
    hidden, normed = launch_tail(x, residual, weight, layer_scalar, next_weight, eps)
    assert normed is not None  # there is a next norm
    return hidden, *((launch_gate_up(normed, *matrices),) if gated else launch_linear(normed, *matrices))


def _check_gate_up(
    op: str, x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, gate_weight: Tensor, up_weight: Tensor
) -> None:
    check_tail(op, x, residual, None, weight=weight, next_weight=next_weight)
    check_gate_up(op, x, gate_weight, up_weight)


def _check(
    op: str, x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor,
    **matrices: Tensor | float,
) -> None:  # fmt: skip
    check_tail(op, x, residual, layer_scalar, weight=weight, next_weight=next_weight)
    check_matrices(op, x, **{name: matrix for name, matrix in matrices.items() if isinstance(matrix, Tensor)})


def _fake(x: Tensor, residual: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
    return fresh(residual), *(x.new_empty((*x.shape[:-1], matrix.shape[0])) for matrix in matrices)


def _example(d: Draw, *counts: int) -> tuple[Any, ...]:
    x, *matrices = d.projections(*counts)
    return x, d.states(), d.weight(), d.scalar(), d.weight(), *matrices, d.eps


def _gate_up_example(d: Draw) -> tuple[Any, ...]:
    x, residual, weight, _, *rest = _example(d, d.sizes.intermediate, d.sizes.intermediate)
    return x, residual, weight, *rest


@op(
    launch=lambda x, residual, weight, next_weight, gate_weight, up_weight, eps, plan=None: _launch(
        x, residual, weight, None, next_weight, (gate_weight, up_weight), eps, True, plan
    ),
    fake=lambda x, residual, weight, next_weight, gate_weight, up_weight, eps: _fake(x, residual, gate_weight),
    check=_check_gate_up,
    example=_gate_up_example,
)
def norm_gate_up(
    x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, gate_weight: Tensor, up_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden = residual + norm(x, weight); gated = gate_up(norm(hidden, next_weight), gate_weight, up_weight).

    x, residual             [..., H]  fp32, fp16 or bf16
    weight, next_weight     [H]
    gate_weight, up_weight  [I, H]    x.dtype
    returns                 hidden [..., H], gated [..., I], contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    hidden = residual + normalize(x, weight, eps)
    return hidden, gate_up.reference(normalize(hidden, next_weight, eps), gate_weight, up_weight)


def _launch_linear(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, *matrices_and_eps: Any,
    plan: VectorPlan | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    *matrices, eps = matrices_and_eps
    return _launch(x, residual, weight, layer_scalar, next_weight, tuple(matrices), eps, False, plan)


def _fake_linear(x: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _fake(x, residual, *others[3:-1])


@op(launch=_launch_linear, fake=_fake_linear, check=_check, example=lambda d: _example(d, d.q_width))
def norm_linear(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, first: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden = (residual + norm(x, weight)) [* layer_scalar]; linear(norm(hidden, next_weight), first).

    x, residual          [..., H]  fp32, fp16 or bf16
    weight, next_weight  [H]
    layer_scalar         [1] or None
    first                [N, H]    x.dtype
    returns              hidden [..., H], product [..., N], contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    hidden = feed_forward_tail.reference(x, residual, weight, layer_scalar, eps)
    return hidden, F.linear(normalize(hidden, next_weight, eps), first)


@op(launch=_launch_linear, fake=_fake_linear, check=_check, example=lambda d: _example(d, d.q_width, d.kv_width))
def norm_linear_pair(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, first: Tensor,
    second: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """norm_linear with two matrices: hidden, and both products."""
    hidden = feed_forward_tail.reference(x, residual, weight, layer_scalar, eps)
    normed = normalize(hidden, next_weight, eps)
    return hidden, F.linear(normed, first), F.linear(normed, second)


@op(launch=_launch_linear, fake=_fake_linear, check=_check, example=lambda d: _example(d, d.q_width, d.kv_width, d.kv_width))
def norm_linear_triple(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor | None, next_weight: Tensor, first: Tensor,
    second: Tensor, third: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """norm_linear with three matrices: hidden, and their products."""
    hidden = feed_forward_tail.reference(x, residual, weight, layer_scalar, eps)
    normed = normalize(hidden, next_weight, eps)
    return hidden, F.linear(normed, first), F.linear(normed, second), F.linear(normed, third)
