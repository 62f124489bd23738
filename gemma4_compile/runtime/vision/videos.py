"""A video as pictures and text: which frames are taken, and the time that is written before each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

_FPS = 24.0  # of frames without times, as transformers' processor has it


@dataclass(frozen=True)
class Video:
    """A video as it was given.

    frames   images, in order
    seconds  at which each stands
    tokens   that a frame may have at most, and `most` frames that are taken; None: as many as the processor says
    """

    frames: Sequence[Any]
    seconds: Sequence[float]
    tokens: int | None = None
    most: int | None = None

    @classmethod
    def of(cls, frames: Any, options: Mapping[str, Any]) -> Video:
        """frames   a list of images, or an array [frames, height, width, 3] of uint8
        options  fps: frames a second, 24 unless given; or timestamps: seconds of each frame; num_frames and max_soft_tokens

        Raises ValueError for all else."""
        if isinstance(frames, np.ndarray) and frames.ndim == 4:
            frames = list(frames)
        if not isinstance(frames, (list, tuple)) or not frames:
            raise ValueError(
                f"a video must be a list of its frames, got {type(frames).__name__}; read them from the file first"
            )
        fps, seconds, most = (options.get(name) for name in ("fps", "timestamps", "num_frames"))
        if fps is not None and not (_is_number(fps) and fps > 0):
            raise ValueError(f"a video's fps must be more than 0, got {fps!r}; leave it out for {_FPS:.0f}")
        if most is not None and not (isinstance(most, int) and most >= 1):
            raise ValueError(f"a video's num_frames must be 1 or more, got {most!r}; leave it out for the processor's")
        if seconds is None:
            seconds = [index / (fps or _FPS) for index in range(len(frames))]
        elif not isinstance(seconds, (list, tuple, np.ndarray)) or not all(_is_number(s) and s >= 0 for s in seconds):
            raise ValueError(f"a video's timestamps must be a list of seconds, got {seconds!r:.60}; give fps instead")
        elif len(seconds) != len(frames):
            raise ValueError(f"each frame needs its timestamp, got {len(seconds)} for {len(frames)} frames; give as many")
        return cls(frames, [float(s) for s in seconds], options.get("max_soft_tokens"), most)

    def sampled(self, most: int | None) -> Video:
        """At most so many of its frames, evenly; its own number counts more."""
        most = self.most or most
        if most is None or len(self.frames) <= most:
            return self
        chosen = [index * len(self.frames) // most for index in range(most)]
        return replace(self, frames=[self.frames[i] for i in chosen], seconds=[self.seconds[i] for i in chosen])

    def text(self, mark: str) -> str:
        """What stands for it in a prompt: `mark` for each frame, behind its time, as transformers' processor writes it."""
        return " ".join(f"{int(seconds // 60):02d}:{int(seconds % 60):02d} {mark}" for seconds in self.seconds)


def with_times(text: str, videos: Sequence[Video], mark: str) -> str:
    """A prompt's text with a placeholder for each frame in the place of each video's one. Raises ValueError where they differ
    in number."""
    parts = text.split(mark)
    if len(parts) - 1 != len(videos):
        raise ValueError(
            f"a prompt must have a placeholder for each video, got {len(parts) - 1} for {len(videos)} videos; see that text "
            f"has {mark}, and that the chat template writes it"
        )
    return "".join(part + video.text(mark) for part, video in zip(parts, videos, strict=False)) + parts[-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
