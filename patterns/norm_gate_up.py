"""post_attention_norm, then gate_up of the norm -> gemma4::norm_gate_up      HF: Gemma4TextDecoderLayer.forward"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import gate_up, post_attention_norms
from .fusion import Fusion, layers_without_experts
from .rewrite import Rewrite

ops = torch.ops.gemma4


def search(
    x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, gate_weight: Tensor, up_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden, normed = ops.post_attention_norm(x, residual, weight, next_weight, eps)
    return hidden, ops.gate_up(normed, gate_weight, up_weight)


def replace(
    x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, gate_weight: Tensor, up_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden, gated = ops.norm_gate_up(x, residual, weight, next_weight, gate_weight, up_weight, eps)
    return hidden, gated


def inputs() -> dict[str, Any]:
    return post_attention_norms.inputs() | {name: t for name, t in gate_up.inputs().items() if name != "x"}


@cache
def rewrites() -> tuple[Rewrite, ...]:
    # No guard: both ops have checked these very shapes when they were traced, and allow nothing that the fused one does not.
    return (Rewrite("norm_gate_up", search, replace, inputs),)


# With more rows than pay (plans.norm_products_plan), the op launches the kernels of both ops.
FUSION = Fusion(
    "norm_gate_up", "post_attention_norm + gate_up of its norm", layers_without_experts, rewrites, ops=("norm_gate_up",),
    launches_saved={"norm_gate_up": 1},  # beside those of gate_up; of one or two rows
)  # fmt: skip
