"""Record the graph that vLLM hands to its backend, for tests that need no vLLM: tests/vllm/graphs/.

    VENV/bin/python scripts/record_vllm_graph.py e tests/vllm/graphs/0.32-e.json

with a CPU build of vLLM in VENV. The model is a cut of Gemma 4's config with random weights, so that a graph is small.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.vllm import host
from tests.vllm.recorded import encode

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CONFIGS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--own-mode", action="store_true", help="as Inductor gets it in vLLM's own mode on CPUs")
    options = parser.parse_args()
    os.environ |= {"VLLM_DISABLE_COMPILE_CACHE": "1", "GEMMA4_COMPILE_VLLM": "0"}

    def keep(graph: torch.fx.GraphModule) -> None:
        import transformers
        import vllm

        versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        options.out.write_text(encode(graph.graph, versions))

    if options.own_mode:
        from torch._inductor import compile_fx

        passes = compile_fx._recursive_pre_grad_passes

        def before(graph: Any, inputs: Any) -> Any:
            keep(graph)
            return passes(graph, inputs)

        setattr(compile_fx, "_recursive_pre_grad_passes", before)  # noqa: B010
    else:
        from vllm.compilation.backends import VllmBackend

        call = VllmBackend.__call__

        def recorded(backend: Any, graph: Any, inputs: Any) -> Any:
            keep(graph)
            return call(backend, graph, inputs)

        VllmBackend.__call__ = recorded
    from vllm import __version__

    # vLLM 0.26 asks for what newer configs keep for each layer.
    whole = {"allow_global_per_layer_attribute_access": True, "global_head_dim": _COMMON["global_head_dim"]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_COMMON | CONFIGS[options.kind]))
        host.run(
            {
                "model": folder,
                "out": f"{folder}/tokens.json",
                "dtype": "bfloat16",
                "mode": "own" if options.own_mode else "piecewise",
                "ids": [[3, 4, 5]],
                "options": {
                    "load_format": "dummy",
                    "skip_tokenizer_init": True,
                    "hf_overrides": whole if __version__.startswith("0.26") else {},
                },
            }
        )


if __name__ == "__main__":
    main()
