"""rms_norm, rms_norm_noscale: Gemma4RMSNorm with and without its weight.

Source: Gemma4RMSNorm.forward (transformers). x [..., H]: the norm and the product with the weight are fp32, and the
result is rounded once to x.dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import as_rows, expect, fresh, jit, pinned, register, tl
from .plans import row_plan
from .rows import chunk_size, inverse_rms, load_row, scale_row, store_row


def normalize(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Gemma4RMSNorm.forward, operation by operation: the reference that every family here builds on."""
    normed = x.float()
    normed = normed * torch.pow(normed.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        normed = normed * weight.float()
    return normed.type_as(x)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_norm(x, weight)
    return normalize(x, weight, eps)


def rms_norm_noscale_reference(x: Tensor, eps: float) -> Tensor:
    return normalize(x, None, eps)


def check_norm(x: Tensor, weight: Tensor) -> None:
    expect("rms_norm", "weight must be [H] for x [..., H]", weight.shape, x.shape[-1:], "pass the weight of this norm")


@jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, eps, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    eps = pinned(eps)

    x = load_row(x_ptr + row * x_stride, WIDTH, CHUNK)
    weights = None
    if weight_ptr is not None:
        weights = load_row(weight_ptr, WIDTH, CHUNK)

    out = scale_row(x, inverse_rms(x, WIDTH, eps), weights, out_ptr.dtype.element_ty)

    store_row(out_ptr + row * WIDTH, out, WIDTH, CHUNK)


def launch_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is not None:
        check_norm(x, weight)
        weight = weight.contiguous()
    rows, out = as_rows(x), fresh(x)
    if out.numel():
        count, width = rows.shape
        warps, _ = row_plan(count, width)
        chunk = chunk_size(width, warps)
        _rms_norm_kernel[(count,)](rows, weight, out, rows.stride(0), eps, width, chunk, num_warps=warps)
    return out


def launch_rms_norm_noscale(x: Tensor, eps: float) -> Tensor:
    return launch_rms_norm(x, None, eps)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_norm(x, weight)
    return fresh(x)


def _rms_norm_noscale_fake(x: Tensor, eps: float) -> Tensor:
    return fresh(x)


register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=rms_norm_reference,
    launch=launch_rms_norm,
    fake=_rms_norm_fake,
)
register(
    "rms_norm_noscale(Tensor x, float eps) -> Tensor",
    reference=rms_norm_noscale_reference,
    launch=launch_rms_norm_noscale,
    fake=_rms_norm_noscale_fake,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, times weight.

    x        [..., H]  fp32, fp16 or bf16
    weight   [H]
    returns  [..., H]  x.dtype, contiguous
    """
    return torch.ops.gemma4.rms_norm(x, weight, eps)


def rms_norm_noscale(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, without a weight.

    x        [..., H]  fp32, fp16 or bf16
    returns  [..., H]  x.dtype, contiguous
    """
    return torch.ops.gemma4.rms_norm_noscale(x, eps)
