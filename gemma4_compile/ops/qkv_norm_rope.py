"""qkv_norm_rope, q_norm_rope: the norms of Q, K and V, and the rotation of Q and K, in one launch.

Source: Gemma4TextAttention.forward (transformers). q_norm and k_norm have weights, v_norm has none and v is not
rotated. Layers that reuse another layer's keys and values have only q. q [B, T, Hq, D]; k and v [B, T, Hk, D]; v may be
the very tensor k (attention_k_eq_v).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import (
    UNFUSED,
    expect,
    fresh,
    jit,
    pinned,
    power_of_two,
    register,
    rounded,
    tl,
    unit_stride,
)
from .plans import head_plan
from .rms_norm import normalize
from .rope import aligned, check_rope, rotate, rotated


def q_norm_rope_reference(q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    check_rope("q_norm_rope", q, cos, sin)
    _check_weights("q_norm_rope", q, q_weight)
    return rotate(normalize(q, q_weight, eps), cos, sin)


def qkv_norm_rope_reference(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, q_weight, k_weight, cos, sin)
    return (
        rotate(normalize(q, q_weight, eps), cos, sin),
        rotate(normalize(k, k_weight, eps), cos, sin),
        normalize(v, None, eps),
    )


def _check_weights(op: str, q: Tensor, *weights: Tensor) -> None:
    for weight in weights:
        expect(op, "each weight must be [D] for heads of D", weight.shape, q.shape[-1:], "pass this layer's norms")


def _check(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_rope("qkv_norm_rope", q, cos, sin)
    _check_weights("qkv_norm_rope", q, q_weight, k_weight)
    b, t, _, d = q.shape
    expect("qkv_norm_rope", "k must be [B, T, Hk, D]", k.shape, (b, t, k.shape[2], d), "view the projection as heads")
    expect("qkv_norm_rope", "k and v must have q's dtype", (k.dtype, v.dtype), (q.dtype, q.dtype), "cast them")
    expect("qkv_norm_rope", "v must have k's shape", v.shape, k.shape, "pass keys and values of one layer")


@jit
def _norm_heads(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, first, rows, tokens,
    x_batch_stride, x_token_stride, x_head_stride, cos_batch_stride, cos_token_stride, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Norm of ROWS heads from row `first` on; times weight and rotated unless weight_ptr is None."""
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < HALF)
    token = row // HEADS
    batch = (token // tokens).to(tl.int64)
    step = token % tokens
    x_ptr += batch * x_batch_stride + step * x_token_stride + (row % HEADS) * x_head_stride
    dtype = out_ptr.dtype.element_ty

    low = tl.load(x_ptr + column, inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + HALF + column, inside, other=0.0).to(tl.float32)

    scale = tl.rsqrt((tl.sum(low * low + high * high, axis=1)[:, None]) / (2 * HALF) + eps)
    low *= scale
    high *= scale
    if weight_ptr is not None:
        low = rounded(low * tl.load(weight_ptr + column, column < HALF, other=0.0).to(tl.float32), dtype)
        high = rounded(high * tl.load(weight_ptr + HALF + column, column < HALF, other=0.0).to(tl.float32), dtype)
        angle = batch * cos_batch_stride + step * cos_token_stride
        low, high = rotated(low, high, cos_ptr + angle, sin_ptr + angle, column, inside, HALF, dtype)

    out_ptr += row.to(tl.int64) * (2 * HALF)
    tl.store(out_ptr + column, low, inside)
    tl.store(out_ptr + HALF + column, high, inside)


# Row counts stay specialized (multiples of 16 apart): without that, 8192 tokens took 6 to 13% longer at head size 512.
@jit
def _qkv_norm_rope_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    q_rows, k_rows, tokens,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride, cos_batch_stride, cos_token_stride, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    eps = pinned(eps)
    q_programs = tl.cdiv(q_rows, ROWS)
    k_programs = tl.cdiv(k_rows, ROWS)
    program = tl.program_id(0)
    if program < q_programs:
        _norm_heads(
            q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, program * ROWS, q_rows, tokens,
            q_batch_stride, q_token_stride, q_head_stride, cos_batch_stride, cos_token_stride, eps,
            Q_HEADS, HALF, BLOCK, ROWS,
        )  # fmt: skip
    elif program < q_programs + k_programs:
        _norm_heads(
            k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, (program - q_programs) * ROWS, k_rows, tokens,
            k_batch_stride, k_token_stride, k_head_stride, cos_batch_stride, cos_token_stride, eps,
            K_HEADS, HALF, BLOCK, ROWS,
        )  # fmt: skip
    else:
        _norm_heads(
            v_ptr, None, cos_ptr, sin_ptr, v_out_ptr, (program - q_programs - k_programs) * ROWS, k_rows, tokens,
            v_batch_stride, v_token_stride, v_head_stride, cos_batch_stride, cos_token_stride, eps,
            K_HEADS, HALF, BLOCK, ROWS,
        )  # fmt: skip


def launch_q_norm_rope(q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    check_rope("q_norm_rope", q, cos, sin)
    _check_weights("q_norm_rope", q, q_weight)
    return _launch(q, None, None, q_weight, None, cos, sin, eps)[0]


def launch_qkv_norm_rope(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, ...]:
    _check(q, k, v, q_weight, k_weight, cos, sin)
    return _launch(q, k, v, q_weight, k_weight, cos, sin, eps)


def _launch(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """With k and v None the kernel's second and third parts have no programs, and q stands in for their pointers."""
    q = unit_stride(q)
    cos, sin, *angle_strides = aligned(cos, sin)
    k, v = (q, q) if k is None or v is None else (unit_stride(k), unit_stride(v))
    q_out = fresh(q)
    outputs = (q_out,) if k_weight is None else (q_out, fresh(k), fresh(v))
    if q_out.numel():
        batch, tokens, q_heads, dim = q.shape
        k_heads = k.shape[2]
        q_rows, k_rows = batch * tokens * q_heads, 0 if k_weight is None else batch * tokens * k_heads
        rows, warps = head_plan(q_rows + 2 * k_rows, dim)
        q_weight = q_weight.contiguous()
        _qkv_norm_rope_kernel[(-(-q_rows // rows) + 2 * -(-k_rows // rows),)](
            q, k, v, q_weight, q_weight if k_weight is None else k_weight.contiguous(), cos, sin,
            q_out, outputs[-2 % len(outputs)], outputs[-1], q_rows, k_rows, tokens,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *angle_strides, eps,
            q_heads, k_heads, dim // 2, power_of_two(dim // 2), rows, num_warps=warps, **UNFUSED,
        )  # fmt: skip
    return outputs


def _q_norm_rope_fake(q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    check_rope("q_norm_rope", q, cos, sin)
    _check_weights("q_norm_rope", q, q_weight)
    return fresh(q)


def _qkv_norm_rope_fake(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, q_weight, k_weight, cos, sin)
    return fresh(q), fresh(k), fresh(v)


register(
    "q_norm_rope(Tensor q, Tensor q_weight, Tensor cos, Tensor sin, float eps) -> Tensor",
    reference=q_norm_rope_reference,
    launch=launch_q_norm_rope,
    fake=_q_norm_rope_fake,
)
register(
    "qkv_norm_rope(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor q_out, Tensor k_out, Tensor v_out)",
    reference=qkv_norm_rope_reference,
    launch=launch_qkv_norm_rope,
    fake=_qkv_norm_rope_fake,
)


def q_norm_rope(q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Norm and rotation of the queries alone.

    q         [B, T, Hq, D]    fp32, fp16 or bf16, any strides
    q_weight  [D]
    cos, sin  [B or 1, T, D]
    returns   [B, T, Hq, D], contiguous
    """
    return torch.ops.gemma4.q_norm_rope(q, q_weight, cos, sin, eps)


def qkv_norm_rope(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and rotation of q and k, norm of v.

    q                   [B, T, Hq, D]    fp32, fp16 or bf16, any strides
    k, v                [B, T, Hk, D]    may be one tensor
    q_weight, k_weight  [D]
    cos, sin            [B or 1, T, D]
    returns             q, k, v in their shapes, contiguous, none aliasing another
    """
    return torch.ops.gemma4.qkv_norm_rope(q, k, v, q_weight, k_weight, cos, sin, eps)
