"""The step that is inspected: a decode step on a filled cache, a prefill, images in the tower, or the caller's own inputs."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from gemma4_compile.geometry import Geometry
from gemma4_compile.hf.step_cache import CACHE
from gemma4_compile.hf.vision import tower_of
from gemma4_compile.optimized import compiled_part

IMAGES = "images"
STEPS = ("decode", "prefill", IMAGES)
_CONTEXT, _SOFT_TOKENS = 1024, 280  # of a step, and of an image, unless given
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


def inspected_part(model: nn.Module, kind: str) -> Any:
    """The module whose step it is: the text model, or the encoder of the vision tower for "images".

    Raises TypeError for no Gemma 4, ValueError for another kind of step, or a model without such a tower."""
    if kind not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {kind!r}; use decode")
    text = compiled_part(model)
    if kind != IMAGES:
        return text
    tower = tower_of(model)
    if tower is None:
        raise ValueError(f"step={IMAGES!r} needs a model with a vision tower, got {type(model).__name__} without; use decode")
    return tower.encoder


def default_step(
    module: Any,
    geometry: Geometry,
    kind: str = "decode",
    batch: int = 1,
    context: int | None = None,
    static_cache: bool = True,
) -> InspectedStep:
    """A step on random tokens and, for a decode, random keys and values: what is in them changes no kernel.

    module         that of inspected_part
    kind           "decode": one new token after `context` cached ones; "prefill": `context` tokens and an empty cache;
                   "images": `batch` images of `context` soft tokens, as patches that are embedded already
    context        None: 1024 tokens, or 280 of an image
    static_cache   decode on transformers' StaticCache, as generate(cache_implementation="static") does, or on a DynamicCache

    Raises ValueError for a value out of range.
    """
    if context is None:
        context = _SOFT_TOKENS if kind == IMAGES else _CONTEXT
    if batch < 1 or context < 1:
        raise ValueError(f"batch and context must be at least 1, got {batch} and {context}; use 1 and {_CONTEXT}")
    config, device = module.config.get_text_config(), next(module.parameters()).device
    dtype = next(module.parameters()).dtype
    generator = torch.Generator(device).manual_seed(0)
    if kind == IMAGES:
        each = config.pooling_kernel_size**2
        described = f"images, batch {batch}, {context} soft tokens of {each} patches each, {str(dtype).removeprefix('torch.')}"
        size = (batch, context * each, config.hidden_size)
        return InspectedStep(described, _patches(torch.randn(size, device=device, dtype=dtype, generator=generator)))

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


def _patches(embedded: Tensor) -> dict[str, Any]:
    """Arguments of a tower's encoder: embedded patches [images, patches, width], of pictures as square as can be."""
    side = math.isqrt(embedded.shape[1] - 1) + 1
    places = torch.arange(embedded.shape[1], device=embedded.device).expand(len(embedded), -1)
    return {
        "inputs_embeds": embedded,
        "attention_mask": torch.ones_like(places, dtype=torch.bool),
        "pixel_position_ids": torch.stack([places % side, places // side], dim=-1),
    }


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
        raise ValueError(
            f"a step of the text part takes tokens or embeddings, got {', '.join(others)}; pass inputs_embeds, or "
            f"step={IMAGES!r} for the vision tower"
        )
    shapes = ", ".join(f"{name} {list(v.shape)}" for name, v in example_inputs.items() if isinstance(v, Tensor))
    return InspectedStep(f"the given inputs: {shapes}", dict(example_inputs))
