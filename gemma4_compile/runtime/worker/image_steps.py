"""Prompt steps with images: their program, and what it reads beside a step of text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.hf.vision import VisionPart
from gemma4_compile.packed.compile import no_images
from gemma4_compile.packed.inputs import bidirectional
from gemma4_compile.packed.program import StepResult
from gemma4_compile.packed.step_inputs import StepInputs
from gemma4_compile.runtime.scheduling.sequence import ScheduledChunk
from gemma4_compile.runtime.step.arrays import ImagePart, image_parts
from gemma4_compile.runtime.vision.spans import Patches

from .encoder import ImageEncoder
from .model import PackedModel


class ImageSteps:
    """Runs steps in which some tokens are of images.

    packed       the text model
    part         the vision part beside it
    kv           keys and values of all steps
    graphs       the text steps' graphs, whose buckets and memory pool these have too; None: no graphs
    cache_bytes  of embeddings
    """

    def __init__(
        self, packed: PackedModel, part: VisionPart, kv: dict[str, Tensor], graphs: GraphRunner | None, cache_bytes: int
    ):
        recorder = None if graphs is None else graphs.recorder
        self.encoder = ImageEncoder(part, lambda: packed.tower_program(part), cache_bytes, recorder)
        self._packed, self._kv = packed, kv
        self._ahead = bidirectional(packed.model.config)
        self.compile(graphs)

    def compile(self, graphs: GraphRunner | None) -> None:
        """The program, and what replays it, as the models are now."""
        self.program = self._packed.image_program()
        self.graphs = None if graphs is None else graphs.beside(self.program, self.without)

    def without(self, step: dict[str, Tensor]) -> dict[str, Tensor]:
        """A step of text as one of these that has no image."""
        return step | no_images(self._packed.model, step)

    def plan(self, scheduled: Sequence[ScheduledChunk]) -> tuple[list[ImagePart], list[Patches]]:
        """The images of a step, in order, and those to be encoded for it; on rank 0."""
        parts = image_parts(scheduled)
        if not parts:
            return [], []
        # All images of whoever has one in this step: they are wanted soon, and many at a time take less time.
        wanted = (span.image for w in scheduled for span in w.sequence.images if span.end > w.start)
        return parts, self.encoder.missing(wanted)

    def run(
        self, step: StepInputs[Tensor], parts: Sequence[ImagePart], new: Sequence[Patches]
    ) -> StepResult:  # fmt: skip
        """Logits and states of the wanted rows.

        parts, new   as `plan` gives them"""
        given = step.images
        assert given is not None, "a step with images says where they are"
        embeddings = self.encoder.embeddings([part.image for part in parts], new)
        rows = torch.cat([each[p.first : p.end] for each, p in zip(embeddings, parts, strict=True)])
        config, positions = self._packed.model.config, step.positions
        images = rows.new_zeros((len(positions), config.hidden_size))
        inputs = step.model() | self._kv | {
            "images": images.index_copy_(0, given.rows, rows.to(images.dtype)),
            "image_tokens": torch.zeros_like(positions, dtype=torch.bool).index_fill_(0, given.rows, True),
        }  # fmt: skip
        if self._ahead:
            # The device alone knows where tokens behind drafts stand.
            inputs["until"] = torch.maximum(given.until, positions.int())
        return (self.graphs or self.program).run(inputs)
