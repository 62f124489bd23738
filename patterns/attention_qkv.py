"""qkv_norm_rope and the attention that writes its K and V into pages      Gemma4TextAttention.forward, packed/attention.py

In packed steps, and in layers that own KV: elsewhere a cache of Hugging Face's stands between the two."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .fusion import Fusion
from .rewrite import Rewrite

ops = torch.ops.gemma4


def _normed(q: Any, k: Any, v: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, eps: float) -> Any:
    q, k, v = ops.qkv_norm_rope(q, k, v, q_weight, k_weight, cos, sin, eps)
    # Hugging Face puts the heads first, and our attention interface puts them back.
    return (x.transpose(1, 2).transpose(1, 2) for x in (q, k, v))


def search(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, keys: Tensor,
    values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int, scale: float,
) -> Tensor:  # fmt: skip
    q, k, v = _normed(q, k, v, q_weight, k_weight, cos, sin, eps)
    return ops.attention(q, k, v, keys, values, slots, table, positions, starts, layer, window, scale)


def replace(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, keys: Tensor,
    values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int, scale: float,
) -> Tensor:  # fmt: skip
    return ops.attention_qkv(
        q, k, v, q_weight, k_weight, cos, sin, eps, keys, values, slots, table, positions, starts, layer, window, scale
    )


def search_masked(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, keys: Tensor,
    values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int, scale: float,
    visible: Tensor,
) -> Tensor:  # fmt: skip
    q, k, v = _normed(q, k, v, q_weight, k_weight, cos, sin, eps)
    return ops.attention(q, k, v, keys, values, slots, table, positions, starts, layer, window, scale, visible)


def replace_masked(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, keys: Tensor,
    values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int, scale: float,
    visible: Tensor,
) -> Tensor:  # fmt: skip
    return ops.attention_qkv(
        q, k, v, q_weight, k_weight, cos, sin, eps, keys, values, slots, table, positions, starts, layer, window, scale, visible
    )


def search_ahead(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, keys: Tensor,
    values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int, scale: float,
    visible: Tensor, until: Tensor,
) -> Tensor:  # fmt: skip
    q, k, v = _normed(q, k, v, q_weight, k_weight, cos, sin, eps)
    return ops.attention(q, k, v, keys, values, slots, table, positions, starts, layer, window, scale, visible, until)


def replace_ahead(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, keys: Tensor,
    values: Tensor, slots: Tensor, table: Tensor, positions: Tensor, starts: Tensor, layer: int, window: int, scale: float,
    visible: Tensor, until: Tensor,
) -> Tensor:  # fmt: skip
    step = keys, values, slots, table, positions, starts
    return ops.attention_qkv(q, k, v, q_weight, k_weight, cos, sin, eps, *step, layer, window, scale, visible, until)


def inputs() -> dict[str, Any]:
    """Three rows of one request, in the second of two pages."""
    heads = {"q": torch.randn(1, 3, 4, 8)} | {name: torch.randn(1, 3, 2, 8) for name in "kv"}
    norms = {name: torch.rand(8) + 0.5 for name in ("q_weight", "k_weight")}
    rotary = {name: torch.randn(1, 3, 8) for name in ("cos", "sin")}
    pages = {name: torch.zeros(2, 16, 2, 8) for name in ("keys", "values")}
    step = {
        "slots": torch.arange(16, 19), "table": torch.tensor([[1]], dtype=torch.int32), "positions": torch.arange(3),
        "starts": torch.tensor([0, 3], dtype=torch.int32),
    }  # fmt: skip
    return heads | norms | rotary | {"eps": 1e-6} | pages | step | {"layer": 0, "window": 2, "scale": 1.0}


def inputs_masked() -> dict[str, Any]:
    """The same, where the first keys are hidden."""
    return inputs() | {"visible": torch.arange(32)[None] > 1}


def inputs_ahead() -> dict[str, Any]:
    """The same, where the first two rows see each other in both directions."""
    return inputs_masked() | {"until": torch.tensor([1, 1, 2], dtype=torch.int32)}


@cache
def rewrites() -> tuple[Rewrite, ...]:
    # No guard: both ops have checked these very shapes when they were traced, and allow nothing that the fused one does not.
    return (
        Rewrite("attention_qkv", search_masked, replace_masked, inputs_masked),  # what packed steps of models have
        Rewrite("attention_qkv_unmasked", search, replace, inputs),
        Rewrite("attention_qkv_ahead", search_ahead, replace_ahead, inputs_ahead),  # sliding layers of prompts with images
    )


FUSION = Fusion(
    "attention_qkv", "qkv_norm_rope + attention's write of K and V into pages; in packed steps",
    lambda geometry: tuple(layer.site for layer in geometry.layers if not layer.shares_kv), rewrites, packed=True,
    launches_saved={"attention_qkv": 1, "attention_qkv_unmasked": 1, "attention_qkv_ahead": 1},  # beside those of qkv_norm_rope
)  # fmt: skip
