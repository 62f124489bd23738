"""the per-layer embedding (PLE) block at the end of a layer      HF: Gemma4TextDecoderLayer.forward

Gate GEMM, gelu(gate) * per-layer input, projection GEMM, norm, residual, layer scalar [+ the next layer's input norm]."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fusion import Fusion, layers_with_ple
from .rewrite import Guard, Rewrite, all_guards, one_element, same_dtype, vectors_of_last_dim
from .template import Match, value_of

ops = torch.ops.gemma4


def search_norm(
    hidden: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor, norm_weight: Tensor,
    layer_scalar: Tensor, next_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gated = ops.geglu(F.linear(hidden, gate_weight, None), per_layer_input)
    hidden = (hidden + ops.rms_norm(F.linear(gated, projection_weight, None), norm_weight, eps)) * layer_scalar
    return hidden, ops.rms_norm(hidden, next_weight, eps)


def replace_norm(
    hidden: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor, norm_weight: Tensor,
    layer_scalar: Tensor, next_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden, normed = ops.ple_tail_norm(
        hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, next_weight, eps
    )
    return hidden, normed


def search(
    hidden: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor, norm_weight: Tensor,
    layer_scalar: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    gated = ops.geglu(F.linear(hidden, gate_weight, None), per_layer_input)
    return (hidden + ops.rms_norm(F.linear(gated, projection_weight, None), norm_weight, eps)) * layer_scalar


def replace(
    hidden: Tensor, per_layer_input: Tensor, gate_weight: Tensor, projection_weight: Tensor, norm_weight: Tensor,
    layer_scalar: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    return ops.ple_tail(hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, eps)


def inputs(next_norm: bool) -> dict[str, Any]:
    tensors = {
        "hidden": torch.randn(2, 3, 16), "per_layer_input": torch.randn(2, 3, 8), "gate_weight": torch.randn(8, 16),
        "projection_weight": torch.randn(16, 8), "norm_weight": torch.rand(16) + 0.5, "layer_scalar": torch.full((1,), 0.7),
    }  # fmt: skip
    return tensors | ({"next_weight": torch.rand(16) + 0.5} if next_norm else {}) | {"eps": 1e-6}


def gemm_shapes(match: Match) -> str | None:
    """The two GEMMs go down to the per-layer width and back up again."""
    values = {name: value_of(match.binding[name]) for name in ("hidden", "gate_weight", "projection_weight")}
    width, gate, projection = (v.shape for v in values.values() if v is not None)
    if tuple(gate) != tuple(reversed(projection)) or gate[1] != width[-1]:
        return f"gate_weight must be [P, H] and projection_weight [H, P], found {list(gate)} and {list(projection)}"
    return None


def _guard(*vectors: str) -> Guard:
    tensors = ("hidden", "per_layer_input", "gate_weight", "projection_weight", *vectors, "layer_scalar")
    return all_guards(same_dtype(*tensors), vectors_of_last_dim("hidden", *vectors), gemm_shapes, one_element("layer_scalar"))


@cache
def rewrites() -> tuple[Rewrite, ...]:
    return (
        Rewrite("ple_tail_norm", search_norm, replace_norm, lambda: inputs(True), _guard("norm_weight", "next_weight")),
        Rewrite("ple_tail", search, replace, lambda: inputs(False), _guard("norm_weight")),
    )


FUSION = Fusion(
    "ple_tail", "PLE gate, projection, norm, residual, scalar [+ the next layer's norm]", layers_with_ple, rewrites,
    ops=("ple_tail", "ple_tail_norm"), launches_saved={"ple_tail": 1, "ple_tail_norm": 1},
)  # fmt: skip
