"""Which way a call of an optimized model goes: as packed steps where it fits, else as the whole graph, else uncompiled."""

import inspect
import warnings
from collections import Counter
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.models.gemma4 import modeling_gemma4 as hf

from gemma4_compile.dynamo import first_line, switched_off
from gemma4_compile.hf.families import MULTIMODAL
from gemma4_compile.hf.loading import text_part
from gemma4_compile.hf.step_cache import CACHE, UnsupportedCache, take_cache
from gemma4_compile.packed.compile import FirstCall

from .cache_views import release_cache
from .kv_memory import KVMemory, Unfit
from .packed_call import CHUNK, PackedCalls, objection
from .whole_graph import CAPTURED

PACKED, WHOLE, UNCOMPILED = "packed steps", "whole graph", "uncompiled"


class Ways:
    """How often calls went each way, and the reasons for another way than the best; each is warned about once."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.reasons: dict[str, list[str]] = {WHOLE: [], UNCOMPILED: []}

    def note(self, way: str, reason: str = "", quiet: bool = False) -> None:
        """quiet: the caller has asked for it, or cannot have another."""
        self.calls[way] += 1
        if way == PACKED or reason in self.reasons[way]:
            return
        self.reasons[way].append(reason)
        if not quiet:
            how = "uncompiled" if way == UNCOMPILED else "as one graph, slower than packed steps"
            warnings.warn(f"gemma4_compile runs this call {how}: {reason}", stacklevel=4)


class PackedRoute:
    """The calls of an optimized model as packed steps.

    state   of the optimized model
    outer   the module whose calls these are: Gemma4ForCausalLM, or Gemma4ForConditionalGeneration for calls without images and
            sounds
    """

    def __init__(self, state: Any, outer: Any):
        self._state, self._outer = state, outer
        self._calls: PackedCalls | None = None
        self._asked = ""  # what the config asks for that a packed step does not give
        self.refused = ""  # why no call of this model runs so

    def __call__(self, inputs: dict[str, Any], cache: Any) -> Any:
        """The output of a call. Raises Unfit, with the cache as it was, for one that does not fit."""
        if self.refused:
            raise Unfit(self.refused)
        if reason := objection(inputs, CACHE):
            raise Unfit(reason)
        if inputs["input_ids"].shape[1] > 1 or self._calls is None:  # reading a config takes longer than the rest of a step
            self._asked = self._asked_by_config()
        if self._asked:
            raise Unfit(self._asked)
        if torch.is_autocast_enabled(inputs["input_ids"].device.type):
            raise Unfit("autocast is on")
        if self._calls is None:
            self._calls = self._make(inputs)
        logits = self._calls(inputs, cache)
        return hf.Gemma4CausalLMOutputWithPast(logits=logits, **{CACHE: cache})  # type: ignore[arg-type]

    @property
    def cache_memory(self) -> int:
        return 0 if self._calls is None else sum(slab.nbytes for slab in self._calls.memory.slabs)

    def _asked_by_config(self) -> str:
        config = self._outer.config.get_text_config()
        return next((f"config.{name}" for name in CAPTURED if getattr(config, name, False)), "")

    def _make(self, inputs: dict[str, Any]) -> PackedCalls:
        state, model, replaced = self._state, self._outer, {}
        keep = inputs.get("logits_to_keep", 0)
        batch, tokens = inputs["input_ids"].shape
        tokens = min(tokens, max(1, CHUNK // batch))
        rows = keep if isinstance(keep, int) and 0 < keep < tokens else tokens
        try:
            if isinstance(model, MULTIMODAL):
                replaced = _placeholders(model.config)
                model = text_part(model)
            if getattr(model.config, "use_bidirectional_attention", None) == "all":
                raise Unfit("use_bidirectional_attention='all'")
            device = next(model.parameters()).device
            memory = KVMemory(state.geometry, int(model.config.sliding_window or 0), model.dtype, device)
            masked = inputs.get("attention_mask") is not None
            first = FirstCall(batch, tokens, rows, memory.table_width(inputs["input_ids"].shape[1]), masked)
            graphs = state.backend.config.cuda_graphs is not False
            return PackedCalls(model, lambda: state.packed_program(model, first), memory, replaced, graphs=graphs)
        except Unfit as reason:
            self.refused = str(reason)
            raise
        except Exception as error:  # whatever Dynamo, Inductor, Triton and the C++ compiler raise
            self.refused = f"its packed step does not compile: {first_line(error)}"
            raise Unfit(self.refused) from error


def _placeholders(config: Any) -> dict[int, int]:
    """Tokens that a multimodal model embeds as padding, where no image or sound stands for them."""
    names = ("image_token_id", "video_token_id", "audio_token_id")
    tokens = [getattr(config, name, None) for name in names]
    return {token: config.get_text_config().pad_token_id for token in tokens if token is not None}


def arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of forward() by name."""
    if not args:
        return dict(kwargs)
    inputs = dict(signature.bind(*args, **kwargs).arguments)
    return inputs | inputs.pop("kwargs", {})


def uses_cache(inputs: dict[str, Any], config: Any) -> bool:
    """Whether a call without a cache makes one."""
    given = inputs.get("use_cache")
    return bool(config.use_cache if given is None else given)


class MultimodalCalls:
    """Stands where nn.Module.compile() puts its callable of a multimodal model: text goes as packed steps, all else to the
    model's own forward, whose text part is compiled."""

    def __init__(self, outer: Any, state: Any, route: PackedRoute):
        self._outer, self._state, self._route = outer, state, route
        self._signature = inspect.signature(outer.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer, state = self._outer, self._state
        if torch.compiler.is_compiling() or switched_off():
            return outer._call_impl(*args, **kwargs)
        state.check_call(outer)
        inputs = arguments(self._signature, args, kwargs)
        cache = None
        try:
            cache = take_cache(inputs, self._signature.parameters)
            if cache is None and uses_cache(inputs, config := outer.config.get_text_config()):
                cache = DynamicCache(config=config)
            output = self._route(inputs, cache)
        except (Unfit, UnsupportedCache) as reason:
            release_cache(cache)
            state.why_whole = str(reason)  # noted when the text part is called
            return outer._call_impl(*args, **kwargs)
        state.ways.note(PACKED)
        return_dict = inputs.get("return_dict")
        return output if return_dict or return_dict is None and outer.config.return_dict else output.to_tuple()
