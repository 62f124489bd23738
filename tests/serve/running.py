"""A server on a demo engine, on a thread and a port of its own, for tests that talk HTTP to it."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import httpx

from gemma4_compile import AsyncEngine, Engine, EngineConfig, RequestOutput, SamplingParams, SpeculativeConfig
from gemma4_compile.serve.app import create_app
from gemma4_compile.serve.config import ServeConfig
from gemma4_compile.serve.server import Server, listening
from gemma4_compile.serve.templates import PLAIN
from tests.runtime.demo_models import demo

PATIENCE = 120  # seconds


def new_engine(speculative: SpeculativeConfig | None = None, max_requests: int = 8) -> Engine:
    """Of the demo in float32."""
    models, config = demo("e"), EngineConfig(max_requests=max_requests, max_batched_tokens=64, page_size=16)
    return Engine(models.served, config, models.tokenizer, speculative=speculative)


@cache
def demo_engine() -> Engine:
    """The one that is served unless another is given."""
    return new_engine()


@cache
def judge() -> Engine:
    """One that no server has: a served engine's thread is its only caller."""
    return new_engine()


def judged(prompt: Any, **params: Any) -> RequestOutput:
    """What an engine gives for a prompt."""
    (output,) = judge().generate(prompt, SamplingParams(**params))
    return output


class Running:
    """A server and a client of it.

    client  an httpx.Client
    server  it; `loop` is its event loop
    """

    def __init__(self, engine: AsyncEngine, config: ServeConfig):
        self._listener = listening(config)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app = create_app(engine, config)
        self.gate = self.app.state.context.gate
        self.server = Server(self.app, self.gate, config)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def _run(self) -> None:
        self.loop.run_until_complete(self.server.serve([self._listener]))

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.client.post(path, json=fields)

    def stream(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, up to [DONE]."""
        with self.client.stream("POST", path, json=fields | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self._listener.close()
        self.loop.close()


@contextmanager
def running(engine: Engine | None = None, **config: Any) -> Iterator[Running]:
    """Afterwards no page is in use."""
    engine = engine or demo_engine()
    served = AsyncEngine(engine)
    found = Running(served, replace(ServeConfig("e", port=0, chat_template=PLAIN, access_log=False), **config))
    try:
        yield found
    finally:
        found.close()
        served.close()
    for pool in engine.runner.pages.pools.values():
        assert pool.free == pool.pages, f"{pool.in_use} pages of {pool.kind} have leaked"
