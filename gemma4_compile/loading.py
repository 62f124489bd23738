"""Checkpoints and bare configs to models, with errors that a user can act on. Weights come from transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig


def load(folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer or None) of a checkpoint folder.

    dtype    of the weights; the checkpoint's own unless given

    Raises ValueError for a folder that is missing, not a Gemma-4 checkpoint or broken.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise ValueError(f"a checkpoint must be a folder with config.json and weights, got {folder} ({what}); check the path")
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"config.json must be a JSON object, got a broken file in {folder} ({error}); download it again") from None
    if model_type not in ("gemma4", "gemma4_text"):
        raise ValueError(f"a checkpoint must have model_type gemma4 or gemma4_text, got {model_type!r} in {folder}; use a Gemma-4")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    except Exception as error:  # safetensors, JSON and OS errors alike: the user needs the file, not the traceback
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the weights must be readable, got {reason!r} in {folder}; download the checkpoint again") from error
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    return model.eval().to(device), tokenizer


def random_model(config_file: str | Path, layers: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.bfloat16,
                 seed: int = 0, **overrides: Any) -> Any:  # fmt: skip
    """A Gemma4ForCausalLM of a bare config.json: norm weights 1, matrices N(0, 0.02), layer scalars 1. For speed, not for text.

    layers       cut to so many decoder layers; KV sharing is kept where both layer kinds still have an owner
    overrides    other config fields, such as vocab_size

    Raises ValueError for a missing config, or a number of layers that it does not have.
    """
    path = Path(config_file)
    if not path.is_file():
        raise ValueError(f"a config must be a config.json file, got {path}, no such file; check the path")
    raw = json.loads(path.read_text())
    raw = raw.get("text_config", raw)
    config = cut(raw, layers) | overrides
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = Gemma4ForCausalLM(Gemma4TextConfig(**config))
        finally:
            torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1)
    model.tie_weights()
    return model.to(dtype).eval()


def cut(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """A config with fewer layers that still has every kind of layer that the full one has, where they fit.

    The pattern of kinds is shortened to one sliding and one full layer in turn; with KV sharing, the second half shares."""
    total = config["num_hidden_layers"]
    if layers is None or layers == total:
        return dict(config)
    if not 1 <= layers < total:
        raise ValueError(f"layers must be 1 to {total}, as many as the config has, got {layers}; choose fewer")
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    shared = layers - max(2, (layers + 1) // 2) if config.get("num_kv_shared_layers") else 0
    return config | {"num_hidden_layers": layers, "layer_types": kinds, "num_kv_shared_layers": max(shared, 0)}
