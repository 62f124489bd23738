"""block_attention: attention in both directions within blocks of packed rows: the patches of many images, one after another.

Source: Gemma4VisionAttention.forward and sdpa_attention_forward (transformers), where each image is a row of a padded batch. On
a GPU torch's own kernel for sequences of any length does it (torch.nn.attention.varlen), which is FlashAttention 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import expect, fresh, op


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, reach: Tensor) -> None:
    expect(op, "q must be [1, N, Hq, D]", (q.dim(), q.shape[0]), (4, 1), "pack the images into one row of patches")
    expect(op, "k must be [1, N, Hk, D]", (k.shape[0], *k.shape[3:]), (1, *q.shape[3:]), "pass keys of the same patches")
    expect(op, "v must have k's shape", v.shape, k.shape, "pass keys and values of one layer")
    expect(op, "Hq must be a multiple of Hk", q.shape[2] % k.shape[2], 0, "pass this layer's heads")
    expect(op, "starts must be [blocks + 1] int32", (starts.dim(), starts.dtype), (1, torch.int32), "count from 0")
    expect(op, "reach must be [longest]", reach.dim(), 1, "its length alone counts")


def _launch(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, reach: Tensor, scale: float) -> Tensor:
    out = fresh(q)
    launch_into(out, q, k, v, starts, reach, scale)
    return out


def launch_into(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, reach: Tensor, scale: float
) -> None:  # fmt: skip
    if q.dtype == torch.float32 or not q.is_cuda:  # no FlashAttention in fp32
        out.copy_(_blocks(q, k, v, starts, scale))
        return
    longest, group = reach.shape[0], q.shape[2] // k.shape[2]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    # What varlen_attn calls; itself it takes a scale from torch 2.11 on, and is an op within this one.
    found = torch.ops.aten._flash_attention_forward(
        q[0], k[0], v[0], starts, starts, longest, longest, 0.0, False, return_debug_mask=False, scale=scale
    )
    out.copy_(found[0][None])


def _blocks(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """Block by block."""
    out = q.new_zeros(q.shape)
    bounds = starts.tolist()
    group = q.shape[2] // k.shape[2]
    for first, last in zip(bounds, bounds[1:], strict=False):
        if first < last:
            queries, keys, values = (x[:, first:last].transpose(1, 2) for x in (q, k, v))
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
            out[:, first:last] = F.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2)
    return out


@op(launch=_launch, like="q", check=_check)
def block_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, reach: Tensor, scale: float) -> Tensor:
    """Attention of N packed rows within their blocks, in both directions.

    q        [1, N, Hq, D]        fp32, fp16 or bf16; rows of one block stand together
    k, v     [1, N, Hk, D]        q.dtype
    starts   [blocks + 1] int32   rows of block i are starts[i] to starts[i + 1]; from the last on they are padding
    reach    [longest]            of any dtype: its length is the number of rows that a block may have
    returns  [1, N, Hq, D]        q.dtype, contiguous; padding is anything

    Raises ValueError for shapes and dtypes that do not fit.
    """
    return _blocks(q, k, v, starts, scale)


def block_attention_into(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, reach: Tensor, scale: float
) -> None:  # fmt: skip
    """As `block_attention`, written to `out`: [1, N, Hq, D], contiguous, q.dtype."""
    _check("block_attention", q, k, v, starts, reach)
    expect("block_attention", "out must have q's shape and dtype", (*out.shape, out.dtype), (*q.shape, q.dtype), "allocate it")
    launch_into(out, q, k, v, starts, reach, scale)
