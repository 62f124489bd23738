"""Tiny Gemma-4 models with every kind of layer; random weights, layer scalars and norm weights that are not 1."""

import os
from typing import Any

import torch
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    Gemma4TextConfig,
)

from gemma4_compile.hf.loading import clip

# GEMMA4_TEST_DEVICE=cuda runs the pass tests with the real kernels.
DEVICE = os.environ.get("GEMMA4_TEST_DEVICE", "cpu")
_COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16,
    "global_head_dim": 32, "sliding_window": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "final_logit_softcapping": 30.0, "max_position_embeddings": 256,
}  # fmt: skip
_KINDS = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    # like E2B: per-layer embeddings, KV sharing, double-wide MLP
    "e": _COMMON | {
        "num_hidden_layers": 4, "layer_types": _KINDS * 2, "num_key_value_heads": 1, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128,
    },
    # like 26B-A4B: experts, k = v on full layers with their own number of KV heads
    "moe": _COMMON | {
        "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_key_value_heads": 2, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "enable_moe_block": True,
        "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    # like 31B
    "dense": _COMMON | {
        "num_hidden_layers": 2, "layer_types": _KINDS, "num_key_value_heads": 2, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
    },
}  # fmt: skip


@torch.no_grad()
def _draw_scales(model: torch.nn.Module) -> None:
    """Layer scalars and norm weights apart from 1, where each would be as good as none."""
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.8, 1.2)


def tiny(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Gemma4ForCausalLM:
    """A tiny model of a kind in CONFIGS, in eval mode."""
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**CONFIGS[kind] | overrides)).eval()
    _draw_scales(model)
    if kind == "moe":
        grouped = DEVICE == "cpu" or dtype == torch.bfloat16  # the CUDA kernel is for bf16 only
        model.set_experts_implementation("grouped_mm" if grouped else "batched_mm")
    return model.to(DEVICE, dtype)


def prompt(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, tokens] without specials."""
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


IMAGE, BEGIN, END, VIDEO, AUDIO = 120, 121, 122, 123, 124
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 3, "position_embedding_size": 256, "standardize": True,
}  # fmt: skip


def tiny_multimodal(
    kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, vision: dict[str, Any] | None = None, **overrides: Any
) -> Any:  # fmt: skip
    """A tiny Gemma4ForConditionalGeneration around a text part of a kind in CONFIGS, with a vision tower and no audio."""
    torch.manual_seed(seed)
    text = CONFIGS[kind] | {"max_position_embeddings": 2048} | overrides
    ids: dict[str, Any] = {
        "image_token_id": IMAGE,
        "boi_token_id": BEGIN,
        "eoi_token_id": END,
        "video_token_id": VIDEO,
        "audio_token_id": AUDIO,
    }
    config = Gemma4Config(text_config=text, vision_config=VISION | (vision or {}), audio_config=None, **ids)
    model: Any = Gemma4ForConditionalGeneration(config).eval()
    tower = model.model.vision_tower
    with torch.no_grad():
        _draw_scales(model)
        tower.patch_embedder.position_embedding_table.normal_(0, 0.5)
        tower.patch_embedder.input_proj.weight.normal_(0, 0.3)
        tower.std_bias.uniform_(-0.2, 0.2)
        tower.std_scale.uniform_(0.5, 1.5)
        model.model.embed_vision.embedding_projection.weight.normal_(0, 0.5)
    if kind == "moe":
        model.set_experts_implementation("grouped_mm" if DEVICE == "cpu" or dtype == torch.bfloat16 else "batched_mm")
    clip(tower, sigmas=1.5)
    return model.to(DEVICE, dtype)


UNIFIED_VISION: dict[str, Any] = {
    "patch_size": 4, "pooling_kernel_size": 3, "mm_embed_dim": 48, "output_proj_dims": 48, "mm_posemb_size": 80,
}  # fmt: skip


def tiny_unified(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A tiny Gemma4UnifiedForConditionalGeneration, like 12B: its text part is like CONFIGS["dense"], its image tokens see each
    other, and it has no tower."""
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    torch.manual_seed(seed)
    text = {key: value for key, value in CONFIGS["dense"].items() if key != "hidden_size_per_layer_input"}
    text |= {"max_position_embeddings": 2048, "num_hidden_layers": 4, "layer_types": _KINDS * 2} | overrides
    ids: dict[str, Any] = {
        "image_token_id": IMAGE, "boi_token_id": BEGIN, "eoi_token_id": END, "video_token_id": VIDEO, "audio_token_id": AUDIO,
    }  # fmt: skip
    config = Gemma4UnifiedConfig(text_config=text, vision_config=UNIFIED_VISION, audio_config=None, **ids)
    model: Any = Gemma4UnifiedForConditionalGeneration(config).eval()
    with torch.no_grad():
        _draw_scales(model)
        embedder = model.model.embed_vision
        embedder.pos_embedding.normal_(0, 0.5)
        embedder.multimodal_embedder.embedding_projection.weight.normal_(0, 0.5)
    return model.to(DEVICE, dtype)


def image_processor() -> Any:
    return Gemma4ImageProcessorPil(patch_size=VISION["patch_size"], max_soft_tokens=70)
