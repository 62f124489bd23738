"""linear, linear_pair, linear_triple, gate_up: matrix products of few rows, those that share an input in one launch.

Source: the projections of Gemma4TextAttention and Gemma4TextMLP (transformers). A product is rounded once, to the input's
dtype; gate_up rounds where the MLP does: both products, then gelu, then their product.

A product of few rows reads its weights once and does little else, so what counts is how many bytes are under way at any
time. cuBLAS has too few programs for that where a matrix is small, or splits it and launches a second kernel for the sum.
Here each program holds whole rows of the weights: no sums between programs, so the result does not depend on their order.
Hopper has a kernel of its own (linear_hopper.py), for more rows and for long matrices, whose shares are summed in one order.
Where `product_plan` has no plan, as for many rows, the products are cuBLAS's own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.ops.dependent import alone, ready, start
from gemma4_compile.ops.library import as_rows, expect, gelu_tanh, jit, op, product, rounded, tl
from gemma4_compile.ops.plans import DotPlan, HopperProductsPlan, VectorPlan, product_plan

from .geglu import geglu, launch_geglu
from .linear_hopper import hopper_takes, launch_hopper_products


def check_matrices(op: str, x: Tensor, **weights: Tensor) -> None:
    for weight in weights.values():
        expect(op, "each weight must be [N, K] for [..., K]", weight.shape[1:], x.shape[-1:], "transpose it")
        expect(op, "each weight must have the input's dtype", weight.dtype, x.dtype, "cast one of them")


def check_gate_up(op: str, x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> None:
    check_matrices(op, x, gate_weight=gate_weight, up_weight=up_weight)
    expect(op, "up_weight must have gate_weight's shape", up_weight.shape, gate_weight.shape, "pass one MLP's weights")


@jit
def stacked_rows(first_rows, COUNT: tl.constexpr, GATED: tl.constexpr):
    """The program's rows of the stacked matrices. GATED: half of them of the first, and those of the second that meet them."""
    lane = tl.arange(0, COUNT)
    if GATED:
        row = tl.program_id(0) * (COUNT // 2) + lane % (COUNT // 2)
        return tl.where(row < first_rows, row + lane // (COUNT // 2) * first_rows, 2 * first_rows)
    return tl.program_id(0) * COUNT + lane


@jit
def _of_matrix(row, first_rows, second_rows, first, second, third):
    """The one of up to three values that belongs to the matrix in which a stacked row lies."""
    chosen = first
    if second is not None:
        chosen = tl.where(row < first_rows, first, second)
    if third is not None:
        chosen = tl.where(row < first_rows + second_rows, chosen, third)
    return chosen


@jit
def _row_of_matrix(row, first_rows, second_rows, second_ptr, third_ptr):
    """A stacked row's number within its own matrix."""
    second = None if second_ptr is None else first_rows
    third = None if third_ptr is None else first_rows + second_rows
    return row - _of_matrix(row, first_rows, second_rows, 0, second, third)


@jit
def gated_product(gate, up, dtype: tl.constexpr):
    return rounded(gelu_tanh(rounded(gate, dtype)), dtype) * rounded(up, dtype)


@jit
def load_weights(
    weight_ptr, present, begin, width,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of columns from begin on, [OUTPUTS, BLOCK] each: all loads before the first sum."""
    weights = ()
    for block in tl.static_range(BLOCKS):
        column = begin + block * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = present[:, None] if WHOLE else present[:, None] & (column < width)
        block_weights = tl.load(weight_ptr[:, None] + column, mask, other=0.0, eviction_policy="evict_first")
        weights = weights + (block_weights,)  # type: ignore[assignment]
    return weights


@jit
def add_products(sums, weights, x_ptr, x_stride, begin, width, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """sums, [OUTPUTS, BLOCK // 8] for each row of x, plus the products of the loaded columns."""
    # As wide as the weights: each warp then loads its own copy of x, and none goes through shared memory.
    lane = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (OUTPUTS, BLOCK))
    longer = ()
    for token in tl.static_range(len(sums)):
        total = sums[token]
        for block in tl.static_range(len(weights)):
            column = begin + block * BLOCK + lane
            x = tl.load(x_ptr + token * x_stride + column, None if WHOLE else column < width, None if WHOLE else 0.0)
            product = weights[block].to(tl.float32) * x.to(tl.float32)
            total += tl.sum(tl.reshape(product, (OUTPUTS, BLOCK // 8, 8)), axis=2)  # within a thread
        longer = longer + (total,)  # type: ignore[assignment]
    return longer


@jit
def rows_of_program(
    first_ptr, second_ptr, third_ptr, first_rows, second_rows, third_rows, width, OUTPUTS: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """The program's stacked rows: their numbers, those within their own matrices, which there are, and where each begins."""
    row = stacked_rows(first_rows, OUTPUTS, GATED)
    local = _row_of_matrix(row, first_rows, second_rows, second_ptr, third_ptr)
    present = row < first_rows + second_rows + third_rows
    weight_ptr = _of_matrix(row, first_rows, second_rows, first_ptr, second_ptr, third_ptr) + local.to(tl.int64) * width
    return row, local, present, weight_ptr


@jit
def store_products(
    total, token, row, local, present, first_out_ptr, second_out_ptr, third_out_ptr, first_rows, second_rows, third_rows,
    OUTPUTS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """A token's products with the program's rows, in fp32, to where they belong; GATED: gelu(gate) * up of them."""
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(total, (2, OUTPUTS // 2))))
        output = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        value = gated_product(gate, up, first_out_ptr.dtype.element_ty)
        tl.store(first_out_ptr + token * first_rows + output, value, output < first_rows)
    else:
        second = None if second_out_ptr is None else second_out_ptr + token * second_rows
        third = None if third_out_ptr is None else third_out_ptr + token * third_rows
        out_ptr = _of_matrix(row, first_rows, second_rows, first_out_ptr + token * first_rows, second, third)
        tl.store(out_ptr + local, total, present)


@jit
def _vector_kernel(
    x_ptr, first_ptr, second_ptr, third_ptr, first_out_ptr, second_out_ptr, third_out_ptr,
    first_rows, second_rows, third_rows, width, x_stride, TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
    GATED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """OUTPUTS rows of weights times TOKENS rows of x, in fp32 without tensor cores; BLOCKS loads of BLOCK columns at a time."""
    start(DEPENDENT)
    row, local, present, weight_ptr = rows_of_program(
        first_ptr, second_ptr, third_ptr, first_rows, second_rows, third_rows, width, OUTPUTS, GATED
    )
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros((OUTPUTS, BLOCK // 8), tl.float32),)  # type: ignore[assignment]
    for begin in range(0, width, BLOCK * BLOCKS):
        weights = load_weights(weight_ptr, present, begin, width, BLOCK, BLOCKS, WHOLE)
        ready(DEPENDENT)
        sums = add_products(sums, weights, x_ptr, x_stride, begin, width, OUTPUTS, BLOCK, WHOLE)

    for token in tl.static_range(TOKENS):
        store_products(
            tl.sum(sums[token], axis=1), token, row, local, present, first_out_ptr, second_out_ptr, third_out_ptr,
            first_rows, second_rows, third_rows, OUTPUTS, GATED,
        )  # fmt: skip


@jit(do_not_specialize=["tokens"])  # one compilation for all token counts
def _dot_kernel(
    x_ptr, first_ptr, second_ptr, third_ptr, first_out_ptr, second_out_ptr, third_out_ptr,
    first_rows, second_rows, third_rows, width, x_stride, tokens,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr, WHOLE: tl.constexpr,
    GATED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """As _vector_kernel, with tensor cores. SLICES > 1: each warp takes every SLICES-th block of columns of the same rows."""
    start(DEPENDENT)
    row, local, present, weight_ptr = rows_of_program(
        first_ptr, second_ptr, third_ptr, first_rows, second_rows, third_rows, width, OUTPUTS, GATED
    )
    token = tl.arange(0, TOKENS)

    if SLICES == 1:
        lane = tl.arange(0, BLOCK)
        total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
        for begin in range(0, width, BLOCK):
            column = begin + lane
            inside = column < (begin + BLOCK if WHOLE else width)
            weight = tl.load(weight_ptr[:, None] + column[None, :], present[:, None] & inside[None, :], other=0.0)
            x_ptrs = x_ptr + token[None, :] * x_stride + column[:, None]
            x = tl.load(x_ptrs, (token < tokens)[None, :] & inside[:, None], other=0.0)
            total = tl.dot(weight, x, total)
    else:
        lane = tl.arange(0, SLICES)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        sums = tl.zeros((SLICES, OUTPUTS, TOKENS), tl.float32)
        for begin in range(0, width, BLOCK * SLICES):
            column = begin + lane
            inside = column < (begin + BLOCK * SLICES if WHOLE else width)
            weight_ptrs = weight_ptr[None, :, None] + column[:, None, :]
            weight = tl.load(weight_ptrs, present[None, :, None] & inside[:, None, :], other=0.0)
            x_ptrs = x_ptr + token[None, None, :] * x_stride + column[:, :, None]
            x = tl.load(x_ptrs, (token < tokens)[None, None, :] & inside[:, :, None], other=0.0)
            sums = tl.dot(weight, x, sums)
        total = tl.sum(sums, axis=0)

    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, OUTPUTS // 2, TOKENS)), (1, 2, 0)))
        output = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        value = gated_product(gate, up, first_out_ptr.dtype.element_ty)
        mask = (output < first_rows)[:, None] & (token < tokens)[None, :]
        tl.store(first_out_ptr + token[None, :] * first_rows + output[:, None], value, mask)
    else:
        out_ptr = _of_matrix(row, first_rows, second_rows, first_out_ptr, second_out_ptr, third_out_ptr) + local
        second = None if second_out_ptr is None else second_rows
        third = None if third_out_ptr is None else third_rows
        step = _of_matrix(row, first_rows, second_rows, first_rows, second, third)
        tl.store(out_ptr[:, None] + token[None, :] * step[:, None], total, present[:, None] & (token < tokens)[None, :])


def _products(x: Tensor, weights: tuple[Tensor, ...], gated: bool = False) -> list[Tensor] | None:
    """x times each weight, or gelu(x * first) * (x * second), in one launch; None: cuBLAS is as fast, or has to do it."""
    if not (x.numel() and all(weight.numel() and weight.is_contiguous() for weight in weights)):
        return None
    outputs, width = sum(weight.shape[0] for weight in weights), x.shape[-1]
    rows = x.numel() // width
    hopper = 2 < rows <= 128 and hopper_takes(as_rows(x), weights)
    plan = product_plan(rows, len(weights), outputs, width, gated, x.element_size(), hopper)
    return None if plan is None else launch_products(x, weights, gated, plan)


def launch_products(
    x: Tensor, weights: tuple[Tensor, ...], gated: bool, plan: VectorPlan | DotPlan | HopperProductsPlan
) -> list[Tensor]:
    """The kernels by a given plan; there are rows, and the weights are contiguous."""
    inputs = as_rows(x)
    rows, width = inputs.shape
    counts = [weight.shape[0] for weight in weights]
    outputs = [x.new_empty((*x.shape[:-1], count)) for count in (counts[:1] if gated else counts)]
    if isinstance(plan, HopperProductsPlan):
        launch_hopper_products(inputs, weights, outputs, gated, plan)
        return outputs
    missing = 3 - len(weights)
    arguments = (
        inputs, *weights, *[None] * missing, *outputs, *[None] * (3 - len(outputs)), *counts, *[0] * missing, width,
        inputs.stride(0), rows,
    )  # fmt: skip
    grid = (-(-sum(counts) // plan.outputs),)
    if isinstance(plan, VectorPlan):
        whole = width % (plan.block * plan.blocks) == 0
        dependent, options = alone(*weights)
        _vector_kernel[grid](
            *arguments, plan.outputs, plan.block, plan.blocks, whole, gated, dependent, num_warps=plan.warps, **options
        )
    else:
        whole = width % (plan.block * plan.slices) == 0
        # Weights before the wait, in registers or asked into the L2 cache, gained nothing here (docs/fusions.md).
        dependent, options = alone()
        _dot_kernel[grid](
            *arguments, plan.tokens, plan.outputs, plan.block, plan.slices, whole, gated, dependent,
            num_warps=plan.warps, num_stages=plan.stages, **options,
        )  # fmt: skip
    return outputs


def launch_linear(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(_products(x, weights) or (product(x, weight) for weight in weights))


def launch_gate_up(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    if products := _products(x, (gate_weight, up_weight), gated=True):
        return products[0]
    if (both := merged(gate_weight, up_weight)) is not None:
        return launch_geglu(*product(x, both).chunk(2, dim=-1))
    return launch_geglu(product(x, gate_weight), product(x, up_weight))


def merged(first: Tensor, second: Tensor) -> Tensor | None:
    """The matrix whose halves these are, as other engines keep gate and up: one product then. None if they lie apart."""
    one_after_the_other = (
        first.shape == second.shape
        and first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and second.data_ptr() == first.data_ptr() + first.numel() * first.element_size()
    )
    return first.as_strided((2 * first.shape[0], first.shape[1]), first.stride()) if one_after_the_other else None


def _fake(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights)


@op(
    launch=lambda x, weight: launch_linear(x, weight)[0],
    fake=lambda x, weight: _fake(x, weight)[0],
    check=check_matrices,
    example=lambda d: d.projections(d.sizes.intermediate),
)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, summed in fp32.

    x        [..., K]  fp32, fp16 or bf16
    weight   [N, K]    x.dtype
    returns  [..., N]  x.dtype, contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    return F.linear(x, weight)


@op(launch=launch_linear, fake=_fake, check=check_matrices, example=lambda d: d.projections(d.q_width, d.kv_width))
def linear_pair(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """linear(x, first) and linear(x, second)."""
    return F.linear(x, first), F.linear(x, second)


@op(launch=launch_linear, fake=_fake, check=check_matrices, example=lambda d: d.projections(d.q_width, d.kv_width, d.kv_width))
def linear_triple(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """linear of x and each weight."""
    return F.linear(x, first), F.linear(x, second), F.linear(x, third)


@op(
    launch=launch_gate_up,
    fake=lambda x, gate_weight, up_weight: _fake(x, gate_weight)[0],
    check=check_gate_up,
    example=lambda d: d.projections(d.sizes.intermediate, d.sizes.intermediate),
)
def gate_up(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """geglu(linear(x, gate_weight), linear(x, up_weight)).

    x            [..., K]  fp32, fp16 or bf16
    gate_weight  [I, K]    x.dtype
    up_weight    [I, K]    x.dtype
    returns      [..., I]  x.dtype, contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    return geglu.reference(F.linear(x, gate_weight), F.linear(x, up_weight))
