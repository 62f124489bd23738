"""norm_ple: the end of the feed-forward block and the two small products of the PLE block behind it.

Source: Gemma4TextDecoderLayer.forward (transformers):
    hidden = residual + post_feedforward_layernorm(x)
    projected = per_layer_projection(gelu_tanh(per_layer_input_gate(hidden)) * per_layer_input)
What comes behind is feed_forward_tail of `projected`: norm, residual, layer scalar, next norm.

For few rows each program of the gate's product norms its row itself while its weights arrive (norm_linear.py says why).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.ops.dependent import first, ready, start
from gemma4_compile.ops.examples import Draw
from gemma4_compile.ops.library import as_rows, fresh, gelu_tanh, jit, op, pinned, rounded, tl
from gemma4_compile.ops.plans import PlePlan, norm_ple_plan
from gemma4_compile.ops.rms_norm import normalize
from gemma4_compile.ops.rows import load_row, loads_together, new_state, store_row

from .feed_forward_tail import check_tail, launch_tail
from .ple_tail import check_ple, launch_ple_products, launch_projection


@jit
def _norm_gate_kernel(
    x_ptr, residual_ptr, weight_ptr, input_ptr, gate_ptr, hidden_ptr, gated_ptr, x_stride, residual_stride, input_stride, eps,
    WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """hidden[t] = residual[t] + norm(x[t]); gated[t, p] = gelu(hidden[t] . gate[p]) * input[t, p] for OUTPUTS values of p."""
    start(DEPENDENT)
    dtype = gated_ptr.dtype.element_ty
    token = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    eps = pinned(eps)

    gates = ()
    for chunk in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        column = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (output < P)[:, None] & (column < WIDTH)
        gates = gates + (tl.load(gate_ptr + output[:, None] * WIDTH + column, inside, other=0.0),)  # type: ignore[assignment]
    weight = load_row(weight_ptr, WIDTH, BLOCK)
    ready(DEPENDENT)
    x = load_row(x_ptr + token * x_stride, WIDTH, BLOCK)
    residual = load_row(residual_ptr + token * residual_stride, WIDTH, BLOCK)
    per_layer = tl.load(input_ptr + token * input_stride + output, output < P, other=0.0).to(tl.float32)

    hidden = new_state(loads_together(x, residual, x_stride < 0), residual, weight, None, WIDTH, BLOCK, eps)
    if tl.program_id(0) == 0:
        store_row(hidden_ptr + token * WIDTH, hidden, WIDTH, BLOCK)
    total = tl.zeros((OUTPUTS, BLOCK), tl.float32)
    for chunk in tl.static_range(len(gates)):
        total += gates[chunk].to(tl.float32) * hidden[chunk].to(tl.float32)[None, :]

    gate = rounded(tl.sum(total, axis=1), dtype)
    tl.store(gated_ptr + token * P + output, rounded(gelu_tanh(gate), dtype) * per_layer, output < P)


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not x.numel():
        return fresh(x), fresh(x)
    inputs, per_layer = as_rows(x), as_rows(per_layer_input)
    plan = norm_ple_plan(*inputs.shape)
    if plan is not None:
        return _launch_few(x, residual, weight, per_layer, gate_weight, projection_weight, eps, plan)
    hidden, _ = launch_tail(x, residual, weight, None, None, eps)
    projected, _ = launch_ple_products(as_rows(hidden), per_layer, gate_weight, projection_weight)
    return hidden, projected.view(x.shape)


def _launch_few(
    x: Tensor, residual: Tensor, weight: Tensor, per_layer: Tensor, gate_weight: Tensor, projection_weight: Tensor,
    eps: float, plan: PlePlan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs, residuals, hidden = as_rows(x), as_rows(residual), fresh(x)
    (rows, width), p = inputs.shape, per_layer.shape[1]
    gated = x.new_empty((rows, p))
    dependent, options = first(weight, gate_weight)
    _norm_gate_kernel[(-(-p // plan.gate_outputs), rows)](
        inputs, residuals, weight.contiguous(), per_layer, gate_weight.contiguous(), hidden, gated,
        inputs.stride(0), residuals.stride(0), per_layer.stride(0), eps, width, p, plan.gate_block, plan.gate_outputs,
        dependent, num_warps=plan.gate_warps, **options,
    )  # fmt: skip
    return hidden, launch_projection(gated, projection_weight, plan).view(x.shape)


def _check(
    op: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
) -> None:
    check_tail(op, x, residual, None, weight=weight)
    check_ple(op, x, per_layer_input, gate_weight, projection_weight)


def _example(d: Draw) -> tuple[Any, ...]:
    s = d.sizes
    slices = d.normal(d.batch, d.tokens, 3, s.ple)[:, :, 1, :]
    return d.states(), d.states(), d.weight(), slices, d.matrix(s.ple, s.hidden), d.matrix(s.hidden, s.ple), d.eps


@op(launch=_launch, like=("x", "x"), check=_check, example=_example)
def norm_ple(
    x: Tensor, residual: Tensor, weight: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden = residual + norm(x, weight); linear(gelu_tanh(linear(hidden, gate)) * per_layer_input, projection).

    x, residual        [..., H]  fp32, fp16 or bf16
    weight             [H]
    per_layer_input    [..., P]  x's dtype, any strides: a slice [:, :, i, :] is read in place
    gate_weight        [P, H]
    projection_weight  [H, P]
    returns            hidden, projected  [..., H], contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    hidden = residual + normalize(x, weight, eps)
    gated = F.gelu(F.linear(hidden, gate_weight), approximate="tanh") * per_layer_input
    return hidden, F.linear(gated, projection_weight)
