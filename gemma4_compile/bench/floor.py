"""The floor of a workload: what its bytes and products take on this device at the rates measured here."""

from dataclasses import dataclass
from typing import Any

import torch

from gemma4_compile.geometry import Geometry, geometry

from .rates import copy_bandwidth, product_rate
from .workloads import Workload


@dataclass(frozen=True)
class Rates:
    """Bytes a second that a large copy reads and writes, and FLOPs a second of a large product in the model's dtype."""

    bytes: float
    flops: float

    @classmethod
    def measured(cls, dtype: torch.dtype) -> "Rates":
        """On this GPU, now."""
        return cls(copy_bandwidth(), product_rate(dtype))


@dataclass(frozen=True)
class Floor:
    """Seconds. prefill: products of all prompts; decode: for each step its weights once, and the keys and values that attention
    must read; decode_step: a step in the middle."""

    prefill: float
    decode: float
    decode_step: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode


def floor(model: Any, load: Workload, at_a_time: int, rates: Rates, kv_bytes: int) -> Floor:
    """Of requests that run in full batches from the beginning to the end.

    at_a_time  sequences of a step
    kv_bytes   of an element of keys and values
    """
    batch, shape, window = min(at_a_time, load.requests), geometry(model.config), int(model.config.sliding_window or 0)
    weights, active = _weights(model, shape, batch)
    step = weights + batch * _cached_bytes(shape, window, load.given + load.wanted // 2, kv_bytes)
    steps = (load.wanted - 1) * -(-load.requests // batch)
    prefill = 2 * active * load.given * load.requests / rates.flops
    return Floor(prefill, steps * step / rates.bytes, step / rates.bytes)


def _weights(model: Any, shape: Geometry, batch: int) -> tuple[float, float]:
    """Bytes of weights that a step of so many rows reads, and the parameters that a token of a prompt multiplies.

    Of embeddings a row is read, but that of the head is its product, tied or not. Of the experts a step reads those that
    its rows chose: by chance, so many different ones."""
    hit = 1 - (1 - shape.top_k / shape.experts) ** batch if shape.experts else 1.0
    read = multiplied = 0.0
    late = tuple(
        f".layers.{layer.index}." for layer in shape.layers if layer.shares_kv
    )  # they compute a prompt's last row alone
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        tied_head = name.endswith("embed_tokens.weight") and model.config.tie_word_embeddings
        if parameter.data_ptr() in seen or ("embed_tokens" in name and not tied_head):
            continue
        seen.add(parameter.data_ptr())
        expert = ".experts." in name
        size = parameter.numel() * parameter.itemsize
        read += size * (hit if expert else 1.0)
        if not (tied_head or name.startswith("lm_head") or any(part in f".{name}" for part in late)):
            multiplied += parameter.numel() * (shape.top_k / shape.experts if expert else 1.0)
    return read, multiplied


def _cached_bytes(shape: Geometry, window: int, length: int, kv_bytes: int) -> float:
    """Keys and values that one sequence's next token reads: in each layer, also in those that share them."""
    return sum(
        2 * layer.kv_heads * layer.head_dim * kv_bytes * (length if layer.kind == "full_attention" else min(length, window))
        for layer in shape.layers
    )
