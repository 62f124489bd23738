"""feed_forward_tail_norm, then q, k and v of the norm -> gemma4::norm_linear[_pair, _triple]

HF: Gemma4TextDecoderLayer.forward, over the layer boundary."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemma4_compile.geometry import Geometry

from . import linear
from .feed_forward_tail import example
from .fusion import Fusion, layers_without_experts
from .rewrite import Rewrite
from .template import Match

ops = torch.ops.gemma4


def search_triple(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Any, next_weight: Tensor, first: Tensor, second: Tensor,
    third: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    hidden, normed = ops.feed_forward_tail_norm(x, residual, weight, layer_scalar, next_weight, eps)
    one, two, three = ops.linear_triple(normed, first, second, third)
    return hidden, one, two, three


def replace_triple(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Any, next_weight: Tensor, first: Tensor, second: Tensor,
    third: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    hidden, one, two, three = ops.norm_linear_triple(x, residual, weight, layer_scalar, next_weight, first, second, third, eps)
    return hidden, one, two, three


def search_pair(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Any, next_weight: Tensor, first: Tensor, second: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    hidden, normed = ops.feed_forward_tail_norm(x, residual, weight, layer_scalar, next_weight, eps)
    one, two = ops.linear_pair(normed, first, second)
    return hidden, one, two


def replace_pair(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Any, next_weight: Tensor, first: Tensor, second: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    hidden, one, two = ops.norm_linear_pair(x, residual, weight, layer_scalar, next_weight, first, second, eps)
    return hidden, one, two


def search(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Any, next_weight: Tensor, first: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden, normed = ops.feed_forward_tail_norm(x, residual, weight, layer_scalar, next_weight, eps)
    return hidden, ops.linear(normed, first)


def replace(
    x: Tensor, residual: Tensor, weight: Tensor, layer_scalar: Any, next_weight: Tensor, first: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden, product = ops.norm_linear(x, residual, weight, layer_scalar, next_weight, first, eps)
    return hidden, product


def inputs(*names: str) -> dict[str, Any]:
    tail = example(("x", "residual"), ("weight", "next_weight"), scalar=True)
    return tail | {name: matrix for name, matrix in linear.inputs(*names).items() if name != "x"}


def residual_stream(match: Match) -> str | None:
    """The head reads the norm of the last layer too: a vocabulary of rows, and a norm in front of each."""
    return None if match.outputs[0].users else "nothing reads the sum: the head is no block's first product"


@cache
def rewrites() -> tuple[Rewrite, ...]:
    two, three = ("first", "second"), ("first", "second", "third")
    return (
        Rewrite("norm_linear_triple", search_triple, replace_triple, lambda: inputs(*three), residual_stream),
        Rewrite("norm_linear_pair", search_pair, replace_pair, lambda: inputs(*two), residual_stream),
        Rewrite("norm_linear", search, replace, lambda: inputs("first"), residual_stream),
    )


def _sites(geometry: Geometry) -> tuple[str, ...]:
    """Layers with another behind them, but the last that owns its keys where others share them: YOCO's gather is behind it."""
    if not geometry.scaled:
        return ()
    pairs = zip(geometry.layers, geometry.layers[1:], strict=False)
    joined = {layer.site for layer, following in pairs if layer.shares_kv == following.shares_kv}
    return tuple(site for site in layers_without_experts(geometry) if site in joined)


# With more rows than pay (plans.norm_products_plan), the op launches the kernels of both ops.
FUSION = Fusion(
    "norm_linear", "feed_forward_tail_norm + q, k and v of its norm", _sites, rewrites,
    ops=("norm_linear", "norm_linear_pair", "norm_linear_triple"),
    # Beside those of linear; of one or two rows.
    launches_saved={"norm_linear": 1, "norm_linear_pair": 1, "norm_linear_triple": 1},
)  # fmt: skip
