"""qkv_norm_rope, q_norm_rope: the norms of Q, K and V, and the rotation of Q and K, in one launch.

Source: Gemma4TextAttention.forward (transformers). q_norm and k_norm have weights, v_norm has none and v is not
rotated. Layers that reuse another layer's keys and values have only q. q [B, T, Hq, D]; k and v [B, T, Hk, D]; v may be
the very tensor k (attention_k_eq_v).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import expect, fresh, register
from .rms_norm import normalize
from .rope import check_rope, rotate


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
        expect(f"{op}: each weight must be [D] for heads of D", weight.shape, q.shape[-1:], "pass this layer's norms")


def _check(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_rope("qkv_norm_rope", q, cos, sin)
    _check_weights("qkv_norm_rope", q, q_weight, k_weight)
    b, t, _, d = q.shape
    expect("qkv_norm_rope: k must be [B, T, Hk, D]", k.shape, (b, t, k.shape[2], d), "view the projection as heads")
    expect("qkv_norm_rope: v must have k's shape", v.shape, k.shape, "pass keys and values of one layer")


def launch_q_norm_rope(q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return q_norm_rope_reference(q, q_weight, cos, sin, eps).contiguous()


def launch_qkv_norm_rope(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_norm_rope_reference(q, k, v, q_weight, k_weight, cos, sin, eps)
    return q.contiguous(), k.contiguous(), v.contiguous()


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
