"""Reasoning, content and tool calls: of texts in pieces of any length, and over HTTP, where a grammar guides the demo."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma4_compile import SpeculativeConfig, demo_checkpoint
from gemma4_compile.serve.answers import Answer, Delta, response_template
from gemma4_compile.serve.schema import Tool
from tests.serve.running import Running, new_engine, running

CHAT = "/v1/chat/completions"
TEMPLATE = (Path(__file__).parent / "gemma.jinja").read_text()
PREFIX = "<bos><|turn>user\nHow warm?<turn|>\n<|turn>model\n"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get-weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Bern", "Oslo"]},
                "days": {"type": "integer"},
                "wind": {"type": "boolean"},
            },
            "required": ["city", "wind"],
        },
    },
}
TOOLS = [Tool.model_validate(WEATHER)]
CALL = '<|tool_call>call:get-weather{city:<|"|>Zürich, "old" {town}<|"|>,days:[1,2.5],deep:{a:null}}<tool_call|>'
TEXT = f"<|channel>thought\nHm: <b>1 < 2</b>\n<channel|>Let me see.\n{CALL}\n{CALL}<|tool_response>"
ARGUMENTS = {"city": 'Zürich, "old" {town}', "days": [1, 2.5], "deep": {"a": None}}


def answered(text: str, pieces: list[str], tools: list[Tool] | None = TOOLS, **given: Any) -> Delta:
    """All deltas of a text in these pieces as one."""
    assert "".join(pieces) == text
    answer, whole = Answer(response_template(None, TEMPLATE), PREFIX, tools, **given), Delta()
    for delta in (*(answer.feed(piece) for piece in pieces), answer.close()):
        whole.content += delta.content
        whole.reasoning += delta.reasoning
        whole.tool_calls += delta.tool_calls
    assert answer.calls == len(whole.tool_calls)
    return whole


def cut(text: str, length: int) -> list[str]:
    return [text[i : i + length] for i in range(0, len(text), length)]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 11, 50, 1000])
def test_pieces_of_any_length_join_to_the_same(length: int) -> None:
    found = answered(TEXT, cut(TEXT, length))
    assert (found.reasoning, found.content) == ("Hm: <b>1 < 2</b>\n", "Let me see.")
    assert [(name, json.loads(arguments)) for name, arguments in found.tool_calls] == [("get-weather", ARGUMENTS)] * 2


def test_random_pieces() -> None:
    chooser = random.Random(0)
    texts = [
        TEXT,
        "plain\n\n",
        f"a {CALL} b",
        "<|channel>thought\nnever ends",
        "<|tool_call>call:x{a:",
        " <",
        "<|tool_call>call:x{b c}<tool_call|>d",
    ]
    for text in texts:
        whole = answered(text, [text])
        for _ in range(20):
            places = sorted(chooser.sample(range(len(text) + 1), min(6, len(text))))
            assert answered(text, [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]) == whole


def test_what_is_no_call_stays_text() -> None:
    text = f"see <|tool_call>call:x{{b c}}<tool_call|>then {CALL}"
    found = answered(text, [text])
    assert found.content == "see call:x{b c}then" and len(found.tool_calls) == 1
    assert answered(CALL, [CALL], tools=None).content == CALL


def test_one_call_where_calls_may_not_be_parallel() -> None:
    assert len(answered(TEXT, cut(TEXT, 9), parallel=False).tool_calls) == 1


def test_a_template_without_marks_is_plain_text() -> None:
    assert response_template(None, "{{ messages }}") is None
    answer = Answer(None, PREFIX, TOOLS)
    assert answer.feed(f"{CALL} \n").content == f"{CALL} \n" and answer.close() == Delta()


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(chat_template=TEMPLATE) as found:
        yield found


def streamed(served: Running, asked: dict[str, Any]) -> dict[str, Any]:
    """A stream's message, as the whole answer has it; each call comes with all of it."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    calls: list[dict[str, Any]] = []
    for choice in (c for event in served.stream(CHAT, **asked) for c in event["choices"]):
        for name in ("content", "reasoning_content"):
            if name in choice["delta"]:
                message[name] = message.get(name, "") + choice["delta"][name]
        for call in choice["delta"].get("tool_calls", []):
            assert call.pop("index") == len(calls)
            calls.append(call)
    if calls:
        message |= {"tool_calls": calls, "content": message["content"] or None}
    return message


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Messages, but for the ids of calls."""
    return _without_ids(a) == _without_ids(b)


def _without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls", [])
    assert all(call["id"].startswith("call_") for call in calls)
    return message | {"tool_calls": [{name: value for name, value in call.items() if name != "id"} for call in calls]}


SAYS = "<[|]channel>thought\nIs it[?] <a> b\n<channel[|]>It is[.]  So"


@pytest.mark.parametrize("budget", [None, 9])
def test_reasoning_comes_apart(served: Running, budget: int | None) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": budget}
    asked["structured_outputs"] = {"grammar": f"start: /{SAYS}/"}
    (choice,) = served.post(CHAT, **asked).json()["choices"]
    message = choice["message"]
    assert same(streamed(served, asked), message)
    if budget is None:
        assert (message["reasoning_content"], message["content"]) == ("Is it? <a> b\n", "It is.  So")
        assert choice["finish_reason"] == "stop"


def test_tool_calls(served: Running) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER], "max_tokens": 200}
    for choice in ("required", {"type": "function", "function": {"name": "get-weather"}}):
        asked |= {"tool_choice": choice, "parallel_tool_calls": False}
        (found,) = served.post(CHAT, **asked).json()["choices"]
        (call,) = found["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert (
            arguments["city"] in ("Bern", "Oslo")
            and isinstance(arguments["wind"], bool)
            and found["finish_reason"] == "tool_calls"
        )
        assert same(streamed(served, asked), found["message"])
    result = {"role": "tool", "tool_call_id": "call_1", "content": "7"}
    said = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": call["function"]}],
    }
    turns = {"messages": [*asked["messages"], said, result], "tools": [WEATHER]}
    tokens = served.post("/tokenize", **turns).json()["tokens"]
    text = served.post("/detokenize", tokens=tokens).json()["prompt"]
    assert "<|tool>declaration:get-weather<tool|>" in text and "<|tool_response>response:get-weather{value:7}" in text
    assert "declaration" not in _prompt(served, turns | {"tools": []})


def _prompt(served: Running, asked: dict[str, Any]) -> str:
    tokens = served.post("/tokenize", **asked).json()["tokens"]
    return served.post("/detokenize", tokens=tokens).json()["prompt"]


def test_drafts_change_nothing(served: Running) -> None:
    """With an assistant as without: the same texts, reasoning and calls, greedily, streamed and whole."""
    engine = new_engine(SpeculativeConfig(demo_checkpoint("e") / "assistant", 3))
    asked = {"messages": [{"role": "user", "content": "def f"}], "tools": [WEATHER], "max_tokens": 80}
    with running(engine, chat_template=TEMPLATE) as drafting:
        for more in ({}, {"tool_choice": {"type": "function", "function": {"name": "get-weather"}}}):
            ours, theirs = (one.post(CHAT, **asked | more).json()["choices"][0]["message"] for one in (drafting, served))
            assert same(ours, theirs) and bool(ours.get("tool_calls")) == bool(more)
            assert same(streamed(drafting, asked | more), theirs)
        assert engine.metrics.accepted_draft_tokens


def test_thinking_is_asked_for(served: Running) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "return_token_ids": True}
    for more, thinks in (
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
    ):
        tokens = served.post(CHAT, **asked | more).json()["prompt_token_ids"]
        assert ("<|think|>" in served.post("/detokenize", tokens=tokens).json()["prompt"]) == thinks


def test_a_schema_holds_behind_the_thought(served: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "temperature": 1.0, "max_tokens": 60}
    asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    message = served.post(CHAT, **asked).json()["choices"][0]["message"]
    assert json.loads(message["content"]).keys() == {"a"} and "reasoning_content" not in message
    asked |= {"reasoning_effort": "high", "n": 8, "seed": 0}
    messages = [choice["message"] for choice in served.post(CHAT, **asked).json()["choices"]]
    assert any("reasoning_content" in message for message in messages)
    contents = [message["content"] for message in messages if message["content"] not in ("", "<")]
    assert all(json.loads(content).keys() == {"a"} for content in contents)
