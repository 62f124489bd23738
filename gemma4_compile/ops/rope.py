"""rope, rope_2d: rotary position embedding of one tensor of heads, by one position or, of image patches, by two.

Source: apply_rotary_pos_emb with unsqueeze_dim=2, rotate_half, and apply_multidimensional_rope (transformers). Rounds after
each product and after the sum, as the unfused graph does.

In two dimensions each half of a head is rotated as a whole one is: pairs stand PART apart, a half of the head or a quarter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dependent import alone, start
from .library import UNFUSED, expect, fresh, jit, op, power_of_two, rounded, tl, unit_stride
from .plans import head_plan


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, N, D], cos and sin [B or 1, T, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos.unsqueeze(2)) + (turned * sin.unsqueeze(2))


def rotate_2d(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each half of the heads by its own angles."""
    parts = zip(*(t.chunk(2, dim=-1) for t in (x, cos, sin)), strict=True)
    return torch.cat([rotate(*part) for part in parts], dim=-1)


def check_rope_2d(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_rope(op, x, cos, sin)
    expect(op, "the head size must be a multiple of 4", x.shape[3] % 4, 0, "rotate whole pairs of each half")


def check_rope(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    expect(op, "x must be [B, T, N, D]", x.dim(), 4, "view the projection as heads first")
    rows = cos.shape[0]
    expect(
        op,
        "cos must be [B or 1, T, D]",
        cos.shape,
        (rows if rows == 1 else x.shape[0], x.shape[1], x.shape[3]),
        "pass the position embeddings of these tokens",
    )
    expect(op, "the head size must be even", x.shape[3] % 2, 0, "rotate whole pairs")
    expect(op, "cos must have x's dtype", cos.dtype, x.dtype, "cast the position embeddings")
    expect(op, "sin must have cos's shape", sin.shape, cos.shape, "pass both of one rotary embedding")


def aligned(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """cos and sin with the same strides, and their batch and token stride; one batch serves all."""
    cos, sin = unit_stride(cos), unit_stride(sin)
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (0 if cos.shape[0] == 1 else cos.stride(0)), cos.stride(1)


@jit
def first_of_pairs(index, HALF: tl.constexpr, PART: tl.constexpr):
    """Where in a head the first of each of its HALF pairs is; the second is PART further."""
    if PART == HALF:  # noqa: SIM108  (a compile-time branch)
        column = index
    else:
        column = index + index // PART * PART
    return column


@jit
def rotated(low, high, cos_ptr, sin_ptr, column, inside, PART: tl.constexpr, dtype: tl.constexpr):
    """Both members [R, HALF] of rotated pairs, rounded where the unfused graph rounds; the pointers are [R, 1] rows."""
    cos_low = tl.load(cos_ptr + column, inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + PART + column, inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + column, inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + PART + column, inside, other=0.0).to(tl.float32)
    out_low = rounded(low * cos_low, dtype) + rounded(-high * sin_low, dtype)
    out_high = rounded(high * cos_high, dtype) + rounded(low * sin_high, dtype)
    return out_low, out_high


@jit(do_not_specialize=["rows", "tokens"])  # one compilation for all token counts
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, rows, tokens,
    x_batch_stride, x_token_stride, x_head_stride, cos_batch_stride, cos_token_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    start(DEPENDENT)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (index < HALF)
    column = first_of_pairs(index, HALF, PART)
    token = row // HEADS
    batch = (token // tokens).to(tl.int64)
    step = token % tokens
    x_ptr += batch * x_batch_stride + step * x_token_stride + (row % HEADS) * x_head_stride
    angle = batch * cos_batch_stride + step * cos_token_stride
    dtype = out_ptr.dtype.element_ty

    low = tl.load(x_ptr + column, inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + PART + column, inside, other=0.0).to(tl.float32)

    out_low, out_high = rotated(low, high, cos_ptr + angle, sin_ptr + angle, column, inside, PART, dtype)

    out_ptr += row.to(tl.int64) * (2 * HALF)
    tl.store(out_ptr + column, out_low, inside)
    tl.store(out_ptr + PART + column, out_high, inside)


def _launch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _launch_parts(x, cos, sin, 1)


def _launch_2d(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _launch_parts(x, cos, sin, 2)


def _launch_parts(x: Tensor, cos: Tensor, sin: Tensor, parts: int) -> Tensor:
    x = unit_stride(x)
    cos, sin, *angle_strides = aligned(cos, sin)
    out = fresh(x)
    if out.numel():
        tokens, heads, dim = x.shape[1:]
        rows = x.shape[0] * tokens * heads
        per_program, warps = head_plan(rows, dim)
        dependent, options = alone()
        _rope_kernel[(-(-rows // per_program),)](
            x, cos, sin, out, rows, tokens, *x.stride()[:3], *angle_strides,
            heads, dim // 2, dim // 2 // parts, power_of_two(dim // 2), per_program, dependent,
            num_warps=warps, **UNFUSED, **options,
        )  # fmt: skip
    return out


@op(launch=_launch, like="x", check=check_rope, example=lambda d: (d.heads(d.sizes.q_heads), *d.angles()))
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of x by their positions.

    x         [B, T, N, D]     fp32, fp16 or bf16, D even
    cos, sin  [B or 1, T, D]   x.dtype
    returns   [B, T, N, D]     x.dtype, contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    return rotate(x, cos, sin)


@op(launch=_launch_2d, like="x", check=check_rope_2d, example=lambda d: (d.heads(d.sizes.q_heads), *d.angles()))
def rope_2d(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of x by two positions: the first half of each by the column of its patch, the other by the row.

    x         [B, T, N, D]     fp32, fp16 or bf16, D a multiple of 4
    cos, sin  [B or 1, T, D]   x.dtype
    returns   [B, T, N, D]     x.dtype, contiguous

    Raises ValueError for shapes and dtypes that do not fit.
    """
    return rotate_2d(x, cos, sin)
