"""ple_tail, ple_tail_norm: the per-layer input at the end of a layer, with its two small matrix products.

Source: Gemma4TextDecoderLayer.forward (transformers), the hidden_size_per_layer_input branch:
    y = per_layer_projection(gelu_tanh(per_layer_input_gate(hidden)) * per_layer_input)
    hidden = (hidden + post_per_layer_input_norm(y)) * layer_scalar
and, in the `_norm` form, the norm that reads the result next. hidden [..., H], per_layer_input [..., P].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .feed_forward_tail import launch_tail, scale_by
from .library import (
    as_rows,
    await_previous,
    expect,
    fresh,
    gelu_tanh,
    jit,
    mean_square_norm,
    pinned,
    power_of_two,
    register,
    rounded,
    tl,
)
from .plans import pdl_options, ple_plan
from .rms_norm import normalize


def ple_tail_reference(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    _check("ple_tail", hidden, per_layer_input, gate_weight, projection_weight, norm_weight)
    gated = F.gelu(F.linear(hidden, gate_weight), approximate="tanh") * per_layer_input
    return scale_by(hidden + normalize(F.linear(gated, projection_weight), norm_weight, eps), layer_scalar)


def ple_tail_norm_reference(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check("ple_tail_norm", hidden, per_layer_input, gate_weight, projection_weight, norm_weight, next_weight)
    hidden = ple_tail_reference(hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, eps)
    return hidden, normalize(hidden, next_weight, eps)


def _check(op: str, hidden: Tensor, per_layer_input: Tensor, gate: Tensor, projection: Tensor, *norms: Tensor) -> None:
    h, p = hidden.shape[-1], per_layer_input.shape[-1]
    expect(
        op,
        "per_layer_input must be [..., P] for hidden [..., H]",
        per_layer_input.shape[:-1],
        hidden.shape[:-1],
        "pass this layer's slice",
    )
    expect(op, "per_layer_input must have hidden's dtype", per_layer_input.dtype, hidden.dtype, "cast it")
    expect(op, "gate_weight must be [P, H]", gate.shape, (p, h), "pass per_layer_input_gate.weight")
    expect(op, "projection_weight must be [H, P]", projection.shape, (h, p), "pass per_layer_projection.weight")
    for weight in norms:
        expect(op, "each norm weight must be [H]", weight.shape, (h,), "pass this layer's weights")


@jit
def _gate_kernel(
    hidden_ptr, input_ptr, weight_ptr, gated_ptr, arrived_ptr, rows, hidden_stride, input_stride,
    WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """gated[t, p] = gelu(hidden[t] . weight[p]) * input[t, p]: a program owns OUTPUTS values of p for ROWS tokens."""
    dtype = gated_ptr.dtype.element_ty
    group = tl.program_id(1)
    p = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, BLOCK)[None, :]
    mine = p < P
    if PDL:
        await_previous()
    if tl.program_id(0) == 0:
        tl.store(arrived_ptr + group, 0)  # the next kernel counts on it: no state outlives a call

    weight = tl.load(weight_ptr + p[:, None] * WIDTH + column, mine[:, None] & (column < WIDTH), other=0.0)
    weight = weight.to(tl.float32)
    for i in tl.static_range(ROWS):
        row = (group * ROWS + i).to(tl.int64)
        present = row < rows
        hidden = tl.load(hidden_ptr + row * hidden_stride + column, present & (column < WIDTH), other=0.0)
        per_layer = tl.load(input_ptr + row * input_stride + p, present & mine, other=0.0).to(tl.float32)
        gate = rounded(tl.sum(weight * hidden.to(tl.float32), axis=1), dtype)
        tl.store(gated_ptr + row * P + p, rounded(gelu_tanh(gate), dtype) * per_layer, present & mine)


@jit
def _projection_kernel(
    gated_ptr, weight_ptr, hidden_ptr, norm_weight_ptr, scalar_ptr, next_weight_ptr, out_ptr, normed_ptr, arrived_ptr,
    rows, hidden_stride, eps,
    WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, P_BLOCK: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = gated[t] @ weight.T by OUTPUTS columns a program; the last to finish a group of rows norms the group."""
    eps = pinned(eps)
    dtype = out_ptr.dtype.element_ty
    group = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    p = tl.arange(0, P_BLOCK)[None, :]
    mine = output < WIDTH
    if PDL:
        await_previous()

    weight = tl.load(weight_ptr + output[:, None] * P + p, mine[:, None] & (p < P), other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        row = (group * ROWS + i).to(tl.int64)
        present = row < rows
        gated = tl.load(gated_ptr + row * P + p, present & (p < P), other=0.0).to(tl.float32)
        tl.store(out_ptr + row * WIDTH + output, tl.sum(weight * gated, axis=1), present & mine)

    # Until here `out` held the projection, rounded as the linear rounds it. The barrier orders this program's stores
    # before its arrival; acquire-release makes all stores visible to the program that arrives last.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr + group, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        column = tl.arange(0, BLOCK)
        inside = column < WIDTH
        norm_weight = tl.load(norm_weight_ptr + column, inside, other=0.0).to(tl.float32)
        for i in tl.static_range(ROWS):
            row = (group * ROWS + i).to(tl.int64)
            present = inside & (row < rows)
            x = tl.load(out_ptr + row * WIDTH + column, present, other=0.0, cache_modifier=".cg").to(tl.float32)
            residual = tl.load(hidden_ptr + row * hidden_stride + column, present, other=0.0).to(tl.float32)
            hidden = residual + rounded(mean_square_norm(x, WIDTH, eps) * norm_weight, dtype)
            hidden = rounded(hidden, dtype)
            if scalar_ptr is not None:
                hidden = rounded(hidden * tl.load(scalar_ptr).to(tl.float32), dtype)
            tl.store(out_ptr + row * WIDTH + column, hidden, present)
            if next_weight_ptr is not None:
                next_weight = tl.load(next_weight_ptr + column, inside, other=0.0).to(tl.float32)
                normed = mean_square_norm(hidden, WIDTH, eps) * next_weight
                tl.store(normed_ptr + row * WIDTH + column, normed, present)


@jit
def _gelu_times_kernel(
    gate_ptr, input_ptr, out_ptr, count, input_stride, P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    if PDL:
        await_previous()

    gate = tl.load(gate_ptr + index, inside, other=0.0).to(tl.float32)
    per_layer = tl.load(input_ptr + (index // P) * input_stride + index % P, inside, other=0.0).to(tl.float32)

    tl.store(out_ptr + index, rounded(gelu_tanh(gate), out_ptr.dtype.element_ty) * per_layer, inside)


def launch_ple_tail(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    _check("ple_tail", hidden, per_layer_input, gate_weight, projection_weight, norm_weight)
    return _launch(hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, None, eps)[0]


def launch_ple_tail_norm(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    _check("ple_tail_norm", hidden, per_layer_input, gate_weight, projection_weight, norm_weight, next_weight)
    return _launch(hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, next_weight, eps)


def _launch(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    if not hidden.numel():
        return fresh(hidden), None if next_weight is None else fresh(hidden)
    hiddens, inputs = as_rows(hidden), as_rows(per_layer_input)
    rows, width = hiddens.shape
    p = inputs.shape[1]
    plan = ple_plan(rows, width)
    if plan is None:  # many tokens: cuBLAS, and one kernel after each product
        gate = F.linear(hiddens, gate_weight)
        gated = fresh(gate)
        _gelu_times_kernel[(-(-gate.numel() // 1024),)](
            gate, inputs, gated, gate.numel(), inputs.stride(0), p, 1024, num_warps=4, **pdl_options()
        )
        projected = F.linear(gated, projection_weight).view(hidden.shape)
        return launch_tail(projected, hidden, norm_weight, layer_scalar, next_weight, eps)
    out = fresh(hidden)
    normed = None if next_weight is None else fresh(hidden)
    groups = -(-rows // plan.rows)
    gated = hiddens.new_empty((rows, p))
    arrived = torch.empty(groups, dtype=torch.int32, device=hidden.device)
    _gate_kernel[(-(-p // plan.gate_outputs), groups)](
        hiddens, inputs, gate_weight.contiguous(), gated, arrived, rows, hiddens.stride(0), inputs.stride(0),
        width, p, power_of_two(width), plan.gate_outputs, plan.rows, num_warps=plan.gate_warps, **pdl_options(),
    )  # fmt: skip
    _projection_kernel[(-(-width // plan.outputs), groups)](
        gated, projection_weight.contiguous(), hiddens, norm_weight.contiguous(), layer_scalar,
        next_weight if next_weight is None else next_weight.contiguous(), out, normed, arrived,
        rows, hiddens.stride(0), eps, width, p, power_of_two(width), power_of_two(p), plan.outputs, plan.rows,
        num_warps=plan.warps, **pdl_options(),
    )  # fmt: skip
    return out, normed


def _ple_tail_fake(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    _check("ple_tail", hidden, per_layer_input, gate_weight, projection_weight, norm_weight)
    return fresh(hidden)


def _ple_tail_norm_fake(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check("ple_tail_norm", hidden, per_layer_input, gate_weight, projection_weight, norm_weight, next_weight)
    return fresh(hidden), fresh(hidden)


register(
    "ple_tail(Tensor hidden, Tensor per_layer_input, Tensor gate_weight, Tensor projection_weight, Tensor norm_weight,"
    " Tensor? layer_scalar, float eps) -> Tensor",
    reference=ple_tail_reference,
    launch=launch_ple_tail,
    fake=_ple_tail_fake,
)
register(
    "ple_tail_norm(Tensor hidden, Tensor per_layer_input, Tensor gate_weight, Tensor projection_weight,"
    " Tensor norm_weight, Tensor? layer_scalar, Tensor next_weight, float eps) -> (Tensor hidden, Tensor normed)",
    reference=ple_tail_norm_reference,
    launch=launch_ple_tail_norm,
    fake=_ple_tail_norm_fake,
)


def ple_tail(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    """(hidden + norm(linear(gelu_tanh(linear(hidden, gate)) * per_layer_input, projection), norm)) [* layer_scalar].

    hidden             [..., H]  fp32, fp16 or bf16
    per_layer_input    [..., P]  any strides: a slice [:, :, i, :] is read in place
    gate_weight        [P, H]
    projection_weight  [H, P]
    norm_weight        [H]
    layer_scalar       [1] or None
    returns            [..., H], contiguous
    """
    return torch.ops.gemma4.ple_tail(
        hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, eps
    )


def ple_tail_norm(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """hidden as ple_tail gives it, and normed = norm(hidden, next_weight).

    next_weight  [H], the norm that reads hidden next
    returns      hidden, normed  [..., H], contiguous
    """
    return torch.ops.gemma4.ple_tail_norm(
        hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, next_weight, eps
    )
