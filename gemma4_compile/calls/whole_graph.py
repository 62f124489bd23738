"""Calls of an optimized model as one graph of the whole model: what no packed step gives, such as hidden states."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from gemma4_compile.backend import Backend
from gemma4_compile.dynamo import dense, first_line, own_code
from gemma4_compile.geometry import Geometry
from gemma4_compile.hf.experts import fused_experts
from gemma4_compile.hf.step_cache import CACHE, GROW, LayerStep, StepCache, commit, plan

from .masks import masks

# Outputs that forward hooks of transformers collect.
CAPTURED = ("output_hidden_states", "output_attentions", "output_router_logits")
_HOOKED = "_output_capturing_hooks_installed"


class Uncompiled(Exception):
    """Why a call is left to Hugging Face; nothing of it has run, and its cache is as it was.

    lasting   no later call of this model will compile either, if Hugging Face takes this one"""

    def __init__(self, reason: str, lasting: bool = False):
        super().__init__(reason)
        self.lasting = lasting


class WholeGraph:
    """The graphs of one model, by kinds of inputs.

    falls_back  whether what does not compile is Uncompiled; else the error comes out
    broken      why graphs do not compile, empty if they do
    """

    def __init__(self, module: Any, backend: Backend, geometry: Geometry):
        self._module, self.backend, self.geometry = module, backend, geometry
        self.falls_back, self.broken = True, ""
        self._step = torch.compile(own_code(_make_step(module)), backend=backend, fullgraph=True, dynamic=None)

    def __call__(self, inputs: dict[str, Any], tokens: Tensor, cache: Any) -> Any:
        """The output of a call of forward(), which has the cache. Raises Uncompiled, and UnsupportedCache for a cache that it
        does not know.

        inputs  by name, without the cache
        tokens  [batch, tokens] ids, or [batch, tokens, H] embeddings
        """
        if self._asked(inputs, "output_attentions") and self._module.config._attn_implementation == "sdpa":
            raise Uncompiled("SDPA gives no attentions; call model.set_attn_implementation('eager') to get them")
        if self.broken:
            raise Uncompiled(self.broken)
        steps = self._plan(cache, tokens)
        self._prepare(inputs, tokens, cache)
        inputs |= {"return_dict": True, "use_cache": cache is not None}
        _normalize(inputs, steps)
        if any(self._asked(inputs, name) for name in CAPTURED):
            _install_capturing_hooks(self._module)
        self.backend.cuda_graph = graphed = self._is_graphed(tokens, steps)
        if graphed:
            torch.compiler.cudagraph_mark_step_begin()
        limits: dict[str, Any] = {"recompile_limit": self.backend.config.max_graphs, "accumulated_recompile_limit": 2**16}
        with torch.no_grad(), torch._dynamo.config.patch(**limits):
            try:
                with fused_experts(self._module.config, "experts" in self.backend.enabled):
                    output, new = self._step(inputs, steps)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                if not self.falls_back:
                    raise
                if isinstance(error, FailOnRecompileLimitHit):
                    most = self.backend.config.max_graphs
                    raise Uncompiled(f"max_graphs={most} are in use; raise it, or call with fewer kinds of inputs") from error
                reason = f"a graph of the whole model does not compile: {first_line(error)}"
                raise Uncompiled(reason, lasting=True) from error
        if graphed:  # the next replay writes to the same memory, and the caller may hold this step's logits
            for name in list(output):
                output[name] = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, output[name])
        if cache is not None:
            assert steps is not None
            commit(cache, steps, new, tokens.shape[1])
            setattr(output, CACHE, cache)
        return output

    def _asked(self, inputs: dict[str, Any], output: str) -> bool:
        return bool(inputs.get(output, getattr(self._module.config, output, False)))

    def _is_graphed(self, tokens: Tensor, steps: list[LayerStep] | None) -> bool:
        if tokens.device.type != "cuda" or self.backend.config.cuda_graphs is False:
            return False
        static = steps is not None and tokens.shape[1] == 1 and all(step.mode != GROW for step in steps)
        return static or self.backend.config.cuda_graphs is True

    def _prepare(self, inputs: dict[str, Any], tokens: Tensor, cache: Any) -> None:
        """Positions and masks, as the model's own forward would make them: both come from the cache's lengths.

        Masks are always built, also where SDPA could do without: otherwise a prompt longer than the window, a padded one
        and a decode step would each need a graph of its own, and asking whether a mask hides anything waits for the GPU."""
        batch, length = tokens.shape[:2]
        seen = 0 if cache is None else cache.get_seq_length()
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = (torch.arange(length, device=tokens.device) + seen).unsqueeze(0)
        mask = inputs.get("attention_mask")
        given = mask if isinstance(mask, dict) else None  # generate() makes those of static caches, None for a plain causal one
        padding = None if given is not None else mask
        config = self._module.config
        inputs["attention_mask"] = masks(
            config, (batch, length), self._dtype, tokens.device, cache, inputs["position_ids"], padding, given
        )

    def _plan(self, cache: Any, tokens: Tensor) -> list[LayerStep] | None:
        if cache is None:
            return None
        return plan(cache, self.geometry, tokens.shape[1], tokens.shape[0], self._dtype, tokens.device)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._module.parameters()).dtype


def _install_capturing_hooks(module: nn.Module) -> None:
    """Hugging Face does this at the first call that asks for hidden states or the like, under a lock that Dynamo cannot trace.
    It marks each model that has them, but goes down from one without to all that are in it, marked or not: each state would
    be there twice."""
    for part in module.modules():
        inner = (each for each in part.modules() if isinstance(each, PreTrainedModel))
        if isinstance(part, PreTrainedModel) and not any(getattr(each, _HOOKED, False) for each in inner):
            maybe_install_capturing_hooks(part)


def _make_step(module: nn.Module) -> Callable[..., Any]:
    def step(inputs: dict[str, Any], steps: list[LayerStep] | None) -> Any:
        """What Dynamo traces: the model's own call, with tensors in the place of its cache."""
        if steps is None:
            return module._call_impl(**inputs), []
        cache = StepCache(steps)
        output = module._call_impl(**inputs, **{CACHE: cache})
        setattr(output, CACHE, None)
        return output, cache.new

    return step


# Inputs whose sizes vary, and in which dimensions: batch, tokens, cached tokens.
_VARYING = {
    "input_ids": (0, 1),
    "inputs_embeds": (0, 1),
    "position_ids": (0, 1),
    "per_layer_inputs": (0, 1),
    "labels": (0, 1),
    "logits_to_keep": (0,),
}


def _normalize(inputs: dict[str, Any], steps: list[LayerStep] | None) -> None:
    """Strides that follow from the shapes, and sizes that may vary: what else would make Dynamo compile again. Sizes 0 and 1
    are graphs of their own always."""
    for name, dims in _VARYING.items():
        if isinstance(inputs.get(name), Tensor):
            inputs[name] = _varying(dense(inputs[name]), dims)
    inputs["attention_mask"] = {
        kind: _varying(dense(mask), (0, 2, 3)) if isinstance(mask, Tensor) else mask
        for kind, mask in inputs["attention_mask"].items()
    }
    for step in steps or ():
        for rows in (step.keys, step.values):
            if rows is not None:
                _varying(rows, (0, 2))


def _varying(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in dims:
        if dim < tensor.dim() and tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor
