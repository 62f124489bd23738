"""An image among a prompt's tokens, and what its tokens stand for where prefixes are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, eq=False)
class Patches:
    """An image as the vision tower reads it.

    values     [tokens, patches of a token, pixels of a patch]: uint8 that `scale` makes numbers of, or float32 where they are
               no bytes
    positions  [tokens, patches of a token, 2] int64: column and row
    key        of its contents
    """

    values: np.ndarray
    positions: np.ndarray
    scale: float
    key: bytes

    @property
    def tokens(self) -> int:
        """Soft tokens that stand for it."""
        return len(self.values)

    def numbers(self) -> np.ndarray:
        """The values as float32."""
        return levels(self.scale)[self.values] if self.values.dtype == np.uint8 else self.values

    @classmethod
    def of(cls, values: np.ndarray, positions: np.ndarray, tokens: int, scale: float) -> Patches:
        """Of patches in any order.

        values     [patches, pixels of a patch] float32, as the processor made them of bytes times `scale`; 0: of none
        positions  [patches, 2] int64
        tokens     that the patches are pooled to, in squares"""
        per_token = len(values) // tokens
        side = math.isqrt(per_token)
        if side > 1:  # those of a token together, tokens row by row
            columns = (int(positions[:, 0].max()) + 1) // side
            token = positions[:, 0] // side + columns * (positions[:, 1] // side)
            order = np.argsort(token, kind="stable")
            values, positions = values[order], positions[order]
        values, positions = (x.reshape(tokens, per_token, -1) for x in (values, positions))
        as_bytes = np.rint(values / scale) if scale else values
        if scale and as_bytes.min() >= 0 and as_bytes.max() <= 255:
            whole = as_bytes.astype(np.uint8)
            if np.array_equal(levels(scale)[whole], values):  # a quarter of the memory, and of the way to the device
                values = whole
        digest = blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16)
        digest.update(positions.astype(np.int32).tobytes() + str((values.dtype, scale)).encode())
        return cls(np.ascontiguousarray(values), np.ascontiguousarray(positions), scale, digest.digest())


def levels(scale: float) -> np.ndarray:
    """[256] float32: what an image processor makes of each byte."""
    return (np.arange(256, dtype=np.uint8) * scale).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ImageSpan:
    """Tokens `start` to `end` of a prompt, which stand for an image."""

    start: int
    image: Patches

    @property
    def end(self) -> int:
        return self.start + self.image.tokens


class PreparedPrompt(NamedTuple):
    """Token ids of a prompt, and the images among them."""

    tokens: list[int]
    images: tuple[ImageSpan, ...] = ()


def blocks_of(spans: Sequence[ImageSpan]) -> list[tuple[int, int]]:
    """Where image tokens stand without others between them, each (first, end): those see each other where a model says so."""
    found: list[tuple[int, int]] = []
    for span in spans:
        if found and found[-1][1] == span.start:
            found[-1] = found[-1][0], span.end
        else:
            found.append((span.start, span.end))
    return found


def contents(tokens: Sequence[int], spans: Sequence[ImageSpan]) -> list[int]:
    """The prompt's tokens with numbers in the images' places that follow from what they show, and are no tokens. In a block
    each depends on all of it, as its keys and values may."""
    found = list(tokens)
    for first, end in blocks_of(spans):
        digest = blake2b(b"".join(s.image.key for s in spans if first <= s.start < end), digest_size=16).digest()
        words = [-1 - (int.from_bytes(half, "little") >> 1) for half in (digest[:8], digest[8:])]
        found[first:end] = [words[i % 2] for i in range(end - first)]
    return found
