"""What a server owes to clients that are wrong, too many, gone, or there when it ends."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gemma4_compile.serve.config import ServeConfig
from tests.serve.running import PATIENCE, Running, demo_engine, judged, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG: dict[str, Any] = {"prompt": "x = 1\n", "max_tokens": 1500, "ignore_eos": True}
HELLO = [{"role": "user", "content": "x"}]
WEATHER = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(max_waiting=4, max_body_bytes=100_000, request_seconds=1) as found:
        yield found


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "message"),
    [
        (COMPLETIONS, {}, 400, "prompt", "Field required"),
        (COMPLETIONS, {"prompt": "x", "tempature": 1}, 400, "tempature", "unknown field tempature"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "9"}, 400, "max_tokens", "valid integer"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, None, "max_tokens must be 1 or more, got 0"),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, None, "temperature must be 0.0 to"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt", "must not be empty"),
        (COMPLETIONS, {"prompt": [[]]}, 400, None, "at least one token"),
        (COMPLETIONS, {"prompt": [99999]}, 400, None, "token ids must be 0 to 2047"),
        (COMPLETIONS, {"prompt": [5] * 5000}, 400, None, "max_model_len"),
        (COMPLETIONS, {"prompt": [[5], [99999]]}, 400, None, "token ids must be 0 to 2047"),
        (COMPLETIONS, {"prompt": ["x"] * 13}, 400, None, "at most 12 prompts times n, got 13"),
        (COMPLETIONS, {"prompt": "x", "n": 9}, 400, None, "n must be at most max_requests=8"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, 400, "best_of", "best_of must be n=1"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias", "by their ids, got 'a'"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"5000": 1}}, 400, None, "tokens in params must be 0 to 2047"),
        (COMPLETIONS, {"prompt": "x", "model": "other"}, 404, "model", "model must be 'e', got 'other'"),
        (COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 1, "stream": True}, 400, "stream", "comes whole"),
        (CHAT, {"messages": []}, 400, "messages", "at least 1 item"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "Input should be"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "image_url: Field required"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, None, "input_audio"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tools": 1}}, 400, "chat_template_kwargs", "must not set tools"),
        (CHAT, {"messages": HELLO, "tools": [WEATHER]}, 400, "tools", "chat template knows no tools"),
        (CHAT, {"messages": HELLO, "continue_final_message": True}, 400, "continue_final_message", "excludes"),
        ("/tokenize", {}, 400, "prompt", "either prompt or messages"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens", "tokens must be 0 to 2047, got -1"),
    ],
)  # fmt: skip
def test_wrong_requests(
    served: Running, path: str, fields: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    response = served.post(path, **fields)
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"], error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000])
def test_bodies_that_are_no_request(served: Running, body: bytes) -> None:
    response = served.client.post(COMPLETIONS, content=body)
    assert response.status_code in (400, 413) and response.json()["error"]["type"] == "invalid_request_error"


def test_paths_and_methods(served: Running) -> None:
    assert served.client.post("/v1/nothing").status_code == 404
    response = served.client.get(COMPLETIONS)
    assert response.status_code == 405 and "error" in response.json()


def test_a_body_that_is_too_large_is_not_read(served: Running) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    assert served.client.post(COMPLETIONS, content=b" " * 100_001).status_code == 413
    assert served.client.post(COMPLETIONS, content=parts()).status_code == 413


def test_a_body_that_does_not_come(served: Running) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
        assert b"408" in half.recv(1000)


def test_a_connection_on_which_nothing_comes(served: Running) -> None:
    for sent in (b"", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE) as half:
            half.sendall(sent)
            assert half.recv(1000) == b""


def test_a_client_that_goes_aborts_its_request(served: Running) -> None:
    engine = demo_engine()
    for path, more in ((COMPLETIONS, LONG), (CHAT, {"messages": HELLO, "max_tokens": 1500, "ignore_eos": True})):
        before = engine.metrics.output_tokens
        with served.client.stream("POST", path, json=more | {"stream": True}) as response:
            next(response.iter_lines())
        wait_for(lambda: not engine.has_work)
        assert engine.metrics.output_tokens - before < 1500
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(served.url + path, json=more, timeout=0.3)
        wait_for(lambda: not engine.has_work)
    assert served.gate.inside == 0


def test_a_full_queue_is_429(served: Running) -> None:
    with served.client.stream("POST", COMPLETIONS, json=LONG | {"stream": True, "n": 8, "temperature": 1.0}) as response:
        lines = response.iter_lines()  # which ends the request if it goes
        next(lines)
        waiting = threading.Thread(target=served.post, args=(COMPLETIONS,), kwargs={"prompt": [[5]] * 4, "max_tokens": 1})
        waiting.start()
        wait_for(lambda: served.gate.inside == 12)
        refused = served.post(COMPLETIONS, prompt="x")
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
    waiting.join()
    wait_for(lambda: served.gate.inside == 0)
    assert served.post(COMPLETIONS, prompt="x", max_tokens=1).status_code == 200


def test_a_slow_reader_holds_nobody_up(served: Running) -> None:
    body = json.dumps(LONG | {"stream": True, "logprobs": 20, "max_tokens": 200}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert slow.recv(20).startswith(b"HTTP/1.1 200")
        assert served.post(COMPLETIONS, prompt="x", max_tokens=5).status_code == 200
    wait_for(lambda: served.gate.inside == 0)


def test_a_key() -> None:
    with running(api_key="secret", cors_origins=("https://page.example",)) as served:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            response = served.client.post(COMPLETIONS, json={"prompt": "x"}, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        allowed = {"authorization": "Bearer secret", "origin": "https://page.example"}
        response = served.client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1}, headers=allowed)
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://page.example"
        assert served.client.get("/health").status_code == 200
        asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
        assert served.client.options(COMPLETIONS, headers=asked).status_code == 200
        other = asked | {"origin": "https://other.example"}
        assert "access-control-allow-origin" not in served.client.options(COMPLETIONS, headers=other).headers


def test_a_shutdown_lets_streams_end_and_refuses_others() -> None:
    with running() as served:
        texts: list[str] = []

        def read() -> None:
            events = served.stream(COMPLETIONS, **LONG | {"max_tokens": 100})
            texts.append("".join(choice["text"] for event in events for choice in event["choices"]))

        reading = threading.Thread(target=read)
        reading.start()
        wait_for(lambda: served.gate.inside)
        served.server.handle_exit(15, None)
        wait_for(lambda: served.gate.draining)
        with httpx.Client(base_url=served.url) as late:
            assert late.get("/health").status_code == 503
            refused = late.post(COMPLETIONS, json={"prompt": "x"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        reading.join()
        served.thread.join(PATIENCE)
        assert not served.thread.is_alive()
        assert texts == [judged("x = 1\n", max_tokens=100, ignore_eos=True).text]


def test_a_shutdown_ends_what_takes_too_long() -> None:
    with running(drain_seconds=0.2) as served:
        with served.client.stream("POST", COMPLETIONS, json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            served.server.handle_exit(15, None)
            served.thread.join(PATIENCE)
            assert not served.thread.is_alive()
        served.loop.run_until_complete(_cancel_all())


async def _cancel_all() -> None:
    """As asyncio.run does at its end."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_a_failed_engine_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise KeyError("a fault")

    with running() as served:
        with monkeypatch.context() as patch:
            patch.setattr(demo_engine(), "step", fail)
            error = served.post(COMPLETIONS, prompt="x").json()["error"]
        assert error["type"] == "server_error" and error["message"].startswith("KeyError in the server")
        wait_for(lambda: served.client.get("/health").status_code == 503)
        assert served.post(COMPLETIONS, prompt="x").json()["error"]["code"] == "engine_stopped"


def test_the_log_has_no_texts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gemma4_compile.serve"), running(access_log=True) as served:
        served.post(COMPLETIONS, prompt="a secret", max_tokens=1)
        served.client.get("/v1/a-secret")
    first, second = (record.fields for record in caplog.records)  # type: ignore[attr-defined]
    assert (first["path"], first["status"], second["path"], second["status"]) == (COMPLETIONS, 200, "other", 404)
    assert "secret" not in str(first) + str(second)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"port": -1}, "port must be"), ({"api_key": ""}, "api_key must be"), ({"max_waiting": -1}, "max_waiting")],
)
def test_wrong_configurations(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeConfig("e", **wrong)
