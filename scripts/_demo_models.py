"""Shapes and start values of the demo models. Training is in _demo_target.py and _demo_assistant.py."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import Gemma4AssistantConfig, Gemma4ForCausalLM, Gemma4TextConfig, GenerationConfig

from gemma4_compile.hf.assistant import assistant_class

VOCAB = 2048
SLIDING, FULL = "sliding_attention", "full_attention"
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "head_dim": 32,
    "global_head_dim": 64,
    "max_position_embeddings": 2048,
    "sliding_window": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.04,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
TARGETS: dict[str, dict[str, Any]] = {
    "e": {
        "hidden_size": 192,
        "intermediate_size": 224,
        "num_hidden_layers": 8,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 30.0,
    },
    "moe": {
        "hidden_size": 160,
        "intermediate_size": 160,
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 30.0,
    },
}
ASSISTANTS: dict[str, dict[str, Any]] = {
    "e": {"use_ordered_embeddings": True, "num_centroids": 128, "centroid_intermediate_top_k": 16},
    "moe": {"use_ordered_embeddings": False},
    "vision": {"use_ordered_embeddings": False},
}
ASSISTANT_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, FULL],
    "num_attention_heads": 4,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
DRAFTS = 3


def new_target(name: str, seed: int) -> Any:
    """A fp32 target with its start values: layer scalars in 0.6 .. 0.95, router scales about 1, post norms at 0.3."""
    torch.manual_seed(seed)
    model: Any = Gemma4ForCausalLM(Gemma4TextConfig(**COMMON, **TARGETS[name]))
    prepare_start(model.model, seed)
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    return model


def prepare_start(model: Any, seed: int) -> None:
    """Start values of a text model: see new_target."""
    spread = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith(("q_norm.weight", "k_norm.weight")):
                value.fill_(value.numel() ** -0.25)  # attention has no 1/sqrt(head_dim): start with it in the norms
            elif "layernorm" in key and "post_" in key or "post_per_layer" in key:
                value.fill_(0.3)
            elif key.endswith(("router.scale", "per_expert_scale")):
                value.copy_(1 + 0.1 * torch.randn(value.shape, generator=spread))
        for layer in model.layers:
            scalar = 0.6 + 0.35 * torch.rand(1, generator=spread)
            layer.layer_scalar.copy_(scalar.bfloat16())  # a buffer, not trained: what it is now is what is saved


def new_assistant(name: str, seed: int, target: dict[str, Any] | None = None) -> Any:
    """A fp32 assistant for `name`, with the target's head sizes, KV head counts and window.

    target   fields of its config, those of TARGETS unless given
    """
    torch.manual_seed(seed + 1)
    target = TARGETS[name] if target is None else target
    heads = {key: target[key] for key in target if key.endswith("key_value_heads") or key == "attention_k_eq_v"}
    vocabulary = {"vocab_size": target["vocab_size"]} if "vocab_size" in target else {}
    config = Gemma4AssistantConfig(
        text_config={"model_type": "gemma4_text", **COMMON, **ASSISTANT_TEXT, **heads, "dtype": "float32"} | vocabulary,
        backbone_hidden_size=target["hidden_size"],
        tie_word_embeddings=True,
        **ASSISTANTS[name],
    )
    model: Any = assistant_class()(config).float()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("q_norm.weight"):
                value.fill_(value.numel() ** -0.25)
            elif "layernorm" in key and "post_" in key:
                value.fill_(0.3)
        for layer, scalar in zip(model.model.layers, (0.875, 0.75), strict=True):
            layer.layer_scalar.fill_(scalar)
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=2, eos_token_id=1, pad_token_id=0,
        num_assistant_tokens=DRAFTS, num_assistant_tokens_schedule="constant",
    )  # fmt: skip
    return model


def use_dense_experts(model: Any) -> None:
    """Run all experts on all tokens in two matrix products while training: equal to the sparse sum, in few launches.

    Changes instances of this model only; a model loaded from the saved folder has transformers' own forward.
    """
    for layer in model.model.layers:
        if layer.enable_moe_block:
            layer.experts.forward = _DenseExperts(layer.experts)


class _DenseExperts:
    def __init__(self, experts: Any):
        self.experts = experts

    def __call__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], index and weights [T, k] -> [T, H]."""
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj  # [E, 2I, H], [E, H, I]
        n, double, hidden = gate_up.shape
        gate, up = F.linear(x, gate_up.reshape(n * double, hidden)).view(-1, n, double).chunk(2, dim=-1)
        route = torch.zeros(x.shape[0], n, dtype=weights.dtype, device=x.device).scatter(1, index, weights)
        mixed = F.gelu(gate, approximate="tanh") * up * route[..., None].to(gate.dtype)  # [T, E, I]
        return F.linear(mixed.flatten(1), down.transpose(0, 1).reshape(hidden, -1)).to(x.dtype)
