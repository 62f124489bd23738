"""Embeddings of images: many at a time, kept by content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gemma4_compile.hf.vision import VisionPart
from gemma4_compile.runtime.vision.spans import Patches, levels


class ImageEncoder:
    """Encodes images with the vision part of a model.

    part         in eval mode, on the device that it is to run on
    cache_bytes  of embeddings that are kept for images that come again
    """

    def __init__(self, part: VisionPart, cache_bytes: int):
        self.part, self._cache_bytes, self._held = part, cache_bytes, 0
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()
        weight = next(part.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self.encoded = self.found = 0  # images

    def missing(self, images: Iterable[Patches]) -> list[Patches]:
        """Those whose embeddings are not kept, each once."""
        found = {image.key: image for image in images if image.key not in self._cache}
        return list(found.values())

    def embeddings(self, images: Sequence[Patches], new: Sequence[Patches]) -> list[Tensor]:
        """[tokens, H] of each image.

        new   those among them, and others, that are to be encoded; all that are not kept"""
        kept = {image.key: self._cache[image.key] for image in images if image.key in self._cache}
        for key in kept:
            self._cache.move_to_end(key)
        made = {image.key: embedding for image, embedding in zip(new, self._encode(new), strict=True)} if new else {}
        self.encoded, self.found = self.encoded + len(made), self.found + len(kept)
        for key, embedding in made.items():
            self._keep(key, embedding)
        kept |= made
        return [kept[image.key] for image in images]

    def forget(self) -> None:
        """The model has changed."""
        self._cache.clear()
        self._held = 0

    def _keep(self, key: bytes, embedding: Tensor) -> None:
        self._cache[key] = embedding
        self._held += embedding.nbytes
        while self._held > self._cache_bytes and self._cache:
            _, dropped = self._cache.popitem(last=False)
            self._held -= dropped.nbytes

    @torch.no_grad()
    def _encode(self, images: Sequence[Patches]) -> list[Tensor]:
        """Those of one size together."""
        sizes: dict[int, list[int]] = {}
        for index, image in enumerate(images):
            sizes.setdefault(len(image.positions), []).append(index)
        found: list[Tensor] = [torch.empty(0)] * len(images)
        for group in sizes.values():
            values = torch.stack([self._pixels(images[i]) for i in group])
            positions = torch.stack([torch.from_numpy(images[i].positions) for i in group]).to(self._device)
            states = self.part.vision_tower(pixel_values=values, pixel_position_ids=positions).last_hidden_state
            embedded = self.part.embed(states)
            for index, embedding in zip(group, embedded.split([images[i].tokens for i in group]), strict=True):
                found[index] = embedding
        return found

    def _pixels(self, image: Patches) -> Tensor:
        values = torch.from_numpy(image.values).to(self._device)
        if values.dtype != torch.uint8:
            return values
        return torch.from_numpy(levels(image.scale)).to(self._device)[values.int()]
