"""Embeddings of images: those of all requests at hand at a time, kept by content."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gemma4_compile.graphs.buckets import fitting
from gemma4_compile.graphs.checks import difference
from gemma4_compile.graphs.recorder import Recorder
from gemma4_compile.hf.vision import VisionPart
from gemma4_compile.packed.program import Program
from gemma4_compile.runtime.step.staging import Staging
from gemma4_compile.runtime.vision.spans import Patches, levels
from gemma4_compile.vision.tower import patches_of_token

# Soft tokens of a CUDA graph: of one image by each budget, and of a few. More fill a GPU without.
BUCKETS = (70, 140, 210, 280, 420, 560, 840, 1120, 1680, 2240)
_IMAGES = 32  # of a graph
_WASTE = 1.25  # a graph computes at most so many times the tokens at hand
_LONGEST = 1120  # soft tokens of an image, by transformers' largest budget
_CPU_BYTES = 2**30  # of a chunk's activations
_FIRST_PATCHES = 16 * 2520  # of the first chunk, whose memory is measured
_MOST_PATCHES = 1 << 16  # of a chunk: more keep a GPU no busier, and each lies in pinned memory too


class ImageEncoder:
    """Encodes images with the vision part of a model, packed without padding between them, in chunks that fit into memory.

    part         in eval mode, on the device that it is to run on
    opened       gives the part's packed program, see vision/tower.py
    cache_bytes  of embeddings that are kept for images that come again
    recorder     captures CUDA graphs, a bucket of tokens each; None: none

    `refused` says why a bucket runs without a graph. Raises ValueError for a part that does not compile.
    """

    def __init__(self, part: VisionPart, opened: Callable[[], Program], cache_bytes: int, recorder: Recorder | None = None):
        self.part, self._open, self._cache_bytes, self._recorder = part, opened, cache_bytes, recorder
        weight = next(part.parameters())
        self._device = weight.device
        if self._device.type == "cuda" and weight.dtype == torch.float32 and part.vision_tower is not None:
            self._recorder = None  # attention of fp32 asks the host for each image's place
        self._staging = Staging(self._device)
        self._per_token = patches_of_token(part)
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()
        self._held = 0
        self._patch_bytes = 0.0  # of activations, measured
        self.encoded = self.found = self.chunks = 0  # images that were computed, and that were kept; calls of the program
        self.compile()

    def compile(self) -> None:
        """The program, as the model is now; what was computed before is forgotten."""
        self.program: Program = self._open()
        self._graphs: dict[int, _Graph] = {}
        self.refused: dict[int, str] = {}
        self.forget()

    def forget(self) -> None:
        """Weights have changed."""
        self._cache.clear()
        self._held = 0

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
        made = dict(zip([image.key for image in new], self.encode(new), strict=True))
        self.encoded, self.found = self.encoded + len(made), self.found + len(kept)
        for key, embedding in made.items():
            self._keep(key, embedding)
        kept |= made
        return [kept[image.key] for image in images]

    def _keep(self, key: bytes, embedding: Tensor) -> None:
        self._cache[key] = embedding
        self._held += embedding.nbytes
        while self._held > self._cache_bytes and self._cache:
            _, dropped = self._cache.popitem(last=False)
            self._held -= dropped.nbytes

    @torch.no_grad()
    def encode(self, images: Sequence[Patches]) -> list[Tensor]:
        """[tokens, H] of each image, computed."""
        found: list[Tensor] = []
        for chunk in self._chunks(images):
            self.chunks += 1
            embedded = self._run(chunk)
            # Copies: one image kept shall not keep all of its chunk, nor change with a graph's next replay.
            found += [part.clone() for part in embedded.split([image.tokens for image in chunk])]
        return found

    def _chunks(self, images: Sequence[Patches]) -> Iterator[Sequence[Patches]]:
        """As many in a row as fit into memory."""
        first = 0
        while first < len(images):
            most, patches, end = self._most_patches(), 0, first
            while end < len(images) and (end == first or patches + len(images[end].values) * self._per_token <= most):
                patches += images[end].values.shape[0] * self._per_token
                end += 1
            yield images[first:end]
            first = end

    def _most_patches(self) -> int:
        if not self._patch_bytes:
            return _FIRST_PATCHES
        return min(int(self._free_bytes() / self._patch_bytes), _MOST_PATCHES)

    def _free_bytes(self) -> int:
        """Half of what is free, a tenth of all at most: steps and their logits want memory beside."""
        if self._device.type != "cuda":
            return _CPU_BYTES
        free, total = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return min(free // 2, total // 10)

    def _run(self, images: Sequence[Patches]) -> Tensor:
        """[tokens, H] of a chunk."""
        inputs = self._inputs(images)
        tokens = len(inputs["pixels"])
        if self._recorder is not None and len(images) <= _IMAGES and (bucket := self._bucket(tokens)):
            found = self._graphed(self._recorder, bucket, inputs)
            if found is not None:
                return found
        if self._device.type != "cuda" or self._patch_bytes:
            self._patch_bytes = self._patch_bytes or float(self._estimate())
            return self.program(inputs)[0]
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        result = self.program(inputs)[0]
        used = torch.cuda.max_memory_allocated(self._device) - before
        self._patch_bytes = max(used, 1) / (tokens * self._per_token)
        return result

    def _estimate(self) -> int:
        """Bytes of a patch where nothing measures them: its pixels as numbers twice, and two layers' widest states."""
        config = self.part.config.vision_config
        width = getattr(config, "intermediate_size", 0) + 4 * getattr(config, "hidden_size", 0)
        return 8 * self.part.pixels_of_patch + 8 * width

    def _inputs(self, images: Sequence[Patches]) -> dict[str, Tensor]:
        """What the program reads: one copy to the device, bytes as bytes."""
        counts = [image.values.shape[0] * image.values.shape[1] for image in images]
        arrays = {
            "positions": np.concatenate([image.positions for image in images]),
            "starts": np.cumsum([0, *counts], dtype=np.int32),
        }
        kinds = {(image.values.dtype.name, image.scale) for image in images}
        alike = len(kinds) == 1 and images[0].values.dtype == np.uint8
        values = [image.values if alike else image.numbers() for image in images]
        arrays["pixels"] = np.concatenate(values)
        sent = self._staging.send(arrays)
        if alike:
            table = torch.from_numpy(levels(images[0].scale)).to(self._device)
            sent["pixels"] = table[sent["pixels"].int()]
        return sent | {"reach": torch.empty(max(counts), dtype=torch.uint8, device=self._device)}

    # CUDA graphs

    def capture(self) -> Iterator[str]:
        """Capture the graph of each bucket; yields its name before it begins. Nothing to do without graphs."""
        for tokens in reversed(BUCKETS) if self._recorder is not None else ():
            yield f"{tokens} tokens of images"
            values = np.zeros((tokens, self._per_token, self.part.pixels_of_patch), np.uint8)
            positions = np.zeros((tokens, self._per_token, 2), np.int64)
            parts = [slice(first, first + _LONGEST) for first in range(0, tokens, _LONGEST)]
            self.encode([Patches(values[part], positions[part], 1.0, b"") for part in parts])

    def _bucket(self, tokens: int) -> int:
        bucket = fitting(BUCKETS, tokens)
        return bucket if bucket <= max(_WASTE * tokens, BUCKETS[0]) and bucket not in self.refused else 0

    def _graphed(self, recorder: Recorder, bucket: int, inputs: dict[str, Tensor]) -> Tensor | None:
        """Of a chunk by its bucket's graph, captured where it is the first; None where that fails."""
        tokens = len(inputs["pixels"])
        try:
            graph = self._graphs.get(bucket)
            if graph is not None:
                return graph.run(inputs)
            graph = _Graph(bucket, self._per_token, inputs, self.program, recorder)
            found = graph.run(inputs)
        except RuntimeError as error:
            self._refuse(bucket, f"its capture failed: {error}")
            return None
        expected = self.program(inputs)[0]
        if wrong := difference(found, expected):
            self._refuse(bucket, f"a replay gave other embeddings than the program ({wrong})")
            return expected
        self._graphs[bucket] = graph
        return found[:tokens]

    def _refuse(self, bucket: int, reason: str) -> None:
        self.refused[bucket] = reason
        warnings.warn(f"gemma4_compile encodes {bucket} tokens of images without CUDA graphs: {reason}", stacklevel=4)


