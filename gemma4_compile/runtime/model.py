"""A model as the runtime calls it: one packed step of many requests in, the logits of the wanted rows out."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from transformers.models.gemma4 import modeling_gemma4 as hf

from gemma4_compile.backend import uuid
from gemma4_compile.optimize import CompiledModel, state_of
from gemma4_compile.parallel import local_parts, vocabulary_of
from gemma4_compile.program import Program, StepResult, fingerprint, open_program


class PackedModel:
    """An optimized Gemma4ForCausalLM over packed batches; see batch.py for a step's inputs.

    Compiled at once, for any number of tokens, requests and wanted rows, or loaded if this model was compiled before. It keeps
    the weights' tensors: make it after from_pretrained, and anew after load_state_dict(assign=True).

    Raises TypeError for another class of model, ValueError for one that was not optimized or whose attention is not causal.
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, hf.Gemma4ForCausalLM):
            raise TypeError(
                f"a packed step takes Gemma4ForCausalLM, got {type(model).__name__}; load the checkpoint's text part"
            )
        state = state_of(model)
        if getattr(model.config, "use_bidirectional_attention", None) == "all":
            raise ValueError("attention must be causal, got use_bidirectional_attention='all'; use a decoder checkpoint")
        self.model, self.geometry, self.division = model, state.geometry, state.division
        self.vocabulary = vocabulary_of(model, state.division)
        with local_parts(model):
            folder = program_folder(model, state, model.device)
            self.program: Program = open_program(model, state.backend, state.geometry, folder)
        state.programs.append(self.program)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [1, N, vocabulary], or of this rank's tokens; the step's keys and values are written in place."""
        return self.program(inputs)

    def run(self, inputs: dict[str, Tensor]) -> StepResult:
        """Those logits and final-normed states [N, H]; the step's keys and values are written in place."""
        return self.program.run(inputs)


def program_folder(model: Any, state: CompiledModel, device: torch.device) -> Path | None:
    """Where a module's program is kept: a name for everything that it depends on. None where torch's caches are off, and for
    a module that cannot be known again.

    state   of the optimized model that it belongs to
    """
    backend, config = state.backend, state.backend.config
    if torch._inductor.config.force_disable_caches or not torch._inductor.config.fx_graph_cache:
        return None
    known = fingerprint(model)
    if not known:
        return None
    machine = torch.cuda.get_device_properties(device).name if device.type == "cuda" else "cpu"
    inductor = repr(sorted(torch._inductor.config.save_config_portable().items()))
    parts = (uuid(config, backend.enabled), machine, inductor, known, state.division)
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    return Path(config.cache_dir or Path(cache_dir()) / "gemma4_compile") / name
