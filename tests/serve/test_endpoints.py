"""The server's endpoints over HTTP: whole and streamed answers agree, and agree with the engine's own."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.running import Running, demo_engine, judged, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as found:
        yield found


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def joined(events: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """A choice of a chat's stream as the whole answer has it, with roles and reasons counted."""
    found: dict[str, Any] = {"content": "", "roles": 0, "logprobs": [], "finish": []}
    for choice in (c for event in events for c in event["choices"] if c["index"] == index):
        found["roles"] += choice["delta"].get("role") == "assistant"
        found["content"] += choice["delta"].get("content", "")
        found["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
        if choice["finish_reason"]:
            found["finish"].append(choice["finish_reason"])
    return found


def test_a_completion_is_the_engines(served: Running) -> None:
    wanted = judged(PROMPT, max_tokens=12)
    found = served.post(COMPLETIONS, model="e", prompt=PROMPT, max_tokens=12, return_token_ids=True).json()
    (choice,) = found["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == (wanted.text, wanted.token_ids, "length")
    assert choice["prompt_token_ids"] == wanted.prompt_token_ids and found["object"] == "text_completion"
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 12, 22)
    again = served.post(COMPLETIONS, prompt=wanted.prompt_token_ids, max_tokens=12).json()
    assert again["choices"][0]["text"] == wanted.text


def test_a_completion_streams_what_it_is_whole(served: Running) -> None:
    asked: dict[str, Any] = {"prompt": [PROMPT, "import os\n"], "max_tokens": 10, "logprobs": 2, "n": 2, "temperature": 0.9}
    asked |= {"seed": 7, "stream_options": {"include_usage": True}}
    whole = served.post(COMPLETIONS, **asked).json()
    *events, last = served.stream(COMPLETIONS, **asked)
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] and last["choices"] == []
    for choice in whole["choices"]:
        parts = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert sum((part["logprobs"][name] for part in parts), []) == choice["logprobs"][name]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
    assert len({choice["text"] for choice in whole["choices"]}) > 2


def test_a_chat_streams_what_it_is_whole(served: Running) -> None:
    asked: dict[str, Any] = {"messages": user("def add(a, b):"), "max_tokens": 10, "logprobs": True, "top_logprobs": 3}
    asked |= {"n": 2, "temperature": 1.0, "seed": 3}
    whole = served.post(CHAT, **asked).json()
    events = served.stream(CHAT, **asked)
    assert {event["id"] for event in events} == {events[0]["id"]} and whole["id"].startswith("chatcmpl-")
    for choice in whole["choices"]:
        found = joined(events, choice["index"])
        assert found["roles"] == 1 and found["finish"] == [choice["finish_reason"]] == ["length"]
        assert found["content"] == choice["message"]["content"]
        assert found["logprobs"] == choice["logprobs"]["content"] and len(found["logprobs"]) == 10
        assert all(len(entry["top_logprobs"]) == 3 for entry in found["logprobs"])
        assert b"".join(bytes(entry["bytes"]) for entry in found["logprobs"]).decode() == found["content"]


