"""Engines that are given images: Hugging Face's logits and tokens, whatever is batched, cut, reused, preempted or drafted."""

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gemma4_compile import AsyncEngine, Engine, RequestOutput, SamplingParams, SpeculativeConfig
from gemma4_compile.demo.pictures import held_out_pictures, picture
from gemma4_compile.graphs.buckets import Buckets
from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.runtime.step import invariants
from gemma4_compile.runtime.vision.pictures import ImageLimits, open_picture
from gemma4_compile.runtime.vision.spans import ImageSpan, Patches, blocks_of, contents
from gemma4_compile.runtime.worker import encoder as encoders
from tests.models import BEGIN, END, IMAGE, VIDEO, image_processor, tiny
from tests.runtime import images_worker
from tests.runtime.host_recorder import HostRecorder
from tests.runtime.pictured import BANNED, CONFIG, assistant_for, params, pictured, prompt

DENSE = pytest.param("dense", marks=pytest.mark.slow)  # as 12B, with a tower
each_kind = pytest.mark.parametrize("kind", ("e", "moe", DENSE, "12B"))
MIXED = [
    prompt([5, 6, 7], 0, [8, 9]),
    prompt([11, 12, 13, 14]),
    prompt(1, [7], 2, [9, 10]),
    prompt([20], (3, 140), 4, [21, 22], 5, (6, 140), [23], 7, [24]),
    prompt([30] * 40),
]


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(invariants.VARIABLE, "1")


@each_kind
@pytest.mark.parametrize("tokens", (160, 1024))
def test_logits_and_tokens_are_hugging_faces(kind: str, tokens: int) -> None:
    """0, 1, 2 and 5 images of mixed budgets and texts in one batch; in chunks and whole. Windows of 8 end within images."""
    models = pictured(kind)
    engine = models.engine(replace(CONFIG, max_batched_tokens=tokens))
    outputs = engine.generate([given for given, _ in MIXED], params(prompt_logprobs=0))
    for output, (_, images) in zip(outputs, MIXED, strict=True):
        models.check(output, images)


@each_kind
def test_a_prefix_with_the_same_image_is_reused_and_one_with_another_is_not(kind: str) -> None:
    models = pictured(kind)
    engine = models.engine()
    (first, images), (other, others) = prompt([5] * 20, 0, [8] * 20), prompt([5] * 20, 1, [8] * 20)
    for given, shown, cached in ((first, images, 0), (first, images, 96), (other, others, 16), (other, others, 96)):
        (output,) = engine.generate(given, params())
        models.check(output, shown)
        assert output.metrics.cached_tokens == cached
    assert engine.runner.images is not None
    encoder = engine.runner.images.encoder
    assert encoder.encoded == 2


def test_a_prefix_may_end_within_an_image() -> None:
    """Its keys were computed with the whole image in sight: what follows takes them as they are."""
    models = pictured("moe")
    engine = models.engine()
    (long, images), (short, _) = prompt([5] * 20, 0, [8] * 9), prompt([5] * 20, 0)
    for given in (short, long):
        (output,) = engine.generate(given, params(2))
        models.check(output, images)
    assert 21 < output.metrics.cached_tokens < 82


@each_kind
def test_preempted_requests_see_their_images_again(kind: str) -> None:
    models = pictured(kind)
    memory = {"e": 130_000, "moe": 190_000, "dense": 190_000, "12B": 380_000}[kind]
    engine = models.engine(replace(CONFIG, kv_bytes=memory, max_model_len=256, max_batched_tokens=128))
    given = [prompt([5, n], n, [8]) for n in range(6)]
    outputs = engine.generate([each for each, _ in given], params(40))
    assert engine.metrics.preemptions, "pages must run out, else this tests nothing"
    for output, (_, images) in zip(outputs, given, strict=True):
        models.check(output, images)


