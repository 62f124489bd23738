"""The part of a multimodal Gemma 4 that makes embeddings of images: what Hugging Face keeps beside the text model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, conversion_mapping
from transformers.initialization import no_init_weights
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder

from .families import GEMMA4

_PARTS = ("vision_tower", "embed_vision")


class VisionPart(nn.Module):
    """Tower and embedder of a multimodal model.

    config        the whole model's
    vision_tower  Gemma4VisionModel; None where embed_vision takes pixels itself (gemma4_unified)
    embed_vision  from the tower's width to the text model's
    """

    def __init__(self, config: Any, vision_tower: nn.Module | None, embed_vision: nn.Module):
        super().__init__()
        self.config, self.vision_tower, self.embed_vision = config, vision_tower, embed_vision

    @property
    def pixels_of_patch(self) -> int:
        """Numbers that a patch is made of."""
        vision = self.config.vision_config
        return 3 * (vision.patch_size if self.vision_tower is not None else vision.model_patch_size) ** 2

    def embed(self, states: Tensor) -> Tensor:
        """Pooled states [tokens, width of the tower] as the text model's embeddings [tokens, H]."""
        return self.embed_vision(inputs_embeds=states)


def has_vision(config: Any) -> bool:
    """Whether a model of this config takes images."""
    return getattr(config, "vision_config", None) is not None


def tower_of(model: Any) -> Any:
    """The vision tower of a multimodal model; None for one without, as gemma4_unified's."""
    return getattr(getattr(model, "model", None), "vision_tower", None)


def vision_part(model: Any) -> VisionPart | None:
    """That of a multimodal model, on its very weights; None for one that takes no images."""
    inner: Any = getattr(model, "model", None)
    if not has_vision(getattr(model, "config", None)) or getattr(inner, "embed_vision", None) is None:
        return None
    return VisionPart(model.config, tower_of(model), inner.embed_vision)


def load_vision(folder: str | Path, dtype: torch.dtype, device: torch.device) -> VisionPart | None:
    """That of a checkpoint, whose text part is not read; None for one without.

    folder   a local one

    Raises ValueError where weights are missing."""
    folder = Path(folder)
    config: Any = AutoConfig.from_pretrained(folder)
    if not has_vision(config):
        return None
    with no_init_weights():
        vision, text = config.vision_config, config.get_text_config()
        if config.model_type == GEMMA4.model_type:
            part = VisionPart(config, AutoModel.from_config(vision), Gemma4MultimodalEmbedder(vision, text))
        else:
            from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedVisionEmbedder

            part = VisionPart(config, None, Gemma4UnifiedVisionEmbedder(vision, text))
    try:
        weights = _weights(folder, config.model_type)
        part.load_state_dict({name: _as(tensor, dtype) for name, tensor in weights.items()}, assign=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"the vision part must be whole, got {reason!r} in {folder}; download the checkpoint again") from error
    return part.eval().requires_grad_(False).to(device)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _weights(folder: Path, model_type: str) -> dict[str, Tensor]:
    """Tensors of the vision part by their names in it; those of released files may be others, which transformers knows."""
    renamed = getattr(conversion_mapping, "get_checkpoint_conversion_mapping", lambda _: None)(model_type) or []
    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    found = {}
    for name in files:
        with safe_open(folder / name, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (it is no mapping)
                own = key.removeprefix("model.")
                for rename in renamed:
                    own = re.sub(rename.source_patterns[0], rename.target_patterns[0], own)
                if own.startswith(_PARTS):
                    found[own] = opened.get_tensor(key)
    return found


def image_processor_of(folder: str | Path) -> Any:
    """The image processor of a checkpoint's folder, or None."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError:  # without torchvision: up to transformers 5.23 for all, and gemma4_unified has no other
        from transformers import Gemma4ImageProcessorPil

        found = Gemma4ImageProcessorPil.from_pretrained(folder, local_files_only=True)
        merged = AutoConfig.from_pretrained(folder, local_files_only=True).model_type != GEMMA4.model_type
        return without_merging(found) if merged else found


# Of transformers' Gemma4VideoProcessor, where a checkpoint says nothing else.
_FRAMES = 32
_NUMBERS: dict[str, Any] = {"max_soft_tokens": 70, "do_normalize": True, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


class FrameOptions(NamedTuple):
    """How a checkpoint takes videos.

    frames   that are taken of a video at most; None: all
    numbers  arguments with which the image processor makes of a frame what the video processor would
    """

    frames: int | None = _FRAMES
    numbers: dict[str, Any] = _NUMBERS

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> FrameOptions:
        """settings   of a video processor"""
        names = (*_NUMBERS, "do_rescale", "rescale_factor")
        given = {name: settings[name] for name in names if settings.get(name) is not None}
        frames = settings.get("num_frames", _FRAMES) if settings.get("do_sample_frames", True) else None
        return cls(frames, _NUMBERS | given)


def frame_options_of(folder: str | Path) -> FrameOptions:
    """Those of a checkpoint's folder, from the files in which transformers looks for a video processor."""
    for name in ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"):
        path = Path(folder) / name
        settings = json.loads(path.read_text()) if path.is_file() else {}
        settings = settings.get("video_processor") if name == "processor_config.json" else settings
        if settings:
            return FrameOptions.of(settings)
    return FrameOptions()


def without_merging(processor: Any) -> Any:
    """An image processor of gemma4's as gemma4_unified's: k x k patches that are merged to one are a patch k times as large."""
    side = processor.patch_size * processor.pooling_kernel_size
    return type(processor)(patch_size=side, pooling_kernel_size=1, max_soft_tokens=processor.max_soft_tokens)
