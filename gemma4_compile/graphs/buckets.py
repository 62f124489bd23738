"""The sizes that CUDA graphs are captured for."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """Sizes that graphs are captured for; a step takes the smallest that holds it. Ascending.

    decode    tokens of steps whose rows are all wanted
    tokens    tokens of any other step; a longer one runs without graphs
    rows      wanted rows of any other step
    """

    decode: tuple[int, ...] = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256)
    tokens: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192)
    rows: tuple[int, ...] = (4, 16, 64, 256)

    def __post_init__(self) -> None:
        for name in ("decode", "tokens", "rows"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
                raise ValueError(f"{name} must be ascending positive sizes, got {sizes}; sort them and drop doubles")


@dataclass(frozen=True)
class Bucket:
    """A captured size: tokens, wanted rows, and requests that the static tables hold."""

    tokens: int
    rows: int
    requests: int
    full: bool = False

    @property
    def name(self) -> str:
        return f"decode {self.tokens}" if self.full else f"{self.tokens} tokens, {self.rows} rows"


def fitting(sizes: Sequence[int], wanted: int) -> int:
    """The smallest of the sizes that is enough; 0 if none is."""
    index = bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else 0
