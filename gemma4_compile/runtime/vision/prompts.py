"""Prompts with images: messages and token ids in, token ids with each image's place out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gemma4_compile.runtime.text import encode

from .pictures import ImageLimits, open_picture
from .spans import ImageSpan, Patches

_FRAME_TOKENS = 70  # of a video's frame at most, as transformers' video processor has it
_IMAGE = ("image", "url", "path", "base64", "image_url")
_SOUNDS = ("audio", "input_audio")


class Source(NamedTuple):
    """An image as it was given, and the tokens that it may have at most; None: as many as the processor says."""

    image: Any
    tokens: int | None = None


@dataclass(frozen=True)
class MarkTokens:
    """The ids of the tokens that images stand for in a prompt."""

    image: int
    begin: int
    end: int
    video: int | None = None
    audio: int | None = None

    @classmethod
    def of(cls, config: Any) -> MarkTokens:
        """config   of the multimodal model"""
        names = ("image_token_id", "boi_token_id", "eoi_token_id", "video_token_id", "audio_token_id")
        return cls(*(getattr(config, name, None) for name in names))  # type: ignore[arg-type]


def split_images(prompt: Any) -> tuple[Any, list[Source]]:
    """A prompt with places for its images, as chat templates take them, and the images in order. A prompt without is itself.

    Raises ValueError for sounds, for parts without their image, for images in places where none can be."""
    if isinstance(prompt, Mapping):
        given = prompt.get("images")
        rest = {key: value for key, value in prompt.items() if key != "images"}
        if "audio" in rest or "audios" in rest:
            raise ValueError("audio is not supported, got some; give text and images")
        if given is None:
            return rest, []
        several = given if isinstance(given, (list, tuple)) else [given]
        return rest, [_of_mapping(each) for each in several]
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(message, Mapping) for message in prompt):
        return prompt, []
    found: list[Source] = []
    messages = []
    for message in prompt:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [part for given in content for part in _parts(given, found)]
            message = {**message, "content": content}
        messages.append(message)
    return messages, found


def has_images(prompt: Any) -> bool:
    """Whether it takes pictures to be opened, which is work worth a thread of its own."""
    try:
        return bool(split_images(prompt)[1])
    except ValueError:
        return False


def _parts(part: Any, found: list[Source]) -> list[Any]:
    """One part of a message as the template takes it; images are noted."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _SOUNDS:
        raise ValueError("audio is not supported, got some in a message; give text and images")
    if kind in ("image", "image_url"):
        found.append(_source(_given(part, kind, _IMAGE), part))
        return [{"type": "image"}]
    if kind == "video":
        frames = _given(part, kind, ("video", "frames"))
        if not isinstance(frames, (list, tuple)) or not frames:
            raise ValueError(
                f"a video must be a list of its frames, got {type(frames).__name__}; read them from the file first"
            )
        found += [_source(frame, {"max_soft_tokens": part.get("max_soft_tokens", _FRAME_TOKENS)}) for frame in frames]
        return [{"type": "image"}] * len(frames)
    return [part]


def _of_mapping(image: Any) -> Source:
    """An image beside its prompt, alone or as a part of a message would have it."""
    if not isinstance(image, Mapping):
        return _source(image, {})
    return _source(_given(image, "image", _IMAGE), image)


def _given(part: Mapping[str, Any], kind: str, names: Sequence[str]) -> Any:
    name = next((name for name in names if part.get(name) is not None), None)
    if name is None:
        raise ValueError(f"a part of type {kind} must hold its {kind}, got {', '.join(map(repr, part))}; add {names[0]!r}")
    found = part[name]
    if name == "image_url" and isinstance(found, Mapping):
        found = found.get("url")
    return f"data:;base64,{found}" if name == "base64" else found


def _source(image: Any, part: Mapping[str, Any]) -> Source:
    return image if isinstance(image, Source) else Source(image, part.get("max_soft_tokens"))


class ImagePrompts:
    """Prompts with images to token ids.

    processor   gives the checkpoint's image processor, once there is an image
    marks       of the checkpoint
    limits      of images
    """

    def __init__(self, processor: Callable[[], Any], marks: MarkTokens, limits: ImageLimits):
        self._processor, self.marks, self.limits = processor, marks, limits

    def patches(self, source: Source) -> Patches:
        """One image as the tower reads it. Raises ValueError for one that cannot be used."""
        picture, processor = open_picture(source.image, self.limits), self._processor()
        options = {} if source.tokens is None else {"max_soft_tokens": source.tokens}
        try:
            found = processor([picture], return_tensors="pt", **options)  # what each kind of processor gives
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"an image cannot be used: {reason}") from error
        positions = np.asarray(found["image_position_ids"][0])
        real = (positions >= 0).all(-1)
        values = np.asarray(found["pixel_values"][0], np.float32)[real]
        scale = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 0.0
        return Patches.of(values, positions[real].astype(np.int64), int(found["num_soft_tokens_per_image"][0]), scale)

    def encode(self, prompt: Any, tokenizer: Any, chat: bool) -> tuple[list[int], tuple[ImageSpan, ...]]:
        """Token ids, and the images among them. Raises ValueError for a prompt or an image that cannot be used."""
        prompt, sources = split_images(prompt)
        return self.placed(encode(prompt, tokenizer, chat), [self.patches(source) for source in sources])

    def placed(self, ids: list[int], images: Sequence[Patches]) -> tuple[list[int], tuple[ImageSpan, ...]]:
        """Put each image's tokens in the place of its one token, marked as transformers' processor does; ids that a processor
        has given have them all already."""
        marks, lengths = self.marks, [image.tokens for image in images]
        if marks.audio in ids or marks.video in ids:
            raise ValueError("audio and whole videos are not supported, got a placeholder of one; give frames as images")
        if not images and marks.image not in ids:
            return ids, ()
        places = [index for index, token in enumerate(ids) if token == marks.image]
        if len(places) == len(images):
            found: list[int] = []
            spans = []
            before = 0
            for place, image in zip(places, images, strict=True):
                bare = place == 0 or ids[place - 1] != marks.begin  # a tokenizer may have marked it itself
                found += [*ids[before:place], *([marks.begin] if bare else [])]
                spans.append(ImageSpan(len(found), image))
                found += [marks.image] * image.tokens + ([marks.end] if bare else [])
                before = place + 1
            return found + ids[before:], tuple(spans)
        if images and len(places) == sum(lengths):
            starts = np.cumsum([0, *lengths[:-1]])
            firsts = [places[start] for start in starts]
            whole = all(places[s + n - 1] == f + n - 1 for s, f, n in zip(starts, firsts, lengths, strict=True))
            if whole:
                return ids, tuple(ImageSpan(first, image) for first, image in zip(firsts, images, strict=True))
        raise ValueError(
            f"a prompt must have a placeholder for each image, got {len(places)} tokens of images for {len(images)} images "
            f"of {sum(lengths)} tokens; add or leave out images"
        )
