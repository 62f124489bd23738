"""attention_qkv: qkv_norm_rope and attention of one layer, where the first launch writes K and V into the pages itself.

Source: Gemma4TextAttention.forward (transformers). Attention alone is given normed and rotated keys and values and copies them
to their slots: a launch, a write and a read of both more. Here the launch that norms and rotates stores them there. The pages
hold the same bits: rounded to the model's dtype, then to that of the pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_compile.ops.attention import attention_reference, check_attention, check_lengths, check_pages, launch_planned, takes
from gemma4_compile.ops.library import define, fresh

from .qkv_norm_rope import check_qkv, launch_into_pages, qkv_norm_rope_reference


def attention_qkv_reference(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int,
    scale: float, visible: Tensor | None = None,
) -> Tensor:  # fmt: skip
    q, k, v = qkv_norm_rope_reference(q, k, v, q_weight, k_weight, cos, sin, eps)
    return attention_reference(q, k, v, keys, values, slots, table, positions, starts, layer, window, scale, visible)


def launch_attention_qkv(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int,
    scale: float, visible: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = fresh(q)
    projections = q, k, v, q_weight, k_weight, cos, sin, eps
    _launch(out, *projections, keys, values, slots, table, positions, starts, window, scale, visible=visible)
    return out


def _launch(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, window: int, scale: float,
    visible: Tensor | None = None,
) -> None:  # fmt: skip
    """Everything is checked before the pages are written."""
    check_qkv(q, k, v, q_weight, k_weight, cos, sin)
    check_attention(q, k, v, keys, values, slots, table, positions, starts)
    check_lengths(q, k, slots, table, positions, starts, visible)
    check_pages(keys, values)
    queries = fresh(q)
    launch_into_pages(queries, q, k, v, q_weight, k_weight, cos, sin, eps, keys, values, slots)
    launch_planned(out, queries, None, None, keys, values, slots, table, positions, starts, window, scale, visible=visible)


def _attention_qkv_fake(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int,
    scale: float, visible: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check_qkv(q, k, v, q_weight, k_weight, cos, sin)
    check_attention(q, k, v, keys, values, slots, table, positions, starts)
    return fresh(q)


define(
    "attention_qkv(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps,"
    " Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor table, Tensor positions, Tensor starts, int layer, int window,"
    " float scale, Tensor? visible=None) -> Tensor",
    reference=attention_qkv_reference,
    launch=launch_attention_qkv,
    fake=_attention_qkv_fake,
)


def attention_qkv(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int,
    window: int = 0, scale: float = 1.0, visible: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of raw projections: norm of q, k and v, rotation of q and k, then `attention` over the pages.

    q                   [1, T, Hq, D]  as qkv_norm_rope takes it, any strides
    k, v                [1, T, Hk, D]  may be one tensor
    q_weight, k_weight  [D]
    cos, sin            [1, T, D]
    keys, ...           as attention takes them; each of the T rows is new and asks
    returns             [1, T, Hq, D]  q.dtype, contiguous; zero for padding rows

    Raises ValueError for shapes that do not fit, in the name of the op that has the rule.
    """
    return torch.ops.gemma4.attention_qkv(
        q,
        k,
        v,
        q_weight,
        k_weight,
        cos,
        sin,
        eps,
        keys,
        values,
        slots,
        table,
        positions,
        starts,
        layer,
        window,
        scale,
        visible,
    )


def attention_qkv_into(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int,
    window: int = 0, scale: float = 1.0, visible: Tensor | None = None,
) -> None:  # fmt: skip
    """As `attention_qkv`, written to `out`: [1, T, Hq, D], contiguous, q.dtype; see `attention_into`."""
    projections = q, k, v, q_weight, k_weight, cos, sin, eps
    step = keys, values, slots, table, positions, starts
    if takes(out, q):
        with torch.cuda.device(q.device):  # Triton launches on the current device, whatever the tensors' own is
            _launch(out, *projections, *step, window, scale, visible)
    else:
        out.copy_(attention_qkv_reference(*projections, *step, layer, window, scale, visible))
