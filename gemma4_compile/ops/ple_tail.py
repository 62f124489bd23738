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
from .library import as_rows, expect, fresh, gelu_tanh, jit, power_of_two, register, rounded, tl
from .plans import PlePlan, can_chain, ple_plan
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
    hidden_ptr, weight_ptr, partial_ptr, rows, hidden_stride,
    WIDTH: tl.constexpr, P: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """partial[split, t, p] = the split's share of hidden[t] . weight[p], in fp32: few tokens need many programs."""
    if CHAINED:  # this kernel itself waited for all before it, so the next may read whatever older kernels wrote
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    hidden_ptr += token.to(tl.int64) * hidden_stride
    weight_ptr += output * WIDTH
    SHARE: tl.constexpr = (WIDTH + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK

    total = tl.zeros((OUTPUTS, BLOCK if TOKENS == 1 else TOKENS), tl.float32)
    for start in tl.static_range(0, SHARE, BLOCK):
        column = split * SHARE + start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        weight = tl.load(weight_ptr[:, None] + column[None, :], (output < P)[:, None] & inside[None, :], other=0.0)
        if TOKENS == 1:
            hidden = tl.load(hidden_ptr[None, :] + column[None, :], inside[None, :], other=0.0)
            total += weight.to(tl.float32) * hidden.to(tl.float32)
        else:
            hidden = tl.load(
                hidden_ptr[None, :] + column[:, None], (token < rows)[None, :] & inside[:, None], other=0.0
            )
            total = tl.dot(weight, hidden, total, input_precision="ieee")
    if TOKENS == 1:
        total = tl.sum(total, axis=1)[:, None]

    target = (split * rows + token)[None, :] * P + output[:, None]
    tl.store(partial_ptr + target, total, (token < rows)[None, :] & (output < P)[:, None])


@jit
def _projection_kernel(
    partial_ptr, input_ptr, weight_ptr, projected_ptr, rows, input_stride,
    WIDTH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """projected[t] = (gelu(sum of the splits)[t] * input[t]) @ weight.T, OUTPUTS columns a program."""
    dtype = projected_ptr.dtype.element_ty
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    p = tl.arange(0, BLOCK)
    present = (token < rows)[:, None] & (p < P)[None, :]

    weight = tl.load(weight_ptr + output[:, None] * P + p[None, :], (output < WIDTH)[:, None] & (p < P)[None, :], 0.0)
    per_layer = tl.load(input_ptr + token.to(tl.int64)[:, None] * input_stride + p[None, :], present, 0.0)
    if CHAINED:  # of all that is read here, only the partial sums are the previous kernel's
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.zeros((TOKENS, BLOCK), tl.float32)
    for split in tl.static_range(SPLITS):
        gate += tl.load(partial_ptr + (split * rows + token)[:, None] * P + p[None, :], present, 0.0)

    gated = rounded(gelu_tanh(rounded(gate, dtype)), dtype) * per_layer.to(tl.float32)
    if TOKENS == 1:
        projected = tl.sum(weight.to(tl.float32) * rounded(gated, dtype), axis=1)[:, None]
    else:
        projected = tl.dot(weight, tl.trans(gated.to(dtype)), input_precision="ieee")

    target = token.to(tl.int64)[None, :] * WIDTH + output[:, None]
    tl.store(projected_ptr + target, projected, (token < rows)[None, :] & (output < WIDTH)[:, None])


@jit
def _gelu_times_kernel(gate_ptr, input_ptr, out_ptr, count, input_stride, P: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count

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
    plan = ple_plan(*hiddens.shape)
    if plan is None:
        projected = _project_many(hiddens, inputs, gate_weight, projection_weight)
    else:
        projected = _project_few(hiddens, inputs, gate_weight.contiguous(), projection_weight.contiguous(), plan)
    chained = plan is not None and can_chain()
    return launch_tail(
        projected.view(hidden.shape), hidden, norm_weight, layer_scalar, next_weight, eps, chained=chained
    )


def _project_many(hidden: Tensor, inputs: Tensor, gate_weight: Tensor, projection_weight: Tensor) -> Tensor:
    """Both matrix products by cuBLAS."""
    gate = F.linear(hidden, gate_weight)
    gated = fresh(gate)
    _gelu_times_kernel[(-(-gate.numel() // 1024),)](
        gate, inputs, gated, gate.numel(), inputs.stride(0), inputs.shape[1], 1024, num_warps=4
    )
    return F.linear(gated, projection_weight)


def _project_few(
    hidden: Tensor, inputs: Tensor, gate_weight: Tensor, projection_weight: Tensor, plan: PlePlan
) -> Tensor:
    """Both matrix products here: cuBLAS has too few programs for a handful of tokens, and a launch more."""
    (rows, width), p = hidden.shape, inputs.shape[1]
    partial = torch.empty((plan.splits, rows, p), dtype=torch.float32, device=hidden.device)
    projected = hidden.new_empty((rows, width))
    groups, chained = -(-rows // plan.tokens), can_chain()
    _gate_kernel[(-(-p // plan.gate_outputs), plan.splits, groups)](
        hidden, gate_weight, partial, rows, hidden.stride(0),
        width, p, plan.gate_outputs, plan.tokens, plan.gate_block, plan.splits, chained, num_warps=plan.gate_warps,
    )  # fmt: skip
    _projection_kernel[(-(-width // plan.outputs), groups)](
        partial, inputs, projection_weight, projected, rows, inputs.stride(0),
        width, p, max(16, power_of_two(p)), plan.outputs, plan.tokens, plan.splits, chained,
        num_warps=plan.warps, **({"launch_pdl": True} if chained else {}),
    )  # fmt: skip
    return projected


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
