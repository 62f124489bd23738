"""Structured output over HTTP: what a schema, a regex, a grammar or a tool binds, whatever the model would have said."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.running import Running, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "def add(a, b):"}]
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "maximum": 99}, "kind": {"enum": ["a", "b"]}},
    "required": ["count", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as found:
        yield found


def schema_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def said(served: Running, **fields: Any) -> str:
    (choice,) = served.post(CHAT, **{"messages": HELLO, "max_tokens": 100} | fields).json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]


def test_a_schema(served: Running) -> None:
    text = said(served, response_format=schema_of(SCHEMA))
    found = json.loads(text)
    assert found["count"] <= 99 and found["kind"] in ("a", "b") and text == json.dumps(found)
    streamed = served.stream(CHAT, messages=HELLO, max_tokens=100, response_format=schema_of(SCHEMA))
    assert "".join(c["delta"].get("content", "") for event in streamed for c in event["choices"]) == text
    (choice,) = served.post(COMPLETIONS, prompt="x", max_tokens=99, structured_outputs={"json": SCHEMA}).json()["choices"]
    assert set(json.loads(choice["text"])) == {"count", "kind"}


def test_samples_are_bound_each_by_itself(served: Running) -> None:
    asked = {"messages": HELLO, "n": 4, "temperature": 1.5, "seed": 1, "response_format": schema_of(SCHEMA)}
    texts = [choice["message"]["content"] for choice in served.post(CHAT, **asked).json()["choices"]]
    assert len(set(texts)) > 1 and all(set(json.loads(text)) == {"count", "kind"} for text in texts)


def test_other_bonds(served: Running) -> None:
    assert said(served, structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert re.fullmatch("[a-c]{3}/[0-9]{2}", said(served, structured_outputs={"regex": "[a-c]{3}/[0-9]{2}"}))
    assert said(served, structured_outputs={"grammar": 'start: "x" rest\nrest: "y" | "z"'}) in ("xy", "xz")


def test_unbound_requests_beside_bound_ones(served: Running) -> None:
    """In one step: a mask is of its own row alone."""
    free = served.post(COMPLETIONS, prompt="x", max_tokens=20).json()["choices"][0]["text"]
    with served.client.stream(
        "POST", COMPLETIONS, json={"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    ) as other:
        lines = other.iter_lines()
        next(lines)
        assert json.loads(said(served, response_format=schema_of(SCHEMA)))["kind"] in ("a", "b")
        assert served.post(COMPLETIONS, prompt="x", max_tokens=20).json()["choices"][0]["text"] == free


def test_log_probabilities_are_the_models_own(served: Running) -> None:
    asked = {"messages": HELLO, "logprobs": True, "top_logprobs": 1, "structured_outputs": {"choice": ["zzz"]}}
    (choice,) = served.post(CHAT, **asked).json()["choices"]
    first = choice["logprobs"]["content"][0]
    assert first["token"].startswith("z") and first["top_logprobs"][0]["logprob"] > first["logprob"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": schema_of({"type": "nothing"})}, "cannot be used"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema"),
        ({"structured_outputs": {}}, "must have one field"),
        ({"structured_outputs": {"regex": "("}}, "cannot be used"),
        ({"structured_outputs": {"grammar": "start: other"}}, "cannot be used"),
        ({"structured_outputs": {"json": {}, "regex": "x"}}, "must have one field"),
        ({"structured_outputs": {"regex": "x"}, "response_format": {"type": "json_object"}}, "got two"),
        ({"structured_outputs": {"regex": "x"}, "min_tokens": 2}, "min_tokens and a constraint"),
        ({"tool_choice": "required"}, "must name one of tools"),
    ],
)
def test_what_cannot_be_bound(served: Running, fields: dict[str, Any], message: str) -> None:
    response = served.post(CHAT, messages=HELLO, **fields)
    assert response.status_code == 400 and message in response.json()["error"]["message"], response.text
