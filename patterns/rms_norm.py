"""Gemma4RMSNorm.forward <-> gemma4::rms_norm(x, weight, eps), gemma4::rms_norm_noscale(x, eps)"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from .capture import capture
from .rewrite import Rewrite
from .template import Template

EPS = 1.2345e-5  # stands for eps in the captures: no other literal of the module equals it


def replace_scaled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.gemma4.rms_norm(x, weight, eps)


def replace_plain(x: Tensor, eps: float) -> Tensor:
    return torch.ops.gemma4.rms_norm_noscale(x, eps)


def inputs_scaled() -> dict[str, Any]:
    return {"x": torch.randn(3, 16), "weight": torch.rand(16) + 0.5, "eps": 1e-6}


def inputs_plain() -> dict[str, Any]:
    return {"x": torch.randn(3, 16), "eps": 1e-6}


@cache
def captured(with_scale: bool) -> Template:
    """Hugging Face's norm as Dynamo traces it."""
    norm = Gemma4RMSNorm(16, eps=EPS, with_scale=with_scale).requires_grad_(False)
    x = torch.randn(3, 16)
    if not with_scale:
        return capture(lambda x: norm(x), {"x": x}, {"eps": EPS}, source=Gemma4RMSNorm.forward)
    return capture(lambda x, weight: norm(x), {"x": x, "weight": norm.weight}, {"eps": EPS}, source=Gemma4RMSNorm.forward)


@cache
def rewrites() -> tuple[Rewrite, ...]:
    return (
        Rewrite("rms_norm", captured(True), replace_scaled, inputs_scaled),
        Rewrite("rms_norm_noscale", captured(False), replace_plain, inputs_plain),
    )
