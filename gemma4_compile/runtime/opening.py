"""What an Engine is given, as what it runs: a name loaded, whole or divided between ranks, and optimized."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemma4_compile.config import EngineConfig
from gemma4_compile.hf import parallel
from gemma4_compile.hf.assistant import load_assistant
from gemma4_compile.hf.loading import checkpoint, load, text_part, tokenizer_of
from gemma4_compile.optimized import existing_state, optimize, state_of
from gemma4_compile.torchrun import launched_ranks


def model_of(model: nn.Module | str | Path, config: EngineConfig, tokenizer: Any) -> tuple[Any, Any]:
    """An optimized Gemma4ForCausalLM, and a tokenizer or None."""
    if isinstance(model, (str, Path)) and launched_ranks() > 1:
        folder, _ = checkpoint(model)
        text, found = parallel.load(folder, dtype=config.dtype, device=config.device), tokenizer_of(folder)
    elif isinstance(model, (str, Path)):
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded, found = load(model, device, config.dtype, text_only=True)
        if (
            getattr(loaded.config.get_text_config(), "enable_moe_block", False)
            and device == "cuda"
            and loaded.dtype == torch.float32
        ):
            loaded.set_experts_implementation("batched_mm")  # torch's grouped product on a GPU takes bf16 alone
        text = text_part(loaded)
    else:
        name: Any = getattr(model, "name_or_path", "")
        found = tokenizer_of(name) if name and tokenizer is None else None
        text = text_part(model)
    if not isinstance(text, nn.Module) or existing_state(text) is None:
        optimize(text.requires_grad_(False), config.optimize)
    return text, found if tokenizer is None else tokenizer


def assistant_of(assistant: nn.Module | str | Path, model: Any) -> nn.Module:
    """An assistant beside its target, before memory is given to pools."""
    division = state_of(model).division
    if not isinstance(assistant, (str, Path)):
        if (got := parallel.division_of(assistant)) != division:
            raise ValueError(
                f"an assistant must be divided as its target, between {division.ranks} ranks, got {got.ranks}; give its folder"
            )
        return assistant
    if division.ranks > 1:
        return parallel.load_assistant(assistant, division, model.dtype)
    return load_assistant(assistant, dtype=model.dtype).to(model.device).eval().requires_grad_(False)


def stop_tokens(model: Any) -> frozenset[int]:
    """The model's own end tokens: of its generation config, which for Gemma names <end_of_turn> too, else of its config."""
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config().eos_token_id
    return frozenset(found if isinstance(found, (list, tuple)) else () if found is None else (found,))
