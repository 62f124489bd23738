"""Requests at random, right and wrong: each gets an answer that is no fault of the server, and nothing is left over."""

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gemma4_compile.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.serve.running import PATIENCE, Running, running
from tests.serve.test_answers import TEMPLATE, WEATHER

PATHS: dict[str, Any] = {
    "/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}  # fmt: skip
HELLO = [{"role": "user", "content": "x"}]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -3.5, 1e308, 2**63, -(2**63), "", "x", "auto", "required", "none", "\x00",
    "é\ud7ff", [], [1], [-1], ["x"], [[1], [2]], [["x"]], [None], {}, {"a": 1}, {"1": 2.0}, {"type": "json_object"},
    {"type": "text"}, HELLO, [HELLO], [{"role": "tool", "content": "x", "tool_call_id": "a"}],
    [{"role": "assistant", "tool_calls": []}], [WEATHER], [{"type": "function"}],
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "minItems": 1000000}}},
    {"regex": "(a|b)*c{1,3}"}, {"regex": "(?=x)"}, {"grammar": "start: start"}, {"choice": ["a"]}, {"json": {"enum": []}},
    {"type": "function", "function": {"name": "get-weather"}}, {"enable_thinking": "yes"}, {"include_usage": True},
)  # fmt: skip
TEXTS = (b"\x00", b"{", b"}", b"[", b'"', b"\\", b"\xff", b"1e999", b"NaN", b",,", b"[[[[")


def fields(chooser: random.Random, path: str) -> dict[str, Any]:
    """A request that is right but for some fields."""
    right: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2}, "/v1/completions": {"prompt": "x", "max_tokens": 2},
        "/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [5]},
    }  # fmt: skip
    found = right[path]
    names = [field.alias or name for name, field in PATHS[path].model_fields.items()]
    for _ in range(chooser.choice((1, 1, 1, 2, 3))):
        found[chooser.choice([*names, "nonsense"])] = chooser.choice(VALUES)
    if "max_tokens" in found and found["max_tokens"] not in (0, -1, "x"):
        found["max_tokens"] = 2
    return found


def body(chooser: random.Random, path: str) -> bytes:
    text = json.dumps(fields(chooser, path)).encode()
    for _ in range(chooser.choice((0, 0, 0, 1, 3))):
        at = chooser.randrange(len(text) + 1)
        text = text[:at] + chooser.choice(TEXTS) + text[at + chooser.choice((0, 1, 5)) :]
    return text


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(chat_template=TEMPLATE) as found:
        yield found


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.load)])
def test_no_request_is_a_fault(served: Running, count: int) -> None:
    chooser, statuses = random.Random(count), set()
    with httpx.Client(base_url=served.url, timeout=PATIENCE) as client:
        for number in range(count):
            path = chooser.choice(list(PATHS))
            sent = body(chooser, path)
            response = client.post(path, content=sent)
            statuses.add(response.status_code)
            assert response.status_code in (200, 400, 404), (number, path, sent, response.text)
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert statuses >= {200, 400}
    assert served.gate.inside == 0
