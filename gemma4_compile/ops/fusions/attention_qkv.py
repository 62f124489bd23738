"""attention_qkv: qkv_norm_rope and attention of one layer, where the first launch writes K and V into the pages itself.

Source: Gemma4TextAttention.forward (transformers). Attention alone is given normed and rotated keys and values and copies them
to their slots: a launch, a write and a read of both more. Here the launch that norms and rotates stores them there. The pages
hold the same bits: rounded to the model's dtype, then to that of the pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_compile.ops.attention import attention, check_attention, check_lengths, check_pages, launch_planned, takes
from gemma4_compile.ops.library import fresh, op

from .qkv_norm_rope import check_qkv, launch_into_pages, qkv_norm_rope


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, keys: Tensor,
    values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor,
) -> None:  # fmt: skip
    """In the names of the ops that have the rules."""
    check_qkv("qkv_norm_rope", q, k, v, q_weight, k_weight, cos, sin)
    check_attention("attention", q, k, v, keys, values, slots, table, positions, starts)


def _launch_into(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, window: int, scale: float,
    visible: Tensor | None = None, until: Tensor | None = None,
) -> None:  # fmt: skip
    """What a trace may not compare is checked here, as everything is before the pages are written."""
    check_lengths(q, k, slots, table, positions, starts, visible, until)
    check_pages(keys, values)
    queries = fresh(q)
    launch_into_pages(queries, q, k, v, q_weight, k_weight, cos, sin, eps, keys, values, slots)
    step = keys, values, slots, table, positions, starts, window, scale
    launch_planned(out, queries, None, None, *step, visible=visible, until=until)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int,
    scale: float, visible: Tensor | None = None, until: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = fresh(q)
    projections = q, k, v, q_weight, k_weight, cos, sin, eps
    _launch_into(out, *projections, keys, values, slots, table, positions, starts, window, scale, visible, until)
    return out


@op(launch=_launch, like="q", check=_check, mutates=("keys", "values"))
def attention_qkv(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int,
    scale: float, visible: Tensor | None = None, until: Tensor | None = None,
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
    q, k, v = qkv_norm_rope.reference(q, k, v, q_weight, k_weight, cos, sin, eps)
    step = keys, values, slots, table, positions, starts, layer, window, scale
    return attention.reference(q, k, v, *step, visible, until)


def attention_qkv_into(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    keys: Tensor, values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int,
    window: int = 0, scale: float = 1.0, visible: Tensor | None = None, until: Tensor | None = None,
) -> None:  # fmt: skip
    """As `attention_qkv`, written to `out`: [1, T, Hq, D], contiguous, q.dtype; see `attention_into`."""
    projections = q, k, v, q_weight, k_weight, cos, sin, eps
    step = keys, values, slots, table, positions, starts
    if takes(out, q):
        _check("attention_qkv", *projections[:-1], *step)
        with torch.cuda.device(q.device):  # Triton launches on the current device, whatever the tensors' own is
            _launch_into(out, *projections, *step, window, scale, visible, until)
    else:
        out.copy_(attention_qkv.reference(*projections, *step, layer, window, scale, visible, until))
