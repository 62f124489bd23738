"""Hugging Face's KV cache as plain tensors, for one step.

A DynamicCache or StaticCache handed to torch.compile is guarded by its Python integers, so plain compilation compiles again
whenever a length crosses one. Here the host reads the integers and picks a mode for each layer; the graph sees tensors only:

    steps = plan(cache, ...)              host: what each layer has to do
    StepCache(steps)                      inside the graph: stands in for the cache
    commit(cache, steps, new, tokens)     host: the new rows go into the user's cache

Owns the name that transformers gives the cache, and the meaning of its four attention cache layers. Other kinds (quantized,
offloaded) are not compiled: see `plan`.
"""

import inspect
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

from gemma4_compile.dynamo import dense
from gemma4_compile.geometry import Geometry

# Of forward()'s parameter and of its output's field, the newest first. A forward that was renamed takes older names too.
_NAMES = ("cache", "past_key_values")
_PARAMETERS = inspect.signature(Gemma4TextModel.forward).parameters
CACHE = next((name for name in _NAMES if name in _PARAMETERS), _NAMES[0])

GROW = "grow"  # dynamic: past and new, concatenated
WRITE = "write"  # static: new rows written behind the past ones
ROLL = "roll"  # static sliding, full, one new row: shift by one
SLIDE = "slide"  # static sliding, full, several new rows
FILL = "fill"  # static sliding, empty, more new rows than the window holds


@dataclass
class LayerStep:
    """What one cache layer does in this step.

    keys, values   [batch, kv_heads, length, head_dim], or None where a dynamic layer is still empty
    length         0-dim int64 on the device: rows written so far (WRITE only)
    window         the sliding window, 0 for full attention
    """

    mode: str
    window: int
    keys: Tensor | None = None
    values: Tensor | None = None
    length: Tensor | None = None


class UnsupportedCache(Exception):
    """What the cache has to do in this step is not known here; the step runs as Hugging Face wrote it."""


def take_cache(inputs: dict[str, Any], parameters: Container[str]) -> Any:
    """The cache of a call, taken out of its arguments; None without one.

    parameters   names that forward() has; what else a call names, forward() passes on without reading it

    Raises UnsupportedCache where transformers names the cache as no release known here does, TypeError for a cache under a
    name that forward() does not read: both would decode without the cache, and nobody would see it."""
    accepted = _NAMES[_NAMES.index(CACHE) :]
    given = [name for name in accepted if inputs.get(name) is not None]
    other = next((name for name, value in inputs.items() if name not in accepted and isinstance(value, Cache)), None)
    if CACHE not in parameters:
        raise UnsupportedCache(f"a forward() without a parameter {' or '.join(_NAMES)}")
    if other is not None and other not in parameters:
        raise TypeError(
            f"the cache must be given as {CACHE!r} with this transformers, got {other!r}; call model(..., {CACHE}=...)"
        )
    if other is not None:
        raise UnsupportedCache(f"the argument {other}, which holds a cache")
    if len(given) > 1:
        raise UnsupportedCache(f"which of {' and '.join(given)} is meant")
    caches = [inputs.pop(name, None) for name in accepted]
    return next((cache for cache in caches if cache is not None), None)


def plan(
    cache: Cache, model_geometry: Geometry, tokens: int, batch: int, dtype: torch.dtype, device: torch.device
) -> list[LayerStep]:
    """The steps of all layers that own KV, in order. Static layers are allocated here, so that the graph only writes.

    Raises UnsupportedCache for any other kind of layer, and for a sliding layer that records its past."""
    if not isinstance(cache, Cache):
        raise UnsupportedCache(f"a cache of type {type(cache).__name__}")
    if getattr(cache, "offloading", False):
        raise UnsupportedCache("an offloaded cache")
    owners = [layer for layer in model_geometry.layers if not layer.shares_kv]
    replicate = getattr(cache, "layer_class_to_replicate", None)
    while replicate is not None and len(cache.layers) < len(owners):
        cache.layers.append(replicate())
    if len(cache.layers) < len(owners):
        raise UnsupportedCache(f"a cache of {len(cache.layers)} layers for a model with {len(owners)}")
    steps = []
    for owner in owners:
        layer: Any = cache.layers[owner.index]
        kind = type(layer)
        if kind in (StaticLayer, StaticSlidingWindowLayer):
            if not layer.is_initialized:
                row = torch.empty((batch, owner.kv_heads, 0, owner.head_dim), dtype=dtype, device=device)
                layer.lazy_initialization(row, row)
            steps.append(_static_step(layer, tokens))
        elif kind in (DynamicLayer, DynamicSlidingWindowLayer) and not getattr(layer, "record_past", False):
            window = layer.sliding_window if kind is DynamicSlidingWindowLayer else 0
            filled = layer.is_initialized and layer.keys.numel() > 0
            past = (dense(layer.keys), dense(layer.values)) if filled else ()
            steps.append(LayerStep(GROW, window, *past))
        else:
            raise UnsupportedCache(f"{kind.__name__} layers")
    return steps


