"""Tiny models as packed steps, each compiled once a test process."""

import random
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemma4_compile import OptimizeConfig, optimize
from gemma4_compile.packed.inputs import PlainKV
from gemma4_compile.runtime.worker.model import PackedModel
from tests.models import tiny

CAPACITY, REQUESTS = 64, 20


@cache
def packed(kind: str, dtype: torch.dtype = torch.float32, yoco: bool = True) -> PackedModel:
    """The same weights with and without YOCO."""
    config = OptimizeConfig(disable=() if yoco else ("yoco",))
    return PackedModel(optimize(tiny(kind, dtype).requires_grad_(False), config))


@cache
def plain(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return tiny(kind, dtype).requires_grad_(False)


def memory(kind: str, dtype: torch.dtype = torch.float32, requests: int = REQUESTS) -> PlainKV:
    return PlainKV(packed(kind, dtype).geometry, requests, CAPACITY, dtype, "cpu")


def tokens_of(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(3, 120) for _ in range(length)]


def logits_of(model: Any, tokens: list[int]) -> Tensor:
    """Of all tokens, by the plain model: [T, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def states_of(model: Any, tokens: list[int]) -> Tensor:
    """Final-normed states of all tokens, by the plain model: [T, H]."""
    with torch.no_grad():
        return model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
