"""gelu_tanh(x gate^T) * (x up^T) -> gemma4::gate_up      HF: Gemma4TextMLP.forward, without its down_proj"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fusion import Fusion, every_layer
from .linear import matrices
from .rewrite import Rewrite, all_guards, same_dtype, same_shape

ops = torch.ops.gemma4


def search(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    return ops.geglu(F.linear(x, gate_weight, None), F.linear(x, up_weight, None))


def replace(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    return ops.gate_up(x, gate_weight, up_weight)


def inputs() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 16), "gate_weight": torch.randn(24, 16), "up_weight": torch.randn(24, 16)}


@cache
def rewrites() -> tuple[Rewrite, ...]:
    weights = ("gate_weight", "up_weight")
    guard = all_guards(same_dtype("x", *weights), matrices(*weights), same_shape(*weights))
    return (Rewrite("gate_up", search, replace, inputs, guard),)


# With more rows than pay (plans.product_plan), the op's products are cuBLAS's, as Inductor's are.
FUSION = Fusion(
    "gate_up", "gate and up projections + gelu_tanh(gate) * up", every_layer, rewrites, ops=("gate_up",),
    launches_saved={"gate_up": 2},  # of up to 32 rows
)  # fmt: skip
