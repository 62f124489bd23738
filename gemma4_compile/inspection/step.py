"""The step that is inspected: a decode step on a filled cache, a prefill, or the caller's own inputs."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from gemma4_compile.geometry import Geometry
from gemma4_compile.hf.step_cache import CACHE

STEPS = ("decode", "prefill")
_ROOM = 64  # further tokens in a static cache
_NOT_TEXT = ("pixel_values", "input_features", "mm_token_type_ids", "image_", "video_", "audio_")


@dataclass(frozen=True)
class InspectedStep:
    """A step that can be repeated: inputs() gives the keyword arguments of one call, with a copy of the cache each time, as a
    call fills it."""

    description: str
    arguments: Mapping[str, Any]

    def inputs(self) -> dict[str, Any]:
        return {name: copy.deepcopy(v) if isinstance(v, Cache) else v for name, v in self.arguments.items()}


def default_step(
    model: Any, geometry: Geometry, kind: str = "decode", batch: int = 1, context: int = 1024, static_cache: bool = True
) -> InspectedStep:
    """A step on random tokens and, for a decode, random keys and values: what is in them changes no kernel.

    kind           "decode": one new token after `context` cached ones; "prefill": `context` tokens and an empty cache
    static_cache   decode on transformers' StaticCache, as generate(cache_implementation="static") does, or on a DynamicCache

    Raises ValueError for a value out of range.
    """
    if kind not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {kind!r}; use decode")
    if batch < 1 or context < 1:
        raise ValueError(f"batch and context must be at least 1, got {batch} and {context}; use 1 and 1024")
    config, device = model.config.get_text_config(), next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    generator = torch.Generator(device).manual_seed(0)

    length = 1 if kind == "decode" else context
    tokens = torch.randint(0, config.vocab_size, (batch, length), device=device, generator=generator)
    described = f"{kind}, batch {batch}, context {context}, {str(dtype).removeprefix('torch.')}"
    if kind == "prefill":
        return InspectedStep(described, {"input_ids": tokens, CACHE: DynamicCache(config=config)})
    cache: Any = StaticCache(config=config, max_cache_len=context + _ROOM) if static_cache else DynamicCache(config=config)
    for layer in geometry.layers:
        if not layer.shares_kv:
            shape = (batch, layer.kv_heads, context, layer.head_dim)
            rows = [torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(2)]
            cache.update(*rows, layer.index)
    described += ", static cache" if static_cache else ", dynamic cache"
    return InspectedStep(described, {"input_ids": tokens, CACHE: cache})


def given_step(example_inputs: Any) -> InspectedStep:
    """The caller's own: token ids, or the keyword arguments of a call, whose cache is not touched.

    Raises TypeError for anything else, ValueError for images and sounds: what is compiled is the text part."""
    if isinstance(example_inputs, Tensor):
        example_inputs = {"input_ids": example_inputs}
    if not isinstance(example_inputs, Mapping):
        raise TypeError(
            f"example_inputs must be token ids or a mapping of keyword arguments, got {type(example_inputs).__name__}; "
            "pass tokenizer(text, return_tensors='pt')"
        )
    if others := sorted(name for name in example_inputs if name.startswith(_NOT_TEXT)):
        raise ValueError(f"a step of the text part takes tokens or embeddings, got {', '.join(others)}; pass inputs_embeds")
    shapes = ", ".join(f"{name} {list(v.shape)}" for name, v in example_inputs.items() if isinstance(v, Tensor))
    return InspectedStep(f"the given inputs: {shapes}", dict(example_inputs))
