"""feed_forward_tail, then ple_tail -> gemma4::norm_ple, then the tail that is left      HF: Gemma4TextDecoderLayer.forward

The PLE tail's last kernel, norm, residual, scalar and next norm, is feed_forward_tail's own: it becomes that op, which
norm_linear may take into the next layer's products."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemma4_compile.geometry import Geometry

from . import ple_tail
from .fusion import Fusion, layers_with_ple
from .rewrite import Rewrite

ops = torch.ops.gemma4


def search_norm(
    x: Tensor, residual: Tensor, weight: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor,
    norm_weight: Tensor, layer_scalar: Tensor, next_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden = ops.feed_forward_tail(x, residual, weight, None, eps)
    hidden, normed = ops.ple_tail_norm(
        hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, next_weight, eps
    )
    return hidden, normed


def replace_norm(
    x: Tensor, residual: Tensor, weight: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor,
    norm_weight: Tensor, layer_scalar: Tensor, next_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden, projected = ops.norm_ple(x, residual, weight, per_layer_input, gate_weight, projection_weight, eps)
    hidden, normed = ops.feed_forward_tail_norm(projected, hidden, norm_weight, layer_scalar, next_weight, eps)
    return hidden, normed


def search(
    x: Tensor, residual: Tensor, weight: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor,
    norm_weight: Tensor, layer_scalar: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    hidden = ops.feed_forward_tail(x, residual, weight, None, eps)
    return ops.ple_tail(hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, eps)


def replace(
    x: Tensor, residual: Tensor, weight: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor,
    norm_weight: Tensor, layer_scalar: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    hidden, projected = ops.norm_ple(x, residual, weight, per_layer_input, gate_weight, projection_weight, eps)
    return ops.feed_forward_tail(projected, hidden, norm_weight, layer_scalar, eps)


def inputs(next_norm: bool) -> dict[str, Any]:
    tensors = ple_tail.inputs(next_norm)
    hidden = tensors.pop("hidden")
    return {"x": hidden, "residual": torch.randn_like(hidden), "weight": torch.rand(16) + 0.5} | tensors


@cache
def rewrites() -> tuple[Rewrite, ...]:
    # No guard: the ops have checked these very shapes when they were traced, and allow nothing that the fused ones do not.
    return (
        Rewrite("norm_ple_norm", search_norm, replace_norm, lambda: inputs(True)),
        Rewrite("norm_ple", search, replace, lambda: inputs(False)),
    )


def _sites(geometry: Geometry) -> tuple[str, ...]:
    """None where the model is divided: the sum over the ranks takes the norm there."""
    return () if geometry.ranks > 1 else layers_with_ple(geometry)


# With more rows than pay (plans.norm_ple_plan), the op launches the kernels of both.
FUSION = Fusion(
    "norm_ple", "feed_forward_tail + the products of ple_tail", _sites, rewrites, ops=("norm_ple",),
    launches_saved={"norm_ple_norm": 1, "norm_ple": 1},  # beside those of ple_tail; of one or two rows
)  # fmt: skip
