"""ple_tail, ple_tail_norm: the per-layer input at the end of a layer, with its two small matrix products.

Source: Gemma4TextDecoderLayer.forward (transformers), the hidden_size_per_layer_input branch:
    y = per_layer_projection(gelu_tanh(per_layer_input_gate(hidden)) * per_layer_input)
    hidden = (hidden + post_per_layer_input_norm(y)) * layer_scalar
and, in the `_norm` form, the norm that reads the result next. hidden [..., H], per_layer_input [..., P].
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.ops.dependent import alone, behind, first, ready, start
from gemma4_compile.ops.examples import Draw
from gemma4_compile.ops.library import as_rows, expect, fresh, gelu_tanh, jit, op, power_of_two, product, rounded, tl
from gemma4_compile.ops.plans import PleDotPlan, PlePlan, ple_plan
from gemma4_compile.ops.rms_norm import normalize

from .feed_forward_tail import launch_tail, scale_by
from .ple_dot import launch_ple_dots


def check_ple(
    op: str, hidden: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor,
    norm_weight: Tensor | None = None, next_weight: Tensor | None = None,
) -> None:  # fmt: skip
    h, p = hidden.shape[-1], per_layer_input.shape[-1]
    tokens, given = hidden.shape[:-1], per_layer_input.shape[:-1]
    expect(op, "per_layer_input must be [..., P] for hidden [..., H]", given, tokens, "pass this layer's slice")
    expect(op, "per_layer_input must have hidden's dtype", per_layer_input.dtype, hidden.dtype, "cast it")
    expect(op, "gate_weight must be [P, H]", gate_weight.shape, (p, h), "pass per_layer_input_gate.weight")
    expect(op, "projection_weight must be [H, P]", projection_weight.shape, (h, p), "pass per_layer_projection.weight")
    for weight in (norm_weight, next_weight):
        if weight is not None:
            expect(op, "each norm weight must be [H]", weight.shape, (h,), "pass this layer's weights")


@jit(do_not_specialize=["rows"])  # one compilation for all token counts
def _gate_kernel(
    hidden_ptr, input_ptr, weight_ptr, gated_ptr, rows, hidden_stride, input_stride,
    WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """gated[t, p] = gelu(hidden[t] . weight[p]) * input[t, p] for TOKENS values of t and OUTPUTS of p."""
    start(DEPENDENT)
    dtype = gated_ptr.dtype.element_ty
    first = tl.program_id(1) * TOKENS
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    mine = output < P

    weights = ()
    for chunk in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        column = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = mine[:, None] & (column < WIDTH)
        weights = weights + (tl.load(weight_ptr + output[:, None] * WIDTH + column, inside, other=0.0),)  # type: ignore[assignment]
    ready(DEPENDENT)
    for i in tl.static_range(TOKENS):
        token = (first + i).to(tl.int64)
        present = token < rows
        per_layer = tl.load(input_ptr + token * input_stride + output, present & mine, other=0.0).to(tl.float32)
        total = tl.zeros((OUTPUTS, BLOCK), tl.float32)
        for chunk in tl.static_range(len(weights)):
            # As wide as the weights: each warp then loads its own copy, and none goes through shared memory.
            column = tl.broadcast_to(chunk * BLOCK + tl.arange(0, BLOCK)[None, :], (OUTPUTS, BLOCK))
            hidden = tl.load(hidden_ptr + token * hidden_stride + column, present & (column < WIDTH), other=0.0)
            total += weights[chunk].to(tl.float32) * hidden.to(tl.float32)
        gate = rounded(tl.sum(total, axis=1), dtype)
        tl.store(gated_ptr + token * P + output, rounded(gelu_tanh(gate), dtype) * per_layer, present & mine)


@jit(do_not_specialize=["rows"])  # one compilation for all token counts
def _projection_kernel(
    gated_ptr, weight_ptr, projected_ptr, rows,
    WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """projected[t] = gated[t] @ weight.T for TOKENS values of t, OUTPUTS columns a program."""
    start(DEPENDENT)
    first = tl.program_id(1) * TOKENS
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    p = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (OUTPUTS, BLOCK))
    mine = output < WIDTH

    weight = tl.load(weight_ptr + output[:, None] * P + p, mine[:, None] & (p < P), other=0.0).to(tl.float32)
    ready(DEPENDENT)
    for i in tl.static_range(TOKENS):
        token = (first + i).to(tl.int64)
        present = token < rows
        gated = tl.load(gated_ptr + token * P + p, present & (p < P), other=0.0).to(tl.float32)
        tl.store(projected_ptr + token * WIDTH + output, tl.sum(weight * gated, axis=1), present & mine)


@jit
def _gelu_times_kernel(
    gate_ptr, input_ptr, out_ptr, count, input_stride, P: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    start(DEPENDENT)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count

    gate = tl.load(gate_ptr + index, inside, other=0.0).to(tl.float32)
    per_layer = tl.load(input_ptr + (index // P) * input_stride + index % P, inside, other=0.0).to(tl.float32)

    tl.store(out_ptr + index, rounded(gelu_tanh(gate), out_ptr.dtype.element_ty) * per_layer, inside)


def _launch(
    hidden: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor, norm_weight: Tensor,
    layer_scalar: Tensor | None, next_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if not hidden.numel():
        return fresh(hidden), None if next_weight is None else fresh(hidden)
    hiddens, inputs = as_rows(hidden), as_rows(per_layer_input)
    projected, last = launch_ple_products(hiddens, inputs, gate_weight, projection_weight)
    hidden = hiddens.view(hidden.shape)  # a copy of strided rows was made before the products; the tail must not make another
    return launch_tail(projected.view(hidden.shape), hidden, norm_weight, layer_scalar, next_weight, eps, last=last)


def launch_ple_products(hidden: Tensor, inputs: Tensor, gate_weight: Tensor, projection_weight: Tensor) -> tuple[Tensor, bool]:
    """Both matrix products of some rows, and whether a kernel of ours came last."""
    (rows, width), p = hidden.shape, inputs.shape[1]
    plan = ple_plan(rows, width, p, hidden.element_size())
    return launch_planned(hidden, inputs, gate_weight, projection_weight, plan), plan is not None


def launch_planned(
    hidden: Tensor, inputs: Tensor, gate_weight: Tensor, projection_weight: Tensor, plan: PlePlan | PleDotPlan | None
) -> Tensor:
    """Both by a given plan."""
    if plan is None:
        return _project_many(hidden, inputs, gate_weight, projection_weight)
    if isinstance(plan, PleDotPlan):
        return launch_ple_dots(hidden, inputs, gate_weight, projection_weight, plan)
    return _project_few(hidden, inputs, gate_weight, projection_weight, plan)


def _project_many(hidden: Tensor, inputs: Tensor, gate_weight: Tensor, projection_weight: Tensor) -> Tensor:
    """Both matrix products by cuBLAS."""
    gate = product(hidden, gate_weight)
    gated = fresh(gate)
    dependent, options = alone()
    _gelu_times_kernel[(-(-gate.numel() // 1024),)](
        gate, inputs, gated, gate.numel(), inputs.stride(0), inputs.shape[1], 1024, dependent, num_warps=4, **options
    )
    return product(gated, projection_weight)


def _project_few(hidden: Tensor, inputs: Tensor, gate_weight: Tensor, projection_weight: Tensor, plan: PlePlan) -> Tensor:
    """Both matrix products here: cuBLAS has too few programs for a handful of tokens, and a launch more."""
    return launch_projection(launch_gate(hidden, inputs, gate_weight, plan), projection_weight, plan)


def launch_gate(hidden: Tensor, inputs: Tensor, gate_weight: Tensor, plan: PlePlan) -> Tensor:
    """The first product, and what is done with it."""
    (rows, width), p = hidden.shape, inputs.shape[1]
    gated = hidden.new_empty((rows, p))
    groups, (dependent, options) = -(-rows // plan.tokens), first(gate_weight)
    _gate_kernel[(-(-p // plan.gate_outputs), groups)](
        hidden, inputs, gate_weight.contiguous(), gated, rows, hidden.stride(0), inputs.stride(0),
        width, p, plan.gate_block, plan.gate_outputs, plan.tokens, dependent, num_warps=plan.gate_warps,
        **options,
    )  # fmt: skip
    return gated


def launch_projection(gated: Tensor, projection_weight: Tensor, plan: PlePlan) -> Tensor:
    """The second product, behind the kernel of the first."""
    (rows, p), width = gated.shape, projection_weight.shape[0]
    projected, groups = gated.new_empty((rows, width)), -(-rows // plan.tokens)
    dependent, options = behind(projection_weight)
    _projection_kernel[(-(-width // plan.outputs), groups)](
        gated, projection_weight.contiguous(), projected, rows, width, p, power_of_two(p), plan.outputs, plan.tokens, dependent,
        num_warps=plan.warps, **options,
    )  # fmt: skip
    return projected


def _example(d: Draw) -> tuple[Any, ...]:
    s = d.sizes
    slices = d.normal(d.batch, d.tokens, 3, s.ple)[:, :, 1, :]
    return d.states(), slices, d.matrix(s.ple, s.hidden), d.matrix(s.hidden, s.ple), d.weight(), d.scalar()


@op(
    launch=lambda hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, eps: _launch(
        hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, None, eps
    )[0],
    like="hidden",
    check=check_ple,
    example=lambda d: (*_example(d), d.eps),
)
def ple_tail(
    hidden: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor, norm_weight: Tensor,
    layer_scalar: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """(hidden + norm(linear(gelu_tanh(linear(hidden, gate)) * per_layer_input, projection), norm)) [* layer_scalar].

    hidden             [..., H]  fp32, fp16 or bf16
    per_layer_input    [..., P]  hidden's dtype, any strides: a slice [:, :, i, :] is read in place
    gate_weight        [P, H]
    projection_weight  [H, P]
    norm_weight        [H]
    layer_scalar       [1] or None
    returns            [..., H], contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    gated = F.gelu(F.linear(hidden, gate_weight), approximate="tanh") * per_layer_input
    return scale_by(hidden + normalize(F.linear(gated, projection_weight), norm_weight, eps), layer_scalar)


@op(
    launch=_launch,
    like=("hidden", "hidden"),
    check=check_ple,
    example=lambda d: (*_example(d), d.weight(), d.eps),
)
def ple_tail_norm(
    hidden: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor, norm_weight: Tensor,
    layer_scalar: Tensor | None, next_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden as ple_tail gives it, and normed = norm(hidden, next_weight).

    next_weight  [H], the norm that reads hidden next
    returns      hidden, normed  [..., H], contiguous
    """
    hidden = ple_tail.reference(hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, eps)
    return hidden, normalize(hidden, next_weight, eps)
