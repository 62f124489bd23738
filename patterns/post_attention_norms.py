"""post-attention norm + residual + the norms that read the sum      HF: Gemma4TextDecoderLayer, Gemma4TextRouter

Two forms: with experts the sum is read by three norms (feed-forward, router with its scales, experts); without, by one."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .fusion import Fusion, every_layer
from .rewrite import Rewrite, all_guards, same_dtype, same_shape, vectors_of_last_dim
from .template import Match

ops = torch.ops.gemma4


def search_moe(
    x: Tensor, residual: Tensor, weight: Tensor, feed_forward_weight: Tensor, router_scale: Tensor, router_root: float,
    expert_weight: Tensor, eps: float, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    hidden = residual + ops.rms_norm(x, weight, eps)
    feed_forward_in = ops.rms_norm(hidden, feed_forward_weight, eps)
    rows = hidden.reshape(-1, width)
    router_in = ops.rms_norm_noscale(rows, eps) * router_scale * router_root
    return hidden, feed_forward_in, router_in, ops.rms_norm(rows, expert_weight, eps)


def replace_moe(
    x: Tensor, residual: Tensor, weight: Tensor, feed_forward_weight: Tensor, router_scale: Tensor, router_root: float,
    expert_weight: Tensor, eps: float, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    hidden, feed_forward_in, router_in, expert_in = ops.post_attention_norms(
        x, residual, weight, feed_forward_weight, router_scale, router_root, expert_weight, eps
    )
    return hidden, feed_forward_in, router_in.reshape(-1, width), expert_in.reshape(-1, width)


def search(x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    hidden = residual + ops.rms_norm(x, weight, eps)
    return hidden, ops.rms_norm(hidden, next_weight, eps)


def replace(x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    hidden, normed = ops.post_attention_norm(x, residual, weight, next_weight, eps)
    return hidden, normed


def inputs() -> dict[str, Any]:
    rows = {name: torch.randn(2, 3, 16) for name in ("x", "residual")}
    return rows | {name: torch.rand(16) + 0.5 for name in ("weight", "next_weight")} | {"eps": 1e-6}


def inputs_moe() -> dict[str, Any]:
    rows = {name: torch.randn(2, 3, 16) for name in ("x", "residual")}
    vectors = ("weight", "feed_forward_weight", "router_scale", "expert_weight")
    return rows | {name: torch.rand(16) + 0.5 for name in vectors} | {"router_root": 0.25, "eps": 1e-6, "width": 16}


def residual_stream(match: Match) -> str | None:
    """The sum goes on as the residual. With experts, the sum of the two branches looks the same, but only its norm reads it."""
    return "nothing but the norm reads the sum: no residual stream" if len(match.outputs[0].users) < 2 else None


@cache
def rewrites() -> tuple[Rewrite, ...]:
    def guard(*vectors: str) -> Any:
        return all_guards(
            same_dtype("x", "residual", *vectors), same_shape("x", "residual"), vectors_of_last_dim("x", *vectors)
        )

    return (
        # The larger form first: the smaller one is contained in it.
        Rewrite(
            "post_attention_norms", search_moe, replace_moe, inputs_moe,
            guard("weight", "feed_forward_weight", "router_scale", "expert_weight"),
        ),
        Rewrite(
            "post_attention_norm", search, replace, inputs, all_guards(guard("weight", "next_weight"), residual_stream),
        ),
    )  # fmt: skip


FUSION = Fusion(
    "post_attention_norms", "post-attention norm + residual + the norms that read it", every_layer, rewrites,
    ops=("post_attention_norm", "post_attention_norms"),
)  # fmt: skip
