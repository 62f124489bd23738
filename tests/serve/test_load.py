"""Many streams at a time, some of them left, and a process that is told to end: nothing leaks, nobody is lost. Slow."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from typing import Any

import aiohttp
import pytest

from gemma4_compile import Engine, EngineConfig
from tests.runtime.demo_models import demo
from tests.serve.running import PATIENCE, demo_engine, running

pytestmark = pytest.mark.load
COMPLETIONS = "/v1/completions"


async def stream(session: aiohttp.ClientSession, url: str, leave_after: int | None = None, **fields: Any) -> str:
    """The text of a stream, or of so many events of it."""
    said, events = "", 0
    async with session.post(url, json={"stream": True, "ignore_eos": True} | fields) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                said += "".join(choice["text"] for choice in event["choices"])
                events += 1
                if events == leave_after:
                    response.close()
                    return said
    return said


async def all_of(url: str, requests: list[dict[str, Any]]) -> list[Any]:
    connector, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=4 * PATIENCE)
    async with aiohttp.ClientSession(connector=connector, timeout=patience) as session:
        return await asyncio.gather(*(stream(session, url + COMPLETIONS, **request) for request in requests))


def test_a_hundred_streams_of_which_fifty_are_left() -> None:
    chooser, engine = random.Random(0), demo_engine()
    prompts = demo("e").prompts(10, 40)
    leaving = set(chooser.sample(range(100), 50))
    requests: list[dict[str, Any]] = [{"prompt": prompts[i % 10], "max_tokens": 30} for i in range(100)]
    for i in leaving:
        requests[i]["leave_after"] = chooser.randrange(1, 20)
    with running(engine) as served:  # which looks at the pages when it ends
        texts = asyncio.run(all_of(served.url, requests))
        end = time.monotonic() + PATIENCE
        while (engine.has_work or served.gate.inside) and time.monotonic() < end:
            time.sleep(0.01)
        assert not engine.has_work and served.gate.inside == 0
        for pool in engine.runner.pages.pools.values():
            assert pool.free + pool.in_use == pool.pages and pool.in_use == 0
        wanted = [
            served.post(COMPLETIONS, prompt=p, max_tokens=30, ignore_eos=True).json()["choices"][0]["text"] for p in prompts
        ]
    assert [texts[i] for i in range(100) if i not in leaving] == [wanted[i % 10] for i in range(100) if i not in leaving]
    assert all(wanted[i % 10].startswith(texts[i]) for i in leaving)


def test_five_hundred_streams_at_a_time() -> None:
    models = demo("e")
    engine = Engine(models.served, EngineConfig(max_requests=512, page_size=16), models.tokenizer)
    prompts = models.prompts(10, 40)
    with running(engine) as served:
        texts = asyncio.run(all_of(served.url, [{"prompt": prompts[i % 10], "max_tokens": 16} for i in range(500)]))
        assert served.gate.inside == 0
    assert len(texts) == 500 and all(texts)


def test_sigterm_loses_no_running_stream() -> None:
    """A process of its own, with the real signal."""
    arguments = [sys.executable, "-m", "gemma4_compile", "serve", "--demo", "--device", "cpu", "--port", "0", "--no-access-log"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(line.split()[-1] for line in process.stderr if " at http://" in line)

        async def end_amid() -> list[Any]:
            request = {"prompt": "def f", "max_tokens": 200}
            reading = asyncio.ensure_future(all_of(url, [request] * 8))
            async with aiohttp.ClientSession() as session:
                while "gemma4_compile_running 8.0" not in await (await session.get(f"{url}/metrics")).text():
                    await asyncio.sleep(0.02)
                process.send_signal(signal.SIGTERM)
                while (await session.get(f"{url}/health")).status != 503:
                    await asyncio.sleep(0.01)
                assert (await session.post(url + COMPLETIONS, json={"prompt": "x"})).status == 503
            return await reading

        texts = asyncio.run(end_amid())
        process.stderr.read()
        assert process.wait(PATIENCE) == 0
    assert len(texts) == 8 and len(set(texts)) == 1 and len(texts[0]) > 200
