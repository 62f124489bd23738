"""What a model writes, taken apart as it comes: reasoning, content and tool calls. The parser is transformers' own."""

import copy
import json
import uuid
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from transformers.cli.serving.utils import get_response_template
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.content_parsers import parse_content

from .schema import Tool

_MARKS = ("<|channel>", "<|tool_call>")
_ANY_NAME = r"<\|tool_call>call:(?P<name>[^\s{]+)"  # the template's own \w+ would cut names such as get-weather
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass
class Delta:
    """What a piece of text adds to an answer. tool_calls are whole, as (name, arguments in JSON)."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[tuple[str, str]] = field(default_factory=list)


def response_template(tokenizer: Any, chat_template: str | None) -> dict[str, Any] | None:
    """How answers are written, in transformers' form: as the tokenizer says, else as Gemma 4 does if the chat template speaks
    of its channels or tool calls. None: plain text."""
    own = getattr(tokenizer, "response_template", None)
    if own is not None or not chat_template or not any(mark in chat_template for mark in _MARKS):
        return own
    gemma: Any = SimpleNamespace(config=SimpleNamespace(model_type="gemma4"))
    found = copy.deepcopy(get_response_template(tokenizer, gemma))
    assert found is not None, "transformers knows how Gemma 4 answers"
    found["fields"]["tool_calls"]["open_pattern"] = _ANY_NAME
    return found


class Answer:
    """One sample's text in pieces of any length; the deltas join to the same whole. A tool call that cannot be read stays text.

    template  of `response_template`
    prefix    the prompt, which may have begun the answer
    tools     whose calls are looked for; without any they stay text
    parallel  False: calls behind the first are left out

    calls     tool calls so far
    """

    def __init__(self, template: dict[str, Any] | None, prefix: str, tools: list[Tool] | None, parallel: bool = True):
        self.calls, self._parallel, self._parser = 0, parallel, None
        self._blank = ""  # whitespace, which counts if text follows or no call was made
        if template is None:
            return
        fields = dict(template["fields"])
        called = fields.pop("tool_calls", None)
        self._dialect: tuple[str, dict[str, Any]] = "text", {}
        if tools and called is not None:
            # Read here, once it is whole: the parser would lose what it has found if it could not read one.
            self._dialect = called.get("content", "text"), called.get("content_args", {})
            fields = {"tool_calls": {**called, "content": "text", "content_args": {}}, **fields}
        self._parser = ResponseParser({**template, "fields": fields}, prefix)

    def feed(self, text: str) -> Delta:
        """What more text adds."""
        return Delta(text) if self._parser is None else self._delta(self._parser.feed(text))

    def close(self) -> Delta:
        """What is added once no more text comes."""
        delta = Delta() if self._parser is None else self._delta(self._parser.finalize()[1])
        if not self.calls:
            delta.content += self._blank
        return delta

    def _delta(self, events: list[dict[str, Any]]) -> Delta:
        delta = Delta()
        for event in events:
            name = event["field"]
            if name == "tool_calls":
                if event["type"] == "region_close":
                    self._add_call(delta, event["value"]["function"])
            elif event["type"] == "region_chunk":
                if name in _REASONING:
                    delta.reasoning += event["text"]
                else:
                    self._add_content(delta, event["text"])
        return delta

    def _add_content(self, delta: Delta, text: str) -> None:
        text = self._blank + text
        kept = text.rstrip()
        delta.content += kept
        self._blank = text[len(kept) :]

    def _add_call(self, delta: Delta, function: dict[str, str]) -> None:
        name, raw = function["name"], function["arguments"]
        try:
            arguments = parse_content(raw, *self._dialect)
            if not isinstance(arguments, dict):
                raise ValueError("arguments must be an object")
        except (ValueError, RecursionError):
            self._add_content(delta, f"call:{name}{raw}")
            return
        if self.calls and not self._parallel:
            return
        self.calls += 1
        delta.tool_calls.append((name, json.dumps(arguments, ensure_ascii=False)))


def tool_call(name: str, arguments: str) -> dict[str, Any]:
    """As OpenAI's clients take it, with an id of its own."""
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": {"name": name, "arguments": arguments}}
