"""A workload on an OpenAI-compatible server: ours, vLLM's or another that takes token ids."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from .timings import Timing
from .workloads import Arrivals

_SECONDS = 600  # that a request may take


def run(
    url: str, model: str, prompts: Sequence[list[int]], wanted: int, arrivals: Arrivals, seed: int = 0, key: str | None = None
) -> list[Timing]:
    """Each prompt to `wanted` new tokens, greedily, as streams of /v1/completions. A failed request is a Timing with its error.

    url  without /v1
    key  sent as a bearer token
    """
    return asyncio.run(_run(url.rstrip("/"), model, prompts, wanted, arrivals, seed, key))


def model_at(url: str, key: str | None = None) -> str:
    """The first model that a server has. Raises OSError for no server there, ValueError for one without models."""
    return asyncio.run(_model_at(url.rstrip("/"), key))


async def _model_at(url: str, key: str | None) -> str:
    async with _session(key) as session:
        try:
            async with session.get(f"{url}/v1/models") as response:
                found = await response.json()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise OSError(f"a server must answer at {url}/v1/models, got {type(error).__name__}: {error}; start it") from error
        if not found.get("data"):
            raise ValueError(f"the server at {url} must have a model, got {found!r:.200}; name it with MODEL")
        return str(found["data"][0]["id"])


def _session(key: str | None) -> aiohttp.ClientSession:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return aiohttp.ClientSession(
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=_SECONDS),
        connector=aiohttp.TCPConnector(limit=0),
        read_bufsize=2**20,
    )


async def _run(
    url: str, model: str, prompts: Sequence[list[int]], wanted: int, arrivals: Arrivals, seed: int, key: str | None
) -> list[Timing]:  # fmt: skip
    turn = asyncio.Semaphore(arrivals.concurrency or len(prompts))
    async with _session(key) as session:
        start = time.perf_counter()

        async def one(prompt: list[int], due: float) -> Timing:
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - start)))
            async with turn:
                timing = Timing(due if arrivals.concurrency is None else time.perf_counter() - start)
                body = {
                    "model": model, "prompt": prompt, "max_tokens": wanted, "temperature": 0, "ignore_eos": True,
                    "stream": True, "stream_options": {"include_usage": True},
                }  # fmt: skip
                try:
                    await _read(session, f"{url}/v1/completions", body, timing, start)
                except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
                    timing.error = f"{type(error).__name__}: {error}"
                return timing

        return list(await asyncio.gather(*map(one, prompts, arrivals.times(len(prompts), seed))))


async def _read(session: aiohttp.ClientSession, url: str, body: dict[str, Any], timing: Timing, start: float) -> None:
    """Raises ValueError for what is no stream of completions."""
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}: {(await response.text())[:300]}")
        tokens = 0
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"].get("message", "an error"))
            if event["choices"]:
                timing.chunks.append((time.perf_counter() - start, 1))
            elif event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    _count(timing, tokens)


def _count(timing: Timing, tokens: int) -> None:
    """Servers put several tokens into an event, or none where a character is not complete: the last event gets the difference,
    events behind it are none of the model's."""
    if not timing.chunks:
        raise ValueError("a stream must have an event, got none")
    del timing.chunks[tokens:]
    when, count = timing.chunks[-1]
    timing.chunks[-1] = when, count + max(0, tokens - len(timing.chunks))
