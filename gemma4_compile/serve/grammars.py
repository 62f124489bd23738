"""Structured output: what a request asks for as a grammar in llguidance's Lark, and a grammar as a Constraint."""

import asyncio
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from gemma4_compile.runtime.constraint import MakeConstraint

from .errors import ApiError
from .schema import ChatRequest, CompletionRequest, StructuredOutputs, Tool

# One blank behind a comma and a colon, as Python and most models write JSON. Free whitespace some models would write for ever.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CACHED = 128  # grammars; most programs ask with few


class Grammars:
    """Makes constraints for one model.

    tokenizer  llguidance's, of the checkpoint's tokenizer
    tokens     names of tokens -> ids
    """

    def __init__(self, tokenizer: LLTokenizer, tokens: Mapping[str, int]):
        self._tokenizer, self._tokens = tokenizer, tokens
        self._matcher = lru_cache(_CACHED)(self._compiled)

    async def of(
        self,
        asked: ChatRequest | CompletionRequest,
        tools: list[Tool] | None = None,
        several: bool = False,
        thinks: bool = False,
    ) -> MakeConstraint | None:
        """What a request asks for, or None. Compiling takes up to seconds, on another thread.

        tools    of which one must be called; None: none need be
        several  more calls may follow
        thinks   the answer may begin with a channel of thought, which no grammar holds for

        Raises ApiError for a grammar that cannot be, or two of them."""
        if asked.response_format is None and asked.structured_outputs is None and not tools:
            return None  # most requests: none waits for a thread
        return await asyncio.to_thread(self._of, asked, tools, several, thinks)

    def _of(
        self, asked: ChatRequest | CompletionRequest, tools: list[Tool] | None, several: bool, thinks: bool
    ) -> MakeConstraint | None:  # fmt: skip
        found = [grammar for grammar in (_of_format(asked), _of_structured(asked.structured_outputs)) if grammar]
        if tools:
            found.append(self._of_calls(tools, several))
        if len(found) > 1:
            raise ApiError(400, "one of response_format, structured_outputs and tool_choice may bind an answer, got two")
        if not found:
            return None
        matcher = self._matcher(self._behind_thought(found[0]) if thinks else found[0])
        return lambda: _Matched(matcher.deep_copy())

    def _compiled(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ApiError(400, f"the schema or grammar cannot be used: {matcher.get_error():.500}", code="invalid_grammar")
        return matcher

    def _behind_thought(self, grammar: str) -> str:
        opening, closing = self._mark("<|channel>"), self._mark("<channel|>")
        return (
            re.sub(r"^start\s*:", "bound_answer:", grammar, count=1, flags=re.MULTILINE)
            + "\nstart: own_thought? bound_answer\n"
            + f'own_thought: {opening} "thought\\n" /(.|\\n)*/ {closing}\n'
        )

    def _of_calls(self, tools: list[Tool], several: bool) -> str:
        """Calls as Gemma 4 writes them, call:NAME{key:value,...}: strings between marks, keys bare. Properties come in their
        order, of their type; what they hold, if they are objects or arrays, is free."""
        quote = self._mark('<|"|>')
        letters = r"/[^\x01\x02]*/" if quote.startswith("<") else r"/[^<\x01\x02]*/"  # transformers' parser keeps those two
        calls = [f'call{i}: "call:{tool.function.name}{{" {_arguments(tool, quote)} "}}"' for i, tool in enumerate(tools)]
        names = " | ".join(f"call{i}" for i in range(len(tools)))
        rules = (
            f"start: ({self._mark('<|tool_call>')} ({names}) {self._mark('<tool_call|>')}){'+' if several else ''}",
            *calls,
            'value: text | number | boolean | "null" | object | array',
            f"text: {quote} {letters} {quote}",
            r"number: /-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][-+]?[0-9]{1,3})?/",
            "integer: /-?(0|[1-9][0-9]{0,30})/",
            'boolean: "true" | "false"',
            'object: "{" (pair ("," pair)*)? "}"',
            'pair: /[A-Za-z_][A-Za-z0-9_]*/ ":" value',
            'array: "[" (value ("," value)*)? "]"',
        )
        return "\n".join(rules)

    def _mark(self, name: str) -> str:
        """A token by its id, where the tokenizer has it; its letters elsewhere."""
        return f"<[{self._tokens[name]}]>" if name in self._tokens else json.dumps(name)


def _of_format(asked: ChatRequest | CompletionRequest) -> str:
    form = asked.response_format
    if form is None or form.type == "text":
        return ""
    if form.type == "json_object":
        return _json({"type": "object"})
    if form.json_schema is None:
        raise ApiError(400, "response_format json_schema needs json_schema; give it a name and a schema", "response_format")
    return _json(form.json_schema.schema_)


def _of_structured(asked: StructuredOutputs | None) -> str:
    if asked is None:
        return ""
    if len(asked.model_fields_set) != 1:
        raise ApiError(400, "structured_outputs must have one field; see docs/server.md", "structured_outputs")
    if asked.regex is not None:
        return f"start: /{asked.regex.replace('/', chr(92) + '/')}/"
    if asked.choice is not None:
        return "start: " + " | ".join(map(json.dumps, asked.choice))
    return asked.grammar or _json(asked.json_ or {})


def _json(schema: dict[str, Any]) -> str:
    return f"start: %json {json.dumps({**schema, 'x-guidance': _JSON})}"


def _arguments(tool: Tool, quote: str) -> str:
    """The rule for what stands between a call's braces: needed and optional pairs in order, with commas between them."""
    schema = tool.function.parameters or {}
    properties, needed = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, dict) or not isinstance(needed, list) or not all(re.fullmatch(r"\w+", n) for n in properties):
        raise ApiError(
            400, f"properties of {tool.function.name} must be an object with names of letters, digits and _", "tools"
        )
    pairs = [(f'"{name}:" {_value(found, quote)}', name in needed) for name, found in properties.items()]
    following = [f'"," {pair}' if must else f'("," {pair})?' for pair, must in pairs]
    beginnings = []
    for place, (pair, must) in enumerate(pairs):  # the first that is there has no comma before it
        beginnings.append(" ".join((pair, *following[place + 1 :])))
        if must:
            return f"({' | '.join(beginnings)})"
    return f"({' | '.join(beginnings)})?" if beginnings else '""'


def _value(schema: Any, quote: str) -> str:
    """The rule for a property: one of its choices, or of its type; any where it names none."""
    if not isinstance(schema, dict):
        return "value"
    choices = schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, (str, int)) for choice in choices):
        texts = [f"{quote} {json.dumps(c)} {quote}" if isinstance(c, str) else json.dumps(json.dumps(c)) for c in choices]
        return f"({' | '.join(texts)})"
    kind = schema.get("type")
    return {"string": "text", **{k: k for k in ("number", "integer", "boolean", "object", "array")}}.get(str(kind), "value")


class _Matched:
    """A Constraint: a matcher at its place in one sample."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def fill(self, words: np.ndarray) -> None:
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error())
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
