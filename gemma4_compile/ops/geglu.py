"""geglu: gelu_tanh(gate) * up.

Source: Gemma4TextMLP.forward (transformers). gelu is rounded to the input's dtype before the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import expect, fresh, register


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    return F.gelu(gate, approximate="tanh") * up


def _check(gate: Tensor, up: Tensor) -> None:
    expect("geglu: up must have gate's shape", up.shape, gate.shape, "pass the two projections of one input")


def launch_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return geglu_reference(gate, up).contiguous()


def _geglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    return fresh(gate)


register(
    "geglu(Tensor gate, Tensor up) -> Tensor",
    reference=geglu_reference,
    launch=launch_geglu,
    fake=_geglu_fake,
)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up.

    gate     [..., I]  fp32, fp16 or bf16
    up       [..., I]
    returns  [..., I]  gate.dtype, contiguous
    """
    return torch.ops.gemma4.geglu(gate, up)
