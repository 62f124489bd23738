"""rope: rotary position embedding of one tensor of heads.

Source: apply_rotary_pos_emb with unsqueeze_dim=2, and rotate_half (transformers). Rounds after each product and after
the sum, as the unfused graph does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import expect, fresh, register


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, N, D], cos and sin [B or 1, T, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos.unsqueeze(2)) + (turned * sin.unsqueeze(2))


def check_rope(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    expect(f"{op}: x must be [B, T, N, D]", x.dim(), 4, "view the projection as heads first")
    rows = cos.shape[0]
    expect(
        f"{op}: cos must be [B or 1, T, D]",
        cos.shape,
        (rows if rows == 1 else x.shape[0], x.shape[1], x.shape[3]),
        "pass the position embeddings of these tokens",
    )
    expect(f"{op}: sin must have cos's shape", sin.shape, cos.shape, "pass both of one rotary embedding")


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    check_rope("rope", x, cos, sin)
    return rotate(x, cos, sin)


def launch_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope_reference(x, cos, sin).contiguous()


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    check_rope("rope", x, cos, sin)
    return fresh(x)


register(
    "rope(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    reference=rope_reference,
    launch=launch_rope,
    fake=_rope_fake,
)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of x by their positions.

    x         [B, T, N, D]     fp32, fp16 or bf16, D even
    cos, sin  [B or 1, T, D]
    returns   [B, T, N, D]     x.dtype, contiguous
    """
    return torch.ops.gemma4.rope(x, cos, sin)