@pytest.mark.parametrize("kind", ("e", pytest.param("moe", marks=pytest.mark.slow)))
def test_prompt_steps_with_images_from_graphs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piecewise, by buckets; decode steps are those of text."""
    monkeypatch.setattr(encoders, "BUCKETS", (70, 140))
    models, recorder = pictured(kind), HostRecorder()
    engine = models.engine()
    runner = engine.runner
    inputs = runner._padding_step(1, 1, runner._width) | runner.kv
    buckets = Buckets(decode=(1, 2, 8), tokens=(64, 256, 512), rows=(8,))
    runner.graphs = GraphRunner(runner.packed.program, inputs, 8, buckets, recorder, runner.state)
    for _ in range(2):
        for output, (_, images) in zip(engine.generate([given for given, _ in MIXED], params()), MIXED, strict=True):
            models.check(output, images)
        runner.pages.reset()
    steps = runner.images
    assert steps is not None and steps.graphs is not None and steps.graphs.replays >= 2 and not steps.graphs.refused
    assert steps.encoder._recorder is recorder
    names = list(runner.capture())
    assert "512 tokens, 8 rows" in names and "70 tokens of images" in names


def test_a_model_changes_between_requests() -> None:
    models = pictured("e")
    engine = models.engine()
    (given, images) = prompt([5], 0, [8])
    table = models.served.model.embed_vision.embedding_projection.weight
    (before,) = engine.generate(given, params())
    kept = table.clone()
    with torch.no_grad():
        try:
            table.mul_(-3)
            (changed,) = engine.generate(given, params())
        finally:
            table.copy_(kept)
    (after,) = engine.generate(given, params())
    assert before.token_ids == after.token_ids != changed.token_ids


def test_images_are_read_however_they_are_given(tmp_path: Path) -> None:
    drawn = picture(0).image
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    whole = buffer.getvalue()
    (tmp_path / "picture.png").write_bytes(whole)
    encoded = base64.b64encode(whole).decode()
    ways: list[Any] = [
        drawn, whole, tmp_path / "picture.png", str(tmp_path / "picture.png"), f"data:image/png;base64,{encoded}",
        np.asarray(drawn), drawn.convert("RGBA"),
    ]  # fmt: skip
    for way in ways:
        assert open_picture(way, ImageLimits()).tobytes() == drawn.tobytes()
    turned = drawn.copy()
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert open_picture(buffer.getvalue(), ImageLimits()).size == (drawn.height, drawn.width)


WRONG: dict[str, tuple[Any, str]] = {
    "broken": (b"no image at all", "an image must be readable, got bytes of no known format"),
    "cut off": (None, "an image must be readable, got"),
    "missing": ("/nowhere.png", "an image must be readable, got .Errno 2"),
    "huge": (Image.new("RGB", (300, 300)), "it must have at most 40000 pixels, got 300 x 300"),
    "long": (b"x" * 100_001, "its file must have at most 100000 bytes, got 100001"),
    "an address": ("https://example.com/picture.png", "addresses are not fetched, got one"),
    "base64": ("data:image/png;base64,!!!", "a data URL's base64 must be whole"),
    "no comma": ("data:image/png", "got one without a comma"),
    "a device": ("/dev/zero", "a path must be a file's, got another's"),
    "an empty array": (np.zeros((0, 5, 3), np.uint8), "an array must be .height, width, 3. uint8, got .0, 5, 3. uint8"),
    "a number": (7, "it must be a PIL image, bytes, a path or a data URL, got int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_image_ends_its_request_alone(name: str) -> None:
    models = pictured("e")
    image, message = WRONG[name]
    if name == "cut off":
        buffer = io.BytesIO()
        picture(0).image.save(buffer, "PNG")
        image = buffer.getvalue()[:-200]
    engine = models.engine(replace(CONFIG, image_pixels=40_000, image_bytes=100_000))
    (good, images) = prompt([5], 0, [8])
    with pytest.warns(UserWarning, match="prompt 0 is not served"):
        wrong, right = engine.generate([{"prompt_token_ids": [2, IMAGE], "images": [image]}, good], params(3))
    assert wrong.finish_reason == "error" and "\n" not in wrong.error
    with pytest.raises(ValueError, match=message):
        raise ValueError(wrong.error)
    models.check(right, images)


def test_a_bomb_is_not_unpacked() -> None:
    """A file of few bytes says that it holds very many pixels: its header is read, no more."""
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 200_000
    with pytest.raises(ValueError, match="it must have at most 64000000 pixels, got Image size .900000000 pixels. exceeds"):
        open_picture(buffer.getvalue(), ImageLimits())


PLACES = {
    "a placeholder too few": ([2, 5], [0], "got 0 tokens of images for 1 images"),
    "a placeholder too many": ([2, IMAGE, IMAGE], [0], "got 2 tokens of images for 1 images"),
    "no image": ([2, IMAGE], [], "got 1 tokens of images for 0 images"),
}


@pytest.mark.parametrize("name", PLACES)
def test_placeholders_and_images_must_agree(name: str) -> None:
    ids, numbers, message = PLACES[name]
    engine = pictured("e").engine()
    with pytest.raises(ValueError, match=f"a prompt must have a placeholder for each image, {message}"):
        engine.add_request({"prompt_token_ids": ids, "images": [picture(n).image for n in numbers]}, params())
    assert not engine.has_work


def test_ids_of_a_processor_have_all_tokens_already() -> None:
    models = pictured("e")
    engine = models.engine()
    short, images = prompt([5], 0, [8])
    (first,) = engine.generate(short, params())
    assert first.prompt_token_ids[2] == BEGIN and first.prompt_token_ids.count(IMAGE) > 1 and END in first.prompt_token_ids
    (second,) = engine.generate({"prompt_token_ids": first.prompt_token_ids, "images": [images[0][0]]}, params())
    assert (second.prompt_token_ids, second.token_ids) == (first.prompt_token_ids, first.token_ids)
    marked = {"prompt_token_ids": [2, 5, BEGIN, IMAGE, END, 8], "images": [images[0][0]]}
    (third,) = engine.generate(marked, params())
    assert third.prompt_token_ids == first.prompt_token_ids


def test_who_takes_no_images() -> None:
    (given, _) = prompt([5], 0)
    for engine, what in (
        (Engine(tiny("dense"), CONFIG), "a model of text alone"),
        (pictured("e").engine(replace(CONFIG, text_only=True)), "text_only=True"),
    ):
        with pytest.raises(ValueError, match=f"an image needs a model with its vision part, got {what}"):
            engine.add_request(given, params())
    with pytest.raises(ValueError, match="text_only=False needs a model with a vision part"):
        Engine(tiny("dense"), replace(CONFIG, text_only=False))
    bare = Engine(pictured("e").served, CONFIG)
    with pytest.raises(ValueError, match="an image needs an image processor"):
        bare.add_request(given, params())
    for sound in ({"prompt_token_ids": [2], "audio": [0.0]}, [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]):
        with pytest.raises(ValueError, match="audio is not supported"):
            pictured("e").engine().add_request(sound, params())


def test_an_async_engine_opens_images_beside_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, (given, images) = pictured("e").engine(), prompt([5, 6], 1, [7])
    threads, opened = list[str](), engine.prepare

    def noting(given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return opened(given)

    monkeypatch.setattr(engine, "prepare", noting)

    async def answered() -> RequestOutput:
        async with AsyncEngine(engine) as served:
            with pytest.raises(ValueError, match="an image cannot be used|must be readable"):
                await served.generate(given | {"images": [b"no picture"]}, params())
            return await served.generate(given, params())

    pictured("e").check(asyncio.run(answered()), images)
    assert not threads[0].startswith("gemma4_compile") and len(threads) == 3  # the engine's is given what is prepared


def test_an_image_longer_than_a_step() -> None:
    """Where image tokens see each other no step may cut one; elsewhere steps may."""
    small = replace(CONFIG, max_batched_tokens=40)
    (given, images) = prompt([5], 0, [8])
    with pytest.raises(ValueError, match="an image's tokens must fit into a step of max_batched_tokens=40, got "):
        pictured("dense").engine(small).add_request(given, params())
    models = pictured("e")
    (output,) = models.engine(small).generate(given, params())
    models.check(output, images)


@pytest.mark.parametrize("kind", ("e", "moe", "12B"))
def test_frames_of_a_video(kind: str) -> None:
    """As Hugging Face takes pixel_values_videos; ids have a placeholder for each frame, or all tokens of all."""
    models = pictured(kind)
    frames = [picture(n).image for n in range(3)]
    given: dict[str, Any] = {"prompt_token_ids": [2, 5, VIDEO, 9, VIDEO, 9, VIDEO, 8], "videos": [frames]}
    engine = models.engine()
    (output,) = engine.generate([given], params(prompt_logprobs=0))
    models.check(output, [(frame, 70) for frame in frames])
    (again,) = engine.generate([given | {"prompt_token_ids": output.prompt_token_ids}], params())
    assert (again.prompt_token_ids, again.token_ids) == (output.prompt_token_ids, output.token_ids)


def test_what_prefixes_are_compared_by() -> None:
    def patches(number: int) -> Patches:
        found = image_processor()([picture(number).image], return_tensors="np")
        return Patches.of(found["pixel_values"][0][:27], found["image_position_ids"][0][:27], 3, 1 / 255)

    a, b = patches(0), patches(1)
    assert a.values.dtype == "uint8" and a.values.shape == (3, 9, 48) and a.key == patches(0).key != b.key
    assert (a.numbers() * 255).round().astype("uint8").tolist() == a.values.tolist()
    tokens = [2, 7, 7, 7, 9]
    first, again, other = (contents(tokens, [ImageSpan(1, image)]) for image in (a, patches(0), b))
    assert first == again and first[0] == 2 and first[4] == 9
    assert all(x != y and x < 0 and y < 0 for x, y in zip(first[1:4], other[1:4], strict=True))
    # In one block all keys depend on all images of it.
    both = [ImageSpan(0, a), ImageSpan(3, a)], [ImageSpan(0, a), ImageSpan(3, b)]
    assert blocks_of(both[0]) == [(0, 6)]
    assert contents([7] * 6, both[0])[0] != contents([7] * 6, both[1])[0]


def test_values_that_are_no_bytes_travel_as_they_are() -> None:
    values = torch.rand(9, 48).numpy()
    kept = Patches.of(values, torch.zeros(9, 2).long().numpy(), 1, 1 / 255)
    assert (kept.values == values).all() and kept.numbers() is kept.values


@pytest.mark.parametrize("kind", ("e", DENSE, "12B"))
def test_with_drafts(kind: str) -> None:
    """A random assistant drafts what is hardly ever accepted; the tokens are the same."""

    models = pictured(kind)
    engine = models.engine(speculative=SpeculativeConfig(assistant_for(kind), 2))
    free = SamplingParams(max_tokens=10, ignore_eos=True, logit_bias=BANNED)
    outputs = engine.generate([given for given, _ in MIXED], free)
    for output, (_, images) in zip(outputs, MIXED, strict=True):
        models.check(output, images)
    assert any(output.metrics.draft_tokens for output in outputs)


@pytest.mark.slow
def test_on_two_ranks() -> None:
    """The text model divided, the tower whole on each: the pictures' names."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", images_worker.__name__],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("["))
    assert json.loads(line) == [drawn.name for drawn in held_out_pictures()[: images_worker.PICTURES]]
