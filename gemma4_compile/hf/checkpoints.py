"""The sizes of the released Gemma-4 text models and vision towers, to build them with random weights: for speed and coverage,
not for text.

Figures from the config.json of each checkpoint, https://huggingface.co/google (gemma-4-E2B-it, -E4B-it, -26B-A4B-it, -31B-it,
and the assistant of each).
"""

from typing import Any

_COMMON: dict[str, Any] = {
    "head_dim": 256, "global_head_dim": 512, "vocab_size": 262144, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip
_PLE: dict[str, Any] = {
    "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144, "sliding_window": 512,
    "max_position_embeddings": 131072,
}  # fmt: skip
_LARGE: dict[str, Any] = {
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True, "sliding_window": 1024,
    "max_position_embeddings": 262144, "use_bidirectional_attention": "vision",
}  # fmt: skip


def _kinds(layers: int, every: int) -> list[str]:
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]


# name -> keyword arguments of Gemma4TextConfig
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "E2B": _COMMON | _PLE | {
        "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "layer_types": _kinds(35, 5),
        "num_attention_heads": 8, "num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
    },
    "E4B": _COMMON | _PLE | {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "layer_types": _kinds(42, 6),
        "num_attention_heads": 8, "num_key_value_heads": 2, "num_kv_shared_layers": 18,
    },
    "26B-A4B": _COMMON | _LARGE | {
        "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30, "layer_types": _kinds(30, 6),
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
    },
    "12B": _COMMON | {key: value for key, value in _LARGE.items() if key != "hidden_size_per_layer_input"} | {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "layer_types": _kinds(48, 6),
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1,
    },
    "31B": _COMMON | _LARGE | {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60, "layer_types": _kinds(60, 6),
        "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
    },
}  # fmt: skip


def _tower(width: int, intermediate: int, layers: int, heads: int, **other: bool) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": width // heads, "patch_size": 16, "pooling_kernel_size": 3,
        "position_embedding_size": 10240, "rms_norm_eps": 1e-6, **other,
    }  # fmt: skip


_SMALL_TOWER = _tower(768, 3072, 16, 12, use_clipped_linears=True, standardize=False)
_LARGE_TOWER = _tower(1152, 4304, 27, 16, use_clipped_linears=False, standardize=True)
# name -> keyword arguments of Gemma4VisionConfig, where the model has a tower. The small one as in config.json of
# gemma-4-E4B-it; the large one as another engine's tests have it, https://github.com/thewafflehaus/FFAI
# (Tests/FFAITests/Gemma4VLConfigTests.swift), with patches of 16 as in all others. theta of RoPE, 100, is the class's default.
VISION_CONFIGS: dict[str, dict[str, Any]] = {
    "E2B": _SMALL_TOWER, "E4B": _SMALL_TOWER, "26B-A4B": _LARGE_TOWER, "31B": _LARGE_TOWER,
}  # fmt: skip


# Those of gemma4_unified; figures of the 12B as SGLang's tests have them from its config.json,
# https://github.com/sgl-project/sglang (test of srt/configs/gemma4_unified.py). Its assistant's as another engine checks
# them in its config.json, https://github.com/Danmoreng/gem16; they give the 423 million numbers that are published.
UNIFIED_NAMES = ("12B",)


def _assistant(name: str, hidden_size: int, heads: int, ordered: bool) -> dict[str, Any]:
    target = TEXT_CONFIGS[name]
    same = ("sliding_window", "max_position_embeddings", "num_key_value_heads", "num_global_key_value_heads")
    text = _COMMON | {key: target[key] for key in (*same, "attention_k_eq_v") if key in target} | {
        "hidden_size": hidden_size, "intermediate_size": 8 * hidden_size, "num_attention_heads": heads,
        "num_hidden_layers": 4, "num_kv_shared_layers": 4, "layer_types": _kinds(4, 4), "final_logit_softcapping": None,
    }  # fmt: skip
    if name not in UNIFIED_NAMES:
        text |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    return {
        "text_config": text, "backbone_hidden_size": target["hidden_size"], "use_ordered_embeddings": ordered,
        "num_centroids": 2048, "centroid_intermediate_top_k": 32, "tie_word_embeddings": True,
    }  # fmt: skip


# name of the target -> keyword arguments of Gemma4AssistantConfig
ASSISTANT_CONFIGS: dict[str, dict[str, Any]] = {
    "E2B": _assistant("E2B", 256, 4, ordered=True),
    "E4B": _assistant("E4B", 256, 4, ordered=True),
    "26B-A4B": _assistant("26B-A4B", 1024, 16, ordered=False),
    "12B": _assistant("12B", 1024, 16, ordered=False),
    "31B": _assistant("31B", 1024, 32, ordered=False),
}
