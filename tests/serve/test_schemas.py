"""JSON schemas at random: whatever the demo would have said, its answer is JSON that the schema holds for."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from tests.serve.running import Running, running


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as found:
        yield found


def schema(chooser: random.Random, depth: int = 0) -> dict[str, Any]:
    """One whose values are short: the demo would write long ones up to the last token."""
    kinds = ["integer", "boolean", "null", "string", "enum", "number"] + ["object", "array", "anyOf"] * (depth < 2)
    kind = chooser.choice(kinds) if depth else "object"
    if kind == "integer":
        return {"type": kind, "minimum": chooser.randrange(-50, 0), "maximum": chooser.randrange(1, 500)}
    if kind == "number":
        return {"enum": [1.5, -2.25, chooser.randrange(100) / 4]}
    if kind == "string":
        return chooser.choice(
            [{"type": kind, "maxLength": 6}, {"type": kind, "pattern": "^[a-f]{2,4}$"}, {"const": 'a "quoted" ü'}]
        )
    if kind == "enum":
        return {"enum": chooser.sample(["a", "b", 1, 2, None, True], 3)}
    if kind == "array":
        low = chooser.randrange(2)
        return {"type": kind, "items": schema(chooser, depth + 1), "minItems": low, "maxItems": low + chooser.randrange(3)}
    if kind == "anyOf":
        return {"anyOf": [schema(chooser, depth + 1) for _ in range(2)]}
    if kind != "object":
        return {"type": kind}
    names = chooser.sample(["a", "b", "c_d", "key with blanks", "ß"], chooser.randrange(1, 4))
    needed = [name for name in names if chooser.random() < 0.7]
    properties = {name: schema(chooser, depth + 1) for name in names}
    return {"type": kind, "properties": properties, "required": needed, "additionalProperties": False}


@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.load)])
def test_answers_are_what_the_schema_says(served: Running, count: int) -> None:
    chooser = random.Random(count)
    asked = [schema(chooser) for _ in range(count)]

    def answer(number: int) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": asked[number]}}
        more = {"temperature": 1.0, "seed": number, "max_tokens": 600, "response_format": form}
        found = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], **more).json()
        (choice,) = found["choices"]
        assert choice["finish_reason"] == "stop", choice
        return choice["message"]["content"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, range(count)))
    for text, form in zip(answers, asked, strict=True):
        jsonschema.validate(json.loads(text), form)
    assert len(set(answers)) > count // 2
