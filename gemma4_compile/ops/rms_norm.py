"""rms_norm, rms_norm_noscale: Gemma4RMSNorm with and without its weight.

Source: Gemma4RMSNorm.forward (transformers). x [..., H]: the norm and the product with the weight are fp32, and the
result is rounded once to x.dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dependent import alone, ready, start
from .library import as_rows, expect, fresh, jit, op, pinned, tl
from .plans import row_plan
from .rows import chunk_size, inverse_rms, load_row, scale_row, store_row


def normalize(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Gemma4RMSNorm.forward, operation by operation: the reference that every family here builds on."""
    normed = x.float()
    normed = normed * torch.pow(normed.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        normed = normed * weight.float()
    return normed.type_as(x)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    expect(op, "weight must be [H] for x [..., H]", weight.shape, x.shape[-1:], "pass the weight of this norm")


@jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, x_stride, eps, WIDTH: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr
):
    start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    eps = pinned(eps)

    weights = None
    if weight_ptr is not None:
        weights = load_row(weight_ptr, WIDTH, CHUNK)
    ready(DEPENDENT)
    x = load_row(x_ptr + row * x_stride, WIDTH, CHUNK)

    out = scale_row(x, inverse_rms(x, WIDTH, eps), weights, out_ptr.dtype.element_ty)

    store_row(out_ptr + row * WIDTH, out, WIDTH, CHUNK)


def _launch(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    dependent, options = alone(weight)
    if weight is not None:
        weight = weight.contiguous()
    rows, out = as_rows(x), fresh(x)
    if out.numel():
        count, width = rows.shape
        warps, _ = row_plan(count, width)
        chunk = chunk_size(width, warps)
        _rms_norm_kernel[(count,)](rows, weight, out, rows.stride(0), eps, width, chunk, dependent, num_warps=warps, **options)
    return out


@op(launch=_launch, like="x", check=_check, example=lambda d: (d.states(), d.weight(), d.eps))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, times weight.

    x        [..., H]  fp32, fp16 or bf16
    weight   [H]
    returns  [..., H]  x.dtype, contiguous

    Raises ValueError for a weight of another width.
    """
    return normalize(x, weight, eps)


@op(launch=lambda x, eps: _launch(x, None, eps), like="x", example=lambda d: (d.states(), d.eps))
def rms_norm_noscale(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, without a weight.

    x        [..., H]  fp32, fp16 or bf16
    returns  [..., H]  x.dtype, contiguous
    """
    return normalize(x, None, eps)
