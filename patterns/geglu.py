"""gelu_tanh(gate) * up <-> gemma4::geglu(gate, up)      HF: act_fn of Gemma4TextMLP, of the experts and of the PLE gate"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextMLP

from .capture import capture
from .rewrite import Rewrite, all_guards, same_dtype, same_shape
from .template import Template


def replace(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.gemma4.geglu(gate, up)


def inputs() -> dict[str, Any]:
    return {"gate": torch.randn(4, 64), "up": torch.randn(4, 64)}


@cache
def captured() -> Template:
    act_fn = ACT2FN["gelu_pytorch_tanh"]
    return capture(lambda gate, up: act_fn(gate) * up, inputs(), source=Gemma4TextMLP.forward)


@cache
def rewrites() -> tuple[Rewrite, ...]:
    guard = all_guards(same_dtype("gate", "up"), same_shape("gate", "up"))
    return (Rewrite("geglu", captured(), replace, inputs, guard),)