def _static_step(layer: Any, tokens: int) -> LayerStep:
    if type(layer) is StaticLayer:
        return LayerStep(WRITE, 0, layer.keys, layer.values, layer.cumulative_length)
    seen, window = layer.cumulative_length_int, layer.max_cache_len
    if seen >= window:
        return LayerStep(ROLL if tokens == 1 else SLIDE, window, layer.keys, layer.values)
    if seen + tokens > window:
        if seen > 0:
            raise UnsupportedCache("a static sliding layer that becomes full in the middle of a chunk")
        return LayerStep(FILL, window, layer.keys, layer.values)
    return LayerStep(WRITE, window, layer.keys, layer.values, layer.cumulative_length)


def commit(cache: Cache, steps: list[LayerStep], new: list[tuple[Tensor, ...] | None], tokens: int) -> None:
    """Give the user's cache the new rows. Static tensors were written inside the graph.

    Raises RuntimeError, before anything is written, if the model did not use the cache that it was given."""
    unused = [index for index, rows in enumerate(new) if rows is None]
    if unused:
        raise RuntimeError(
            f"each layer must write to its cache, got nothing from layers {unused}: this transformers does not read the "
            f"cache from {CACHE!r}; call restore(model), or install a release that the README names"
        )
    layers: list[Any] = cache.layers
    for layer, rows in zip(layers, new, strict=False):
        if rows:
            layer.update(*rows)
        elif isinstance(layer, StaticSlidingWindowLayer):
            layer.cumulative_length_int += tokens


class StepCache(Cache):
    """Stands in for the user's cache while the graph is traced: update() only, as the masks are built before."""

    def __init__(self, steps: list[LayerStep]):
        # Not Cache.__init__, which asks for layers: there are none here.
        self.steps = steps
        self.new: list[tuple[Tensor, ...] | None] = [None] * len(steps)  # (): written in place; None: update() was not called
        self.layers = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New rows in, all rows that attention may see out; [batch, kv_heads, rows, head_dim]."""
        step = self.steps[layer_idx]
        keys, values = step.keys, step.values
        if step.mode == GROW:
            self.new[layer_idx] = (key_states, value_states)
            if keys is None or values is None:
                return key_states, value_states
            return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
        self.new[layer_idx] = ()
        assert keys is not None and values is not None, "static layers are allocated by plan()"
        if step.mode == WRITE:
            assert step.length is not None
            rows = torch.arange(key_states.shape[-2], device=keys.device) + step.length
            keys.index_copy_(2, rows, key_states)
            values.index_copy_(2, rows, value_states)
            step.length.add_(key_states.shape[-2])
            return keys, values
        if step.mode == ROLL:
            # As transformers does it: rolling into a new tensor, so that no row is read after it was overwritten.
            last = torch.tensor([-1], device=keys.device)
            for stored, new in ((keys, key_states), (values, value_states)):
                rolled = stored.roll(-1, dims=-2)
                rolled[:, :, last] = new
                stored.copy_(rolled)
            return keys, values
        if step.mode == SLIDE:
            key_states = torch.cat([keys[:, :, 1:], key_states], dim=-2)
            value_states = torch.cat([values[:, :, 1:], value_states], dim=-2)
        keys.copy_(key_states[:, :, -step.window :])
        values.copy_(value_states[:, :, -step.window :])
        return key_states, value_states

    @property
    def is_compileable(self) -> bool:
        """As the cache that it stands for."""
        return all(step.mode != GROW for step in self.steps)

    def __len__(self) -> int:
        return len(self.steps)
