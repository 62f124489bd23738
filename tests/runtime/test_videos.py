"""Videos: the very ids and numbers of transformers' processor, and bad ones."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoTokenizer
from transformers.video_utils import VideoMetadata

from gemma4_compile import demo_checkpoint
from gemma4_compile.demo import VISION_DEMO
from gemma4_compile.demo.pictures import picture
from gemma4_compile.hf.vision import FrameOptions, frame_options_of, image_processor_of
from gemma4_compile.runtime.vision.pictures import ImageLimits
from gemma4_compile.runtime.vision.prompts import ImagePrompts, MarkTokens
from gemma4_compile.runtime.vision.spans import ImageSpan

try:
    from transformers import Gemma4Processor
except ImportError:  # up to transformers 5.23 it takes torchvision
    Gemma4Processor: Any = None  # type: ignore[no-redef]

FOLDER = demo_checkpoint(VISION_DEMO) / "target"
TOKENIZER: Any = AutoTokenizer.from_pretrained(FOLDER)
processor = pytest.mark.skipif(Gemma4Processor is None, reason="this transformers' processor takes torchvision")
TEXT = {"type": "text", "text": "Which shape is it?"}


def frames(count: int) -> list[Image.Image]:
    """Of one size, as those of a video are."""
    return [picture(n).image.resize((150, 100)) for n in range(count)]


def read(content: list[Any], options: FrameOptions | None = None) -> tuple[list[int], tuple[ImageSpan, ...]]:
    marks = MarkTokens.of(AutoConfig.from_pretrained(FOLDER))
    prompts = ImagePrompts(lambda: image_processor_of(FOLDER), marks, ImageLimits(), lambda: options or FrameOptions())
    return prompts.encode([{"role": "user", "content": content}], TOKENIZER, True)


def by_the_processor(content: list[Any], metadata: list[VideoMetadata], tokens: list[int]) -> list[int]:
    """Ids with the text that Gemma4Processor writes for each video.

    tokens   of a frame of each"""
    marks: Any = SimpleNamespace(boi_token="<|image>", eoi_token="<image|>", video_token="<|video|>")
    inputs = {"num_soft_tokens_per_video": tokens, "video_metadata": metadata}
    text = TOKENIZER.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    first, *rest = text.split("<|video|>")
    written = [Gemma4Processor.replace_video_token(marks, inputs, n) for n in range(len(rest))]
    text = first + "".join(video + part for video, part in zip(written, rest, strict=True))
    return TOKENIZER(text, add_special_tokens=False).input_ids


def metadata(indices: list[int], fps: float | None) -> VideoMetadata:
    return VideoMetadata(len(indices), fps=fps, frames_indices=indices)


@processor
def test_times_are_those_of_the_processor() -> None:
    content = [{"type": "video", "video": frames(3), "fps": 0.04}, TEXT, {"type": "video", "video": frames(2)}]
    ids, spans = read(content)
    tokens = [spans[0].image.tokens, spans[-1].image.tokens]
    assert ids == by_the_processor(content, [metadata([0, 1, 2], 0.04), metadata([0, 1], None)], tokens)
    assert len(spans) == 5 and all(set(ids[span.start : span.end]) == {360} for span in spans)
    assert "00:25 <|image>" in TOKENIZER.decode(ids) and "00:50 <|image>" in TOKENIZER.decode(ids)


def test_times_of_ones_own_and_images_between() -> None:
    video = {"type": "video", "video": np.stack([np.asarray(frame) for frame in frames(2)]), "timestamps": [1.9, 6000]}
    ids, spans = read([{"type": "image", "image": picture(5).image}, video, TEXT, {"type": "image", "image": picture(6).image}])
    shown = TOKENIZER.decode(ids)
    assert "<image|>00:01 <|image><|video|>" in shown and "<image|> 100:00 <|image><|video|>" in shown
    assert [ids[span.start] for span in spans] == [357, 360, 360, 357]
    assert spans[0].image.key == read([{"type": "image", "image": picture(5).image}])[1][0].image.key


@processor
def test_as_many_frames_as_the_processor_takes() -> None:
    content = [{"type": "video", "video": frames(7), "fps": 1}]
    ids, spans = read(content, FrameOptions(frames=3))
    assert ids == by_the_processor(content, [metadata([0, 2, 4], 1.0)], [spans[0].image.tokens])
    few = [{"type": "video", "video": frames(7), "fps": 1, "num_frames": 2, "max_soft_tokens": 140}]
    more, wide = read(few)
    assert len(wide) == 2 and wide[0].image.tokens > spans[0].image.tokens
    assert more == by_the_processor(few, [metadata([0, 3], 1.0)], [wide[0].image.tokens])
    assert len(read(content, FrameOptions(frames=None))[1]) == 7


def test_options_of_a_checkpoint(tmp_path: Path) -> None:
    """From the file that transformers reads: the first of three that there is."""
    assert frame_options_of(FOLDER).numbers["do_normalize"] is False
    for name, content, expected in (
        ("preprocessor_config.json", {"max_soft_tokens": 280}, (32, 280)),
        ("video_preprocessor_config.json", {"max_soft_tokens": 140, "do_sample_frames": False}, (None, 140)),
        ("processor_config.json", {"video_processor": {"num_frames": 8}}, (8, 70)),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        found = frame_options_of(tmp_path)
        assert (found.frames, found.numbers["max_soft_tokens"]) == expected


def by_place(places: Any, values: Any) -> dict[tuple[int, int], list[float]]:
    """Numbers of each patch: in whatever order patches stand."""
    rows = zip(np.asarray(places).reshape(-1, 2).tolist(), np.asarray(values).reshape(-1, 3 * 12 * 12).tolist(), strict=True)
    return {(x, y): row for (x, y), row in rows if x >= 0}


def test_a_whole_processors_ids_and_numbers() -> None:
    """Its own call. It takes torchvision, as transformers' video processor does."""
    pytest.importorskip("torchvision")
    from transformers import AutoImageProcessor, Gemma4AudioFeatureExtractor, Gemma4VideoProcessor

    images, tokenizer = AutoImageProcessor.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.audio_token = tokenizer.boa_token = tokenizer.eoa_token = "<|audio|>"  # it asks for them
    videos = Gemma4VideoProcessor(patch_size=12, pooling_kernel_size=2, num_frames=3)
    whole = Gemma4Processor(Gemma4AudioFeatureExtractor(), images, tokenizer, videos)
    video = {"type": "video", "video": frames(7), "fps": 2.0}
    content = [TEXT, video, {"type": "image", "image": picture(5).image}, TEXT]
    text = TOKENIZER.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    wanted = whole(
        text=text, images=[picture(5).image], videos=[frames(7)], add_special_tokens=False, return_tensors="pt",
        video_metadata=[VideoMetadata(7, fps=2.0)],
    )  # fmt: skip
    ids, spans = read(content, FrameOptions.of(vars(videos)))
    assert ids == wanted["input_ids"][0].tolist()
    values = wanted["pixel_values_videos"].flatten(0, -3)
    for span, value, places in zip(spans[:3], values, wanted["video_position_ids"].flatten(0, -3), strict=True):
        mine, theirs = (by_place(*each) for each in ((span.image.positions, span.image.numbers()), (places, value)))
        assert mine == theirs


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a path": ({"video": "film.mp4"}, "a video must be a list of its frames, got str; read them from the file first"),
    "none": ({"video": []}, "a video must be a list of its frames, got list"),
    "nothing": ({}, "a part of type video must hold its video, got 'type'"),
    "fps": ({"fps": 0}, "fps must be more than 0, got 0"),
    "timestamps": ({"timestamps": [0, float("nan")]}, "timestamps must be a list of seconds"),
    "too few": ({"timestamps": [0]}, "each frame needs its timestamp, got 1 for 2 frames"),
    "num_frames": ({"num_frames": 0}, "num_frames must be 1 or more, got 0"),
    "max_soft_tokens": ({"max_soft_tokens": 71}, "an image cannot be used: "),
    "a broken frame": ({"video": [b"no image"]}, "an image must be readable"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_videos(name: str) -> None:
    part, message = WRONG[name]
    part = {"type": "video"} | ({"video": frames(2)} if part and "video" not in part else {}) | part
    with pytest.raises(ValueError, match=message) as caught:
        read([part])
    assert "\n" not in str(caught.value)


def test_placeholders_and_videos_must_agree() -> None:
    with pytest.raises(ValueError, match="a prompt must have a placeholder for each video, got 2 for 1 videos"):
        read([{"type": "video", "video": frames(1)}, {"type": "text", "text": "<|video|>"}])
    with pytest.raises(
        ValueError, match="a prompt must have a placeholder for each image, got 1 tokens of images for 0 images"
    ):
        read([{"type": "text", "text": "<|video|>"}])
