"""Where an engine's vision part and image processor come from: a model that is there, or its checkpoint."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig

from gemma4_compile.hf.loading import checkpoint
from gemma4_compile.hf.vision import (
    FrameOptions,
    VisionPart,
    frame_options_of,
    has_vision,
    image_processor_of,
    load_vision,
    vision_part,
)


@dataclass
class VisionSource:
    """Where an engine's vision part comes from, when it is wanted.

    config     of the multimodal model
    given      the user's image processor, or a whole one; None: the checkpoint's
    part       the part of a model that is there
    folder     of the checkpoint; None: it is not known
    """

    config: Any
    given: Any
    part: VisionPart | None = None
    folder: Path | None = None

    @cached_property
    def processor(self) -> Any:
        """The image processor. Raises ValueError where there is none, ImportError without Pillow."""
        found = getattr(self.given, "image_processor", self.given)
        if found is None and self.folder is not None:
            found = image_processor_of(self.folder)
        if found is None:
            raise ValueError("an image needs an image processor, got a checkpoint without; pass processor= to Engine")
        return found

    @cached_property
    def frames(self) -> FrameOptions:
        """How frames of videos are taken."""
        video_processor = getattr(self.given, "video_processor", None)
        if video_processor is not None:
            return FrameOptions.of(vars(video_processor))
        return FrameOptions() if self.folder is None else frame_options_of(self.folder)

    def open(self, model: Any) -> VisionPart:
        """The part, for a text model. Raises ValueError where its weights cannot be read."""
        part = self.part
        if part is None:
            assert self.folder is not None, "a part is there, or its checkpoint"
            part = load_vision(self.folder, model.dtype, model.device)
        assert part is not None, "its config has one"
        return part


def vision_of(model: nn.Module | str | Path, processor: Any) -> VisionSource | None:
    """Of what an Engine is given; None where images are none of its business.

    processor   the user's; None: the checkpoint's"""
    if isinstance(model, (str, Path)):
        folder, _ = checkpoint(model)
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        return VisionSource(config, processor, folder=folder) if has_vision(config) else None
    part = vision_part(model)
    name: Any = getattr(model, "name_or_path", "")
    return None if part is None else VisionSource(model.config, processor, part, Path(name) if name else None)