def test_usage_as_far_as_it_has_come(served: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, given in ((COMPLETIONS, {"prompt": PROMPT}), (CHAT, {"messages": user(PROMPT)})):
        events = served.stream(path, **given, max_tokens=5, stream_options=options)
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert (
            counts == sorted(counts)
            and counts[0] == 1
            and counts[-1] == 5
            and {e["usage"]["prompt_tokens"] for e in events} == {10}
        )


def test_a_last_message_is_continued(served: Running) -> None:
    messages = [*user("def add(a, b):"), {"role": "assistant", "content": "    return"}]
    more: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    found = served.post(CHAT, messages=messages, max_tokens=12, return_token_ids=True, **more).json()
    tokens = found["prompt_token_ids"]
    assert demo_engine().tokenizer.decode(tokens).endswith("return")
    assert found["choices"][0]["message"]["content"] == judged(tokens, max_tokens=12).text


def test_greedy_samples_are_equal(served: Running) -> None:
    choices = served.post(CHAT, messages=user("def add(a, b):"), max_tokens=6, n=3).json()["choices"]
    assert len(choices) == 3 and len({choice["message"]["content"] for choice in choices}) == 1


def test_echo_with_log_probabilities_of_the_prompt(served: Running) -> None:
    wanted = judged(PROMPT, max_tokens=3, prompt_logprobs=1, logprobs=1)
    (choice,) = served.post(COMPLETIONS, prompt=PROMPT, max_tokens=3, echo=True, logprobs=1).json()["choices"]
    assert choice["text"] == PROMPT + wanted.text
    found = choice["logprobs"]
    assert found["token_logprobs"] == [
        None,
        *(one.logprob for one in (*(wanted.prompt_logprobs or ()), *(wanted.logprobs or ()))),
    ]
    assert found["tokens"][0] == "<bos>" and "".join(found["tokens"][1:]) == choice["text"]
    assert found["text_offset"] == [sum(map(len, found["tokens"][:i])) for i in range(len(found["tokens"]))]
    pairs = list(zip(found["top_logprobs"], found["token_logprobs"], strict=True))
    assert pairs[0] == (None, None) and all(max(top.values()) >= value for top, value in pairs[1:])
    (scored,) = served.post(COMPLETIONS, prompt=wanted.prompt_token_ids, max_tokens=0, echo=True, logprobs=1).json()["choices"]
    assert scored["logprobs"]["token_logprobs"] == found["token_logprobs"][:-3] and scored["text"] == PROMPT


def test_prompt_logprobs(served: Running) -> None:
    found = served.post(COMPLETIONS, prompt=PROMPT, max_tokens=1, prompt_logprobs=2).json()["choices"][0]["prompt_logprobs"]
    assert found[0] is None and len(found) == 10 and all(2 <= len(named) <= 3 for named in found[1:])
    assert found[1:] == served.post(CHAT, messages=user(PROMPT), max_tokens=1, prompt_logprobs=2).json()["prompt_logprobs"][1:]


def test_stops(served: Running) -> None:
    text = judged(PROMPT, max_tokens=12).text
    stop = text[4:7]
    for path, given in ((COMPLETIONS, {"prompt": PROMPT}), (CHAT, {"messages": user(PROMPT)})):
        (choice,) = served.post(path, **given, max_tokens=12, stop=["never", stop]).json()["choices"]
        said = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        assert (said, choice["finish_reason"], choice["stop_reason"]) == (text[: text.index(stop)], "stop", stop)


def test_sampling_fields_reach_the_sampler(served: Running) -> None:
    token = judged(PROMPT, max_tokens=1).token_ids[0]
    banned = served.post(COMPLETIONS, prompt=PROMPT, max_tokens=1, logit_bias={str(token): -100}, return_token_ids=True).json()
    assert banned["choices"][0]["token_ids"] != [token]
    hot = {"prompt": PROMPT, "max_tokens": 8, "temperature": 1.5}
    seeded = [served.post(COMPLETIONS, **hot, seed=seed).json()["choices"][0]["text"] for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    greedy = judged(PROMPT, max_tokens=8).text
    for field in ({"top_k": 1}, {"top_p": 1e-4}, {"min_p": 1.0}):
        assert served.post(COMPLETIONS, **hot, **field).json()["choices"][0]["text"] == greedy
    penalized = served.post(COMPLETIONS, prompt=PROMPT, max_tokens=8, frequency_penalty=2.0, presence_penalty=2.0).json()
    assert penalized["choices"][0]["text"] == judged(PROMPT, max_tokens=8, frequency_penalty=2.0, presence_penalty=2.0).text
    stopped = served.post(COMPLETIONS, prompt=PROMPT, max_tokens=8, stop_token_ids=[token]).json()["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", token)


def test_tokenize_and_detokenize(served: Running) -> None:
    found = served.post("/tokenize", prompt=PROMPT, return_token_strs=True).json()
    assert found["count"] == len(found["tokens"]) == 10 and found["max_model_len"] == demo_engine().max_model_len
    assert "".join(found["token_strs"]) == f"<bos>{PROMPT}"
    assert served.post("/detokenize", tokens=found["tokens"]).json()["prompt"] == f"<bos>{PROMPT}"
    assert served.post("/tokenize", messages=user(PROMPT)).json()["tokens"] == found["tokens"]
    assert served.post("/tokenize", prompt=PROMPT, add_special_tokens=False).json()["tokens"] == found["tokens"][1:]


def test_models_version_health_and_metrics(served: Running) -> None:
    (model,) = served.client.get("/v1/models").json()["data"]
    assert model["id"] == "e" and served.client.get("/v1/models/e").json() == model
    assert served.client.get("/v1/models/other").status_code == 404
    assert served.client.get("/version").json()["version"] and served.client.get("/health").json() == {"status": "ok"}
    text = served.client.get("/metrics").text
    assert "gemma4_compile_running 0.0" in text and 'gemma4_compile_http_requests_total{path="/health",status="200"}' in text


def test_each_response_has_an_id(served: Running) -> None:
    response = served.post(COMPLETIONS, prompt=PROMPT, max_tokens=1)
    assert response.json()["id"] == f"cmpl-{response.headers['x-request-id']}"
