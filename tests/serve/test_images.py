"""Images in messages over HTTP: the engine's answers, whole and streamed; what is refused."""

import base64
import io
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from gemma4_compile import Engine, EngineConfig, demo_checkpoint
from gemma4_compile.demo import VISION_DEMO
from gemma4_compile.demo.pictures import QUESTION, picture
from tests.serve.running import Running, demo_engine, running

CHAT = "/v1/chat/completions"


@cache
def engine() -> Engine:
    config = EngineConfig(
        kv_bytes=1 << 24, max_requests=8, max_batched_tokens=256, text_only=False, dtype=torch.float32, chat=False
    )
    return Engine(demo_checkpoint(VISION_DEMO) / "target", config)


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(engine(), chat_template=None) as found:
        yield found


def url_of(number: int) -> str:
    buffer = io.BytesIO()
    picture(number).image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def asked(*urls: str, question: str = QUESTION) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def test_a_picture_is_named_whole_and_as_a_stream(served: Running) -> None:
    for number in (0, 1):
        found = served.post(CHAT, messages=asked(url_of(number)), max_tokens=12).json()
        (choice,) = found["choices"]
        assert choice["message"]["content"] == picture(number).name and choice["finish_reason"] == "stop"
        assert found["usage"]["prompt_tokens"] > 60, "an image's tokens count"
        events = served.stream(CHAT, messages=asked(url_of(number)), max_tokens=12)
        said = "".join(c["delta"].get("content", "") for event in events for c in event["choices"])
        assert said == picture(number).name


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/etc/hostname", "an image must be a data URL"),
        ("file:///etc/hostname", "an image must be a data URL"),
        ("https://example.com/a.png", "addresses are not fetched"),
        ("data:image/png;base64,AAAA", "an image must be readable"),
    ],
)
def test_what_is_refused(served: Running, url: str, message: str) -> None:
    """Names of the server's files above all. Others are served on."""
    answer = served.post(CHAT, messages=asked(url), max_tokens=4)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert served.post(CHAT, messages=asked(url_of(2)), max_tokens=12).status_code == 200


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video_url", "video_url": {"url": "data:,"}}, "Input tag 'video_url' found using 'type' does not match"),
        (
            {"type": "text", "text": "<|image|>"},
            "a placeholder for each image, got 1 tokens of images for 0",
        ),
    ],
)
def test_parts_that_are_no_images(served: Running, part: dict[str, Any], message: str) -> None:
    answer = served.post(CHAT, messages=[{"role": "user", "content": [part]}], max_tokens=4)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_model_of_text_alone() -> None:
    with running(demo_engine()) as text:
        answer = text.post(CHAT, messages=asked(url_of(0)), max_tokens=4)
    assert answer.status_code == 400 and "an image needs a model with its vision part" in answer.json()["error"]["message"]
