"""Prompts with images and videos: messages and token ids in, token ids with each image's place out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np

from gemma4_compile.hf.vision import FrameOptions
from gemma4_compile.runtime.text import encode

from .pictures import ImageLimits, open_picture
from .spans import ImageSpan, Patches
from .videos import Video, with_times

_IMAGE = ("image", "url", "path", "base64", "image_url")
_VIDEO = ("video", "frames")
_REASON = 200  # characters of the processor's own
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


class Parts(NamedTuple):
    """A prompt with places for its images and videos, as chat templates take them; and these, each kind in order."""

    prompt: Any
    images: list[Source]
    videos: list[Video]


def split_images(prompt: Any) -> Parts:
    """A prompt without images or videos is itself.

    Raises ValueError for sounds, for parts without their image, for images in places where none can be."""
    if isinstance(prompt, Mapping):
        rest = {key: value for key, value in prompt.items() if key not in ("images", "videos")}
        if "audio" in rest or "audios" in rest:
            raise ValueError("audio is not supported, got some; give text and images")
        images, videos = prompt.get("images"), prompt.get("videos")
        images = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        videos = videos if isinstance(videos, (list, tuple)) else [] if videos is None else [videos]
        return Parts(rest, [_of_mapping(each) for each in images], [_video(each) for each in videos])
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(message, Mapping) for message in prompt):
        return Parts(prompt, [], [])
    found = Parts([], [], [])
    for message in prompt:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            message = {**message, "content": [_part(given, found) for given in content]}
        found.prompt.append(message)
    return found


def has_images(prompt: Any) -> bool:
    """Whether it takes pictures to be opened, which is work worth a thread of its own."""
    try:
        _, images, videos = split_images(prompt)
        return bool(images or videos)
    except ValueError:
        return False


def _part(part: Any, found: Parts) -> Any:
    """One part of a message as the template takes it; images and videos are noted."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _SOUNDS:
        raise ValueError("audio is not supported, got some in a message; give text and images")
    if kind in ("image", "image_url"):
        found.images.append(_source(_given(part, kind, _IMAGE), part))
        return {"type": "image"}
    if kind == "video":
        found.videos.append(_video(part))
        return {"type": "video"}
    return part


def _of_mapping(image: Any) -> Source:
    """An image beside its prompt, alone or as a part of a message would have it."""
    if not isinstance(image, Mapping):
        return _source(image, {})
    return _source(_given(image, "image", _IMAGE), image)


def _video(video: Any) -> Video:
    """One beside its prompt, or as a part of a message has it."""
    if not isinstance(video, Mapping):
        return Video.of(video, {})
    return Video.of(_given(video, "video", _VIDEO), video)


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
    frames      gives how frames of videos are taken
    """

    def __init__(
        self, processor: Callable[[], Any], marks: MarkTokens, limits: ImageLimits,
        frames: Callable[[], FrameOptions] = FrameOptions,
    ):  # fmt: skip
        self._processor, self.marks, self.limits, self._frames = processor, marks, limits, frames

    def patches(self, source: Source, **numbers: Any) -> Patches:
        """One image as the tower reads it. Raises ValueError for one that cannot be used.

        numbers   arguments of the image processor"""
        picture, processor = open_picture(source.image, self.limits), self._processor()
        options = numbers if source.tokens is None else numbers | {"max_soft_tokens": source.tokens}
        try:
            found = processor([picture], return_tensors="pt", **options)  # what each kind of processor gives
        except Exception as error:
            reason = shorten(str(error), _REASON, placeholder="...") or type(error).__name__  # on one line
            raise ValueError(f"an image cannot be used: {reason}") from error
        positions = np.asarray(found["image_position_ids"][0])
        real = (positions >= 0).all(-1)
        values = np.asarray(found["pixel_values"][0], np.float32)[real]
        scaled = options.get("do_rescale", getattr(processor, "do_rescale", False))
        scale = float(options.get("rescale_factor", processor.rescale_factor)) if scaled else 0.0
        return Patches.of(values, positions[real].astype(np.int64), int(found["num_soft_tokens_per_image"][0]), scale)

    def encode(self, prompt: Any, tokenizer: Any, chat: bool) -> tuple[list[int], tuple[ImageSpan, ...]]:
        """Token ids, and the images among them. Raises ValueError for a prompt or an image that cannot be used."""
        prompt, sources, videos = split_images(prompt)
        if not videos:
            return self.placed(encode(prompt, tokenizer, chat), map(self.patches, sources))
        options = self._frames()
        videos = [video.sampled(options.frames) for video in videos]

        def expand(text: str) -> str:
            return with_times(text, videos, tokenizer.convert_ids_to_tokens(self.marks.video))

        frames = (self.patches(Source(f, v.tokens), **options.numbers) for v in videos for f in v.frames)
        return self.placed(encode(prompt, tokenizer, chat, expand), map(self.patches, sources), frames)

    def placed(
        self, ids: list[int], images: Iterable[Patches], frames: Iterable[Patches] = ()
    ) -> tuple[list[int], tuple[ImageSpan, ...]]:
        """Put the tokens of each image, and of each frame of a video, in the place of its one token, marked as transformers'
        processor does; ids that a processor has given have them all already."""
        marks = self.marks
        if marks.audio in ids:
            raise ValueError("audio is not supported, got a placeholder of it; leave it out")
        given = {marks.image: deque(images), marks.video: deque(frames)}
        there = {mark: 0 if mark is None else ids.count(mark) for mark in given}
        if not any(given.values()) and not any(there.values()):
            return ids, ()  # text, which nobody walks through
        if all(there[mark] == len(several) for mark, several in given.items()):
            return self._expanded(ids, given)
        if all(there[mark] == sum(image.tokens for image in several) for mark, several in given.items()):
            return ids, tuple(_spans(ids, given))
        wanted = [image.tokens for several in given.values() for image in several]
        raise ValueError(
            f"a prompt must have a placeholder for each image, got {sum(there.values())} tokens of images for {len(wanted)} "
            f"images of {sum(wanted)} tokens; add or leave out images"
        )

    def _expanded(self, ids: list[int], given: Mapping[int | None, deque[Patches]]) -> tuple[list[int], tuple[ImageSpan, ...]]:
        marks, found, spans = self.marks, list[int](), list[ImageSpan]()
        for place, token in enumerate(ids):
            if token not in given:
                found.append(token)
                continue
            image = given[token].popleft()
            bare = place == 0 or ids[place - 1] != marks.begin  # a tokenizer may have marked it itself
            found += [marks.begin] if bare else []
            spans.append(ImageSpan(len(found), image))
            found += [token] * image.tokens + ([marks.end] if bare else [])
        return found, tuple(spans)


def _spans(ids: list[int], given: Mapping[int | None, deque[Patches]]) -> Iterator[ImageSpan]:
    """Where images stand whose tokens are all there. Raises ValueError for one whose tokens do not stand together."""
    place = 0
    while place < len(ids):
        token = ids[place]
        if token not in given:
            place += 1
            continue
        image = given[token].popleft()
        if ids[place : place + image.tokens] != [token] * image.tokens:
            raise ValueError(f"an image's {image.tokens} tokens must stand together, got others among them; see that all fit")
        yield ImageSpan(place, image)
        place += image.tokens
