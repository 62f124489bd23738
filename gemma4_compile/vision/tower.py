"""A vision tower as a packed program: the patches of many images in one row, no padding between them, their embeddings out.

Its inputs, of I images that have T soft tokens of k x k patches each:

    pixels     [T, k * k, P] float32   the patches of each token, as the image processor gives them
    positions  [T, k * k, 2] int64     column and row of each patch
    starts     [I + 1] int32           patches of image i are starts[i] to starts[i + 1]; further ones are padding
    reach      [longest] uint8         its length alone counts: patches that an image may have

A model without a tower embeds tokens one by one: pixels are [T, 1, P], and nothing else is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gemma4_compile import ops  # noqa: F401  (registers the ops)
from gemma4_compile.backend import Backend
from gemma4_compile.hf.parallel import Division
from gemma4_compile.hf.vision import VisionPart
from gemma4_compile.packed.compile import compile_step, open_step, program_folder
from gemma4_compile.packed.inputs import require
from gemma4_compile.packed.program import Program

from .encoder import fusions_in

NAME = "gemma4_compile_vision"
INPUTS = ("pixels", "positions", "starts", "reach")
_TRACED = 6  # tokens of each of two images


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float,
    starts: Tensor, reach: Tensor, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """One layer's attention, as Gemma4VisionAttention calls it; Dynamo traces through it.

    query, key, value   [1, heads, N, D]
    returns             [1, N, heads, D], and no weights
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.ops.gemma4.block_attention(q, k, v, starts, reach, scaling), None


AttentionInterface.register(NAME, attention_forward)


def patches_of_token(part: VisionPart) -> int:
    """k * k."""
    return 1 if part.vision_tower is None else part.config.vision_config.pooling_kernel_size**2


def open_tower(part: VisionPart, backend: Backend) -> Program:
    """The packed program of a vision part, compiled or loaded; its result is [1, T, H], embeddings for the text model."""
    device = next(part.parameters()).device
    backend = replace(backend, enabled=fusions_in(part.config.vision_config, backend.enabled))
    folder = program_folder(part, backend, Division(), device)
    return open_step(part, backend, folder, lambda: _compile(part, backend, device), check)


def check(inputs: dict[str, Tensor]) -> None:
    """Raises ValueError for inputs that are missing, or disagree in the number of patches."""
    require(inputs, INPUTS)
    pixels, positions = inputs["pixels"], inputs["positions"]
    if pixels.shape[:2] != positions.shape[:2]:
        raise ValueError(f"each patch needs its position, got {list(pixels.shape)} and {list(positions.shape)}")


def _compile(part: VisionPart, backend: Backend, device: torch.device) -> Program:
    per_token, size = patches_of_token(part), part.pixels_of_patch
    inputs = {
        "pixels": torch.zeros((2 * _TRACED, per_token, size), device=device),
        "positions": torch.zeros((2 * _TRACED, per_token, 2), dtype=torch.int64, device=device),
        "starts": torch.tensor([0, _TRACED * per_token, 2 * _TRACED * per_token], dtype=torch.int32, device=device),
        "reach": torch.zeros(_TRACED * per_token, dtype=torch.uint8, device=device),
    }
    step = _make_step(part)
    attending = [] if part.vision_tower is None else [part.vision_tower]
    return compile_step(part, step, inputs, INPUTS, backend, attending, check=check, attention=NAME)


def _make_step(part: VisionPart) -> Callable[..., Any]:
    return _embedder_step(part) if part.vision_tower is None else _tower_step(part)


def _embedder_step(part: VisionPart) -> Callable[..., Any]:
    embedder: Any = part.embed_vision

    def step(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, positions = inputs["pixels"], inputs["positions"]
        torch._check(positions.shape[0] == pixels.shape[0])
        found = embedder(pixels.transpose(0, 1), positions.transpose(0, 1), return_dict=True)
        return found.pooler_output, found.last_hidden_state

    return step


def _tower_step(part: VisionPart) -> Callable[..., Any]:
    tower: Any = part.vision_tower
    config, root = tower.config, float(tower.pooler.root_hidden_size)

    def step(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, positions = inputs["pixels"], inputs["positions"]
        tokens, per_token = pixels.shape[:2]
        torch._check(positions.shape[0] == tokens)
        row = positions.reshape(1, -1, 2)
        nowhere = torch.zeros(row.shape[:2], dtype=torch.bool, device=row.device)
        embedded = tower.patch_embedder(pixels.reshape(1, -1, pixels.shape[2]), row, nowhere)
        states = tower.encoder._call_impl(
            inputs_embeds=embedded, attention_mask=None, pixel_position_ids=row, starts=inputs["starts"], reach=inputs["reach"]
        ).last_hidden_state
        # The mean of a token's patches, which stand together; rounded where Gemma4VisionPooler rounds.
        pooled = states.view(tokens, per_token, states.shape[-1]).float().mul(1 / per_token).sum(1).to(states.dtype)
        pooled = pooled.float() * root
        if config.standardize:
            pooled = (pooled - tower.std_bias.float()) * tower.std_scale.float()
        pooled = pooled.to(states.dtype)[None]
        return part.embed(pooled), pooled

    return step
