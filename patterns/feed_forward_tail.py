"""post-feed-forward norm(s) + residual [* layer scalar] [+ the next layer's input norm]      HF: Gemma4TextDecoderLayer.forward

The next norm belongs to the next layer, or is the model's last: the fusion goes over the layer boundary. With experts, the
norms of the dense and the expert branch and their sum come first. With PLE neither scalar nor next norm follows here, they
are part of `ple_tail`."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemma4_compile.geometry import Geometry

from .fusion import Fusion, every_layer
from .rewrite import Rewrite, all_guards, one_element, same_dtype, same_shape, vectors_of_last_dim
from .template import Match

ops = torch.ops.gemma4


def search_moe_norm(
    dense: Tensor, experts: Tensor, residual: Tensor, dense_weight: Tensor, expert_weight: Tensor, weight: Tensor,
    layer_scalar: Tensor, next_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    branches = ops.rms_norm(dense, dense_weight, eps) + ops.rms_norm(experts, expert_weight, eps)
    hidden = (residual + ops.rms_norm(branches, weight, eps)) * layer_scalar
    return hidden, ops.rms_norm(hidden, next_weight, eps)


def replace_moe_norm(
    dense: Tensor, experts: Tensor, residual: Tensor, dense_weight: Tensor, expert_weight: Tensor, weight: Tensor,
    layer_scalar: Tensor, next_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden, normed = ops.moe_feed_forward_tail_norm(
        dense, experts, residual, dense_weight, expert_weight, weight, layer_scalar, next_weight, eps
    )
    return hidden, normed


def search_moe(
    dense: Tensor, experts: Tensor, residual: Tensor, dense_weight: Tensor, expert_weight: Tensor, weight: Tensor,
    layer_scalar: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    branches = ops.rms_norm(dense, dense_weight, eps) + ops.rms_norm(experts, expert_weight, eps)
    return (residual + ops.rms_norm(branches, weight, eps)) * layer_scalar


def replace_moe(
    dense: Tensor, experts: Tensor, residual: Tensor, dense_weight: Tensor, expert_weight: Tensor, weight: Tensor,
    layer_scalar: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    return ops.moe_feed_forward_tail(dense, experts, residual, dense_weight, expert_weight, weight, layer_scalar, eps)


def search_norm(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden = (residual + ops.rms_norm(x, weight, eps)) * layer_scalar
    return hidden, ops.rms_norm(hidden, next_weight, eps)


def replace_norm(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor, next_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden, normed = ops.feed_forward_tail_norm(x, residual, weight, layer_scalar, next_weight, eps)
    return hidden, normed


def search_scalar(x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor, eps: float) -> Tensor:
    return (residual + ops.rms_norm(x, weight, eps)) * layer_scalar


def replace_scalar(x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Tensor, eps: float) -> Tensor:
    return ops.feed_forward_tail(x, residual, weight, layer_scalar, eps)


def search(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return residual + ops.rms_norm(x, weight, eps)


def replace(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.feed_forward_tail(x, residual, weight, None, eps)


def example(rows: tuple[str, ...], vectors: tuple[str, ...], scalar: bool) -> dict[str, Any]:
    tensors = {name: torch.randn(2, 3, 16) for name in rows} | {name: torch.rand(16) + 0.5 for name in vectors}
    return tensors | ({"layer_scalar": torch.full((1,), 0.7)} if scalar else {}) | {"eps": 1e-6}


def not_normed(match: Match) -> str | None:
    """The plain sum of a post-attention block looks the same; it alone is read by a norm."""
    reader = next((user for user in match.outputs[0].users if user.target is ops.rms_norm), None)
    return None if reader is None else f"the sum is read by {reader.name}: a site of post_attention_norms"


@cache
def rewrites() -> tuple[Rewrite, ...]:
    def rewrite(name: str, search: Any, replace: Any, rows: tuple[str, ...], vectors: tuple[str, ...], scalar: bool) -> Rewrite:
        guard = all_guards(
            same_dtype(*rows, *vectors, *(["layer_scalar"] if scalar else [])),
            same_shape(*rows),
            vectors_of_last_dim(rows[0], *vectors),
            *([one_element("layer_scalar")] if scalar else [not_normed]),
        )
        return Rewrite(name, search, replace, lambda: example(rows, vectors, scalar), guard)

    moe, dense = ("dense", "experts", "residual"), ("x", "residual")
    moe_vectors, next_weight = ("dense_weight", "expert_weight", "weight"), ("next_weight",)
    return (
        # Larger forms first: each later one is contained in an earlier one.
        rewrite("moe_feed_forward_tail_norm", search_moe_norm, replace_moe_norm, moe, moe_vectors + next_weight, True),
        rewrite("moe_feed_forward_tail", search_moe, replace_moe, moe, moe_vectors, True),
        rewrite("feed_forward_tail_norm", search_norm, replace_norm, dense, ("weight", *next_weight), True),
        rewrite("feed_forward_tail_scalar", search_scalar, replace_scalar, dense, ("weight",), True),
        rewrite("feed_forward_tail", search, replace, dense, ("weight",), False),
    )


def _sites(geometry: Geometry) -> tuple[str, ...]:
    """Without a scalar, a tail with the next layer's norm is what post_attention_norms looks for; the last layer's has none."""
    return every_layer(geometry) if geometry.scaled else every_layer(geometry)[-1:]


FUSION = Fusion(
    "feed_forward_tail", "post-FF norms + residual [* scalar] [+ the next layer's norm]", _sites, rewrites,
    ops=("feed_forward_tail", "feed_forward_tail_norm", "moe_feed_forward_tail", "moe_feed_forward_tail_norm"),
)  # fmt: skip
