"""qkv_norm_rope, qkv_norm_rope_2d and its clipped form, q_norm_rope: the norms of Q, K and V, and the rotation of Q and K, in
one launch.

Source: Gemma4TextAttention.forward, Gemma4VisionAttention.forward (transformers). q_norm and k_norm have weights, v_norm has
none and v is not rotated. Layers that reuse another layer's keys and values have only q. Of clipped linears
(Gemma4ClippableLinear), q, k and v are clamped as they are loaded. q [B, T, Hq, D]; k and v [B, T, Hk, D]; v may be the very
tensor k (attention_k_eq_v).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gemma4_compile.ops.dependent import alone, start
from gemma4_compile.ops.examples import Draw
from gemma4_compile.ops.library import UNFUSED, expect, fresh, jit, op, pinned, power_of_two, rounded, tl, unit_stride
from gemma4_compile.ops.plans import head_plan
from gemma4_compile.ops.rms_norm import normalize
from gemma4_compile.ops.rope import aligned, check_rope, check_rope_2d, first_of_pairs, rotate, rotate_2d, rotated


def _check_q(op: str, q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_rope(op, q, cos, sin)
    _check_weights(op, q, q_weight)


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_rope(op, q, cos, sin)
    _check_weights(op, q, q_weight, k_weight)
    b, t, _, d = q.shape
    expect(op, "k must be [B, T, Hk, D]", k.shape, (b, t, k.shape[2], d), "view the projection as heads")
    expect(op, "k and v must have q's dtype", (k.dtype, v.dtype), (q.dtype, q.dtype), "cast them")
    expect(op, "v must have k's shape", v.shape, k.shape, "pass keys and values of one layer")


def check_qkv_2d(
    op: str, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> None:  # fmt: skip
    check_rope_2d(op, q, cos, sin)
    check_qkv(op, q, k, v, q_weight, k_weight, cos, sin)


def check_qkv_2d_clipped(
    op: str, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    bounds: Sequence[Tensor],
) -> None:  # fmt: skip
    check_qkv_2d(op, q, k, v, q_weight, k_weight, cos, sin)
    found = [(bound.numel(), bound.dtype) for bound in bounds]
    expect(op, "bounds must be six numbers of q's dtype", found, [(1, q.dtype)] * 6, "pass min and max of q, k and v")


def _check_weights(op: str, q: Tensor, *weights: Tensor) -> None:
    for weight in weights:
        expect(op, "each weight must be [D] for heads of D", weight.shape, q.shape[-1:], "pass this layer's norms")


@jit
def _clamped(x, min_ptr, max_ptr, inside):
    """x between two numbers, as torch.clamp: NaN stays. What is outside of the row stays 0, wherever the bounds are."""
    x = tl.maximum(x, tl.load(min_ptr).to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, tl.load(max_ptr).to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    return tl.where(inside, x, 0.0)


@jit
def _norm_heads(
    x_ptr, min_ptr, max_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, slots_ptr, first, rows, tokens,
    x_batch_stride, x_token_stride, x_head_stride, cos_batch_stride, cos_token_stride,
    page_stride, page_row_stride, page_head_stride, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Norm of ROWS heads from row `first` on, clamped before unless min_ptr is None; times weight and rotated unless weight_ptr
    is.

    PAGE 0: out is x's shape, contiguous. Else out is pages of so many tokens, each token's heads go to its slot, and those of a
    token with a negative slot go nowhere.
    """
    row = first + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (index < HALF)
    column = first_of_pairs(index, HALF, PART)
    token = row // HEADS
    batch = (token // tokens).to(tl.int64)
    step = token % tokens
    x_ptr += batch * x_batch_stride + step * x_token_stride + (row % HEADS) * x_head_stride
    dtype = x_ptr.dtype.element_ty

    low = tl.load(x_ptr + column, inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + PART + column, inside, other=0.0).to(tl.float32)
    if min_ptr is not None:
        low = _clamped(low, min_ptr, max_ptr, inside)
        high = _clamped(high, min_ptr, max_ptr, inside)

    scale = tl.rsqrt((tl.sum(low * low + high * high, axis=1)[:, None]) / (2 * HALF) + eps)
    low *= scale
    high *= scale
    if weight_ptr is not None:
        low = rounded(low * tl.load(weight_ptr + column, index < HALF, other=0.0).to(tl.float32), dtype)
        high = rounded(high * tl.load(weight_ptr + PART + column, index < HALF, other=0.0).to(tl.float32), dtype)
        angle = batch * cos_batch_stride + step * cos_token_stride
        low, high = rotated(low, high, cos_ptr + angle, sin_ptr + angle, column, inside, PART, dtype)

    if PAGE:
        slot = tl.load(slots_ptr + token, row < rows, other=-1).to(tl.int64)
        inside &= slot >= 0
        out_ptr += (slot // PAGE) * page_stride + (slot % PAGE) * page_row_stride
        out_ptr += (row % HEADS).to(tl.int64) * page_head_stride
    else:
        out_ptr += row.to(tl.int64) * (2 * HALF)
    # Pages have a dtype of their own: rounded to x's first, as what is handed to a separate write would be.
    tl.store(out_ptr + column, low.to(dtype).to(out_ptr.dtype.element_ty), inside)
    tl.store(out_ptr + PART + column, high.to(dtype).to(out_ptr.dtype.element_ty), inside)


# Row counts stay specialized (multiples of 16 apart): without that, 8192 tokens took 6 to 13% longer at head size 512.
@jit
def _qkv_norm_rope_kernel(
    q_ptr, k_ptr, v_ptr, q_min_ptr, q_max_ptr, k_min_ptr, k_max_ptr, v_min_ptr, v_max_ptr,
    q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, slots_ptr,
    q_rows, k_rows, tokens,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride, cos_batch_stride, cos_token_stride,
    key_page_stride, key_row_stride, key_head_stride, value_page_stride, value_row_stride, value_head_stride, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PAGE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    start(DEPENDENT)
    eps = pinned(eps)
    q_programs = tl.cdiv(q_rows, ROWS)
    k_programs = tl.cdiv(k_rows, ROWS)
    program = tl.program_id(0)
    if program < q_programs:
        _norm_heads(
            q_ptr, q_min_ptr, q_max_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, slots_ptr,
            program * ROWS, q_rows, tokens,
            q_batch_stride, q_token_stride, q_head_stride, cos_batch_stride, cos_token_stride, 0, 0, 0, eps,
            Q_HEADS, HALF, PART, BLOCK, ROWS, 0,
        )  # fmt: skip
    elif program < q_programs + k_programs:
        _norm_heads(
            k_ptr, k_min_ptr, k_max_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, slots_ptr,
            (program - q_programs) * ROWS, k_rows, tokens,
            k_batch_stride, k_token_stride, k_head_stride, cos_batch_stride, cos_token_stride,
            key_page_stride, key_row_stride, key_head_stride, eps, K_HEADS, HALF, PART, BLOCK, ROWS, PAGE,
        )  # fmt: skip
    else:
        _norm_heads(
            v_ptr, v_min_ptr, v_max_ptr, None, cos_ptr, sin_ptr, v_out_ptr, slots_ptr,
            (program - q_programs - k_programs) * ROWS, k_rows, tokens,
            v_batch_stride, v_token_stride, v_head_stride, cos_batch_stride, cos_token_stride,
            value_page_stride, value_row_stride, value_head_stride, eps, K_HEADS, HALF, PART, BLOCK, ROWS, PAGE,
        )  # fmt: skip


def _launch_q(q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    out = fresh(q)
    _launch(out, q, q_weight, cos, sin, eps)
    return out


def _launch_qkv(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, ...]:
    outputs = fresh(q), fresh(k), fresh(v)
    _launch(outputs[0], q, q_weight, cos, sin, eps, _KV(k, v, k_weight, *outputs[1:]))
    return outputs


def _launch_qkv_2d(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, ...]:
    outputs = fresh(q), fresh(k), fresh(v)
    _launch(outputs[0], q, q_weight, cos, sin, eps, _KV(k, v, k_weight, *outputs[1:]), parts=2)
    return outputs


def _launch_qkv_2d_clipped(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    bounds: Sequence[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    outputs = fresh(q), fresh(k), fresh(v)
    _launch(outputs[0], q, q_weight, cos, sin, eps, _KV(k, v, k_weight, *outputs[1:]), parts=2, bounds=bounds)
    return outputs


def launch_into_pages(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    """q to `out`, contiguous; row i of k and v to slot slots[i] of the pages, as attention.py has them. The caller checks."""
    _launch(out, q, q_weight, cos, sin, eps, _KV(k, v, k_weight, keys, values, slots.contiguous()))


class _KV(NamedTuple):
    """k and v, and where they go: contiguous tensors of their shape, or pages with a slot for each token."""

    k: Tensor
    v: Tensor
    k_weight: Tensor
    k_out: Tensor
    v_out: Tensor
    slots: Tensor | None = None


def _launch(
    q_out: Tensor, q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, kv: _KV | None = None, parts: int = 1,
    bounds: Sequence[Tensor | None] = (None,) * 6,
) -> None:  # fmt: skip
    """Without k and v the kernel's second and third parts have no programs, and q stands in for their pointers."""
    if not q_out.numel():
        return
    q, q_weight = unit_stride(q), q_weight.contiguous()
    cos, sin, *angle_strides = aligned(cos, sin)
    batch, tokens, q_heads, dim = q.shape
    k, v, k_weight, k_out, v_out, slots = kv or _KV(q, q, q_weight, q_out, q_out)
    k, v = unit_stride(k), unit_stride(v)
    k_heads = k.shape[2]
    q_rows, k_rows = batch * tokens * q_heads, batch * tokens * k_heads if kv else 0
    rows, warps = head_plan(q_rows + 2 * k_rows, dim)
    dependent, options = alone()
    _qkv_norm_rope_kernel[(-(-q_rows // rows) + 2 * -(-k_rows // rows),)](
        q, k, v, *bounds, q_weight, k_weight.contiguous(), cos, sin, q_out, k_out, v_out, slots, q_rows, k_rows, tokens,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *angle_strides, *k_out.stride()[:3], *v_out.stride()[:3], eps,
        q_heads, k_heads, dim // 2, dim // 2 // parts, power_of_two(dim // 2), rows,
        0 if slots is None else k_out.shape[1], dependent,
        num_warps=warps, **UNFUSED, **options,
    )  # fmt: skip


@op(
    launch=_launch_q,
    like="q",
    check=_check_q,
    example=lambda d: (d.heads(d.sizes.q_heads), d.weight(d.sizes.head_dim), *d.angles(), d.eps),
)
def q_norm_rope(q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Norm and rotation of the queries alone.

    q         [B, T, Hq, D]    fp32, fp16 or bf16, any strides
    q_weight  [D]
    cos, sin  [B or 1, T, D]   q.dtype
    returns   [B, T, Hq, D], contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    return rotate(normalize(q, q_weight, eps), cos, sin)


def _example(d: Draw) -> tuple[Any, ...]:
    k = d.heads(d.sizes.kv_heads)
    v = k if d.sizes.shared_kv else d.heads(d.sizes.kv_heads)
    return d.heads(d.sizes.q_heads), k, v, d.weight(d.sizes.head_dim), d.weight(d.sizes.head_dim), *d.angles(), d.eps


@op(launch=_launch_qkv, like=("q", "k", "v"), check=check_qkv, example=_example)
def qkv_norm_rope(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and rotation of q and k, norm of v.

    q                   [B, T, Hq, D]    fp32, fp16 or bf16, any strides
    k, v                [B, T, Hk, D]    q.dtype; may be one tensor
    q_weight, k_weight  [D]
    cos, sin            [B or 1, T, D]   q.dtype
    returns             q, k, v in their shapes, contiguous, none aliasing another

    Raises ValueError for shapes and dtypes that do not fit.
    """
    return (
        rotate(normalize(q, q_weight, eps), cos, sin),
        rotate(normalize(k, k_weight, eps), cos, sin),
        normalize(v, None, eps),
    )


@op(launch=_launch_qkv_2d, like=("q", "k", "v"), check=check_qkv_2d, example=_example)
def qkv_norm_rope_2d(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As qkv_norm_rope, of image patches: each half of q and k is rotated by a position of its own, see rope_2d.

    q                   [B, T, Hq, D]    fp32, fp16 or bf16, any strides, D a multiple of 4
    k, v                [B, T, Hk, D]    q.dtype; may be one tensor
    q_weight, k_weight  [D]
    cos, sin            [B or 1, T, D]   q.dtype
    returns             q, k, v in their shapes, contiguous, none aliasing another

    Raises ValueError for shapes and dtypes that do not fit.
    """
    return (
        rotate_2d(normalize(q, q_weight, eps), cos, sin),
        rotate_2d(normalize(k, k_weight, eps), cos, sin),
        normalize(v, None, eps),
    )


def _clipped_example(d: Draw) -> tuple[Any, ...]:
    """Each of q, k and v has bounds of its own, 0 not between those of v."""
    scalars = [d.scalar() * scale for scale in (-1.5, 2.0, -1.0, 1.0, 0.5, 3.0)]
    return *_example(d), [scalar[0] for scalar in scalars]


@op(launch=_launch_qkv_2d_clipped, like=("q", "k", "v"), check=check_qkv_2d_clipped, example=_clipped_example)
def qkv_norm_rope_2d_clipped(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    bounds: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As qkv_norm_rope_2d, where q, k and v come from clipped linears: each is clamped first.

    q                   [B, T, Hq, D]    fp32, fp16 or bf16, any strides, D a multiple of 4
    k, v                [B, T, Hk, D]    q.dtype; may be one tensor
    q_weight, k_weight  [D]
    cos, sin            [B or 1, T, D]   q.dtype
    bounds              six of [] or [1] q.dtype: the least and the largest value of q, of k, of v
    returns             q, k, v in their shapes, contiguous, none aliasing another

    Raises ValueError for shapes and dtypes that do not fit.
    """
    q, k, v = (x.clamp(*bounds[i : i + 2]) for x, i in ((q, 0), (k, 2), (v, 4)))
    return (
        rotate_2d(normalize(q, q_weight, eps), cos, sin),
        rotate_2d(normalize(k, k_weight, eps), cos, sin),
        normalize(v, None, eps),
    )
