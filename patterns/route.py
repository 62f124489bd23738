"""softmax, top-k, renormalize, per-expert scale <-> gemma4::route(logits, per_expert_scale, top_k)   HF: Gemma4TextRouter

The template is the router's own forward, cut behind its projection: the GEMM stays with the vendor's library."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

from .capture import capture
from .fusion import Fusion, layers_with_experts
from .rewrite import Rewrite, vectors_of_last_dim
from .template import Match, Template, value_of

TOP_K, EXPERTS = 17, 97  # top_k's stand-in in the capture, and a number of experts above it


def replace(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, indices = torch.ops.gemma4.route(logits, per_expert_scale, top_k)
    return weights, indices


def inputs() -> dict[str, Any]:
    return {"logits": torch.randn(5, 16), "per_expert_scale": torch.rand(16) + 0.5, "top_k": 4}


def guard(match: Match) -> str | None:
    logits = value_of(match.binding["logits"])
    if logits is None or logits.dim() != 2:
        return "logits must be [tokens, experts]"
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {str(logits.dtype).removeprefix('torch.')}"
    return vectors_of_last_dim("logits", "per_expert_scale")(match)


@cache
def captured() -> Template:
    config = Gemma4TextConfig(hidden_size=32, num_experts=EXPERTS, top_k_experts=TOP_K, enable_moe_block=True)
    router = Gemma4TextRouter(config).requires_grad_(False)

    def weights_and_indices(x: Tensor, per_expert_scale: Tensor) -> tuple[Tensor, Tensor]:
        return router(x)[1:]

    names = {"logits": torch.randn(5, 32), "per_expert_scale": router.per_expert_scale}
    return capture(
        weights_and_indices, names, {"top_k": TOP_K}, cut=lambda node: node.target is F.linear, source=Gemma4TextRouter.forward
    )


@cache
def rewrites() -> tuple[Rewrite, ...]:
    return (Rewrite("route", captured(), replace, inputs, guard),)


FUSION = Fusion(
    "route", "softmax, top-k, renormalize, per-expert scale", layers_with_experts, rewrites, ops=("route",),
    launches_saved={"route": 3},
)  # fmt: skip