class _Graph:
    """The program over static buffers of so many soft tokens. What it returns is valid until its next run."""

    def __init__(self, bucket: int, per_token: int, inputs: dict[str, Tensor], program: Program, recorder: Recorder):
        device, pixels = inputs["pixels"].device, inputs["pixels"]
        longest = min(bucket, _LONGEST) * per_token
        self._static = {
            "pixels": torch.zeros((bucket, *pixels.shape[1:]), dtype=pixels.dtype, device=device),
            "positions": torch.zeros((bucket, per_token, 2), dtype=torch.int64, device=device),
            "starts": torch.zeros(_IMAGES + 1, dtype=torch.int32, device=device),
            "reach": torch.zeros(longest, dtype=torch.uint8, device=device),
        }
        self._fill(inputs)
        recorder.warm_up(lambda: program(self._static))
        self._replay: Callable[[], None]
        self._replay, (result,) = recorder.record(lambda: [program(self._static)])
        self._result = recorder.borrow(result)[0]

    def _fill(self, inputs: dict[str, Tensor]) -> None:
        """Padding patches belong to no image: `starts` ends before them."""
        for name in ("pixels", "positions"):
            self._static[name][: len(inputs[name])].copy_(inputs[name])
        starts, given = self._static["starts"], inputs["starts"]
        starts[: len(given)].copy_(given)
        starts[len(given) :].copy_(given[-1:].expand(len(starts) - len(given)))

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """[tokens, H]"""
        self._fill(inputs)
        self._replay()
        return self._result[: len(inputs["pixels"])]
