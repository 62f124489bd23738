"""Requests of an endpoint, run by the engine: one HTTP request may have several prompts."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from gemma4_compile.runtime.async_engine import AsyncEngine
from gemma4_compile.runtime.outputs import Chunk, RequestOutput
from gemma4_compile.runtime.sampling_params import SamplingParams
from gemma4_compile.runtime.text import Prompt
from gemma4_compile.runtime.vision.spans import PreparedPrompt

from .errors import ApiError, fault


async def prepared(engine: AsyncEngine, prompt: dict[str, Any]) -> PreparedPrompt:
    """A prompt with images, opened on another thread than the engine's. Raises ApiError."""
    try:
        return await asyncio.to_thread(engine.engine.prepare, prompt)
    except ValueError as error:
        raise ApiError(400, str(error), "messages", "invalid_value") from error


async def outputs_of(engine: AsyncEngine, prompts: Sequence[Prompt], params: SamplingParams) -> list[RequestOutput]:
    """All to their ends, in order. Raises ApiError; if one fails, or this is cancelled, the others are aborted."""
    tasks = [asyncio.ensure_future(engine.generate(prompt, params)) for prompt in prompts]
    try:
        outputs = await asyncio.gather(*tasks)
    except Exception as error:
        raise _translated(error) from error
    finally:
        for task in tasks:
            task.cancel()
    for output in outputs:
        _check(output)
    return list(outputs)


async def chunks_of(
    engine: AsyncEngine, prompts: Sequence[Prompt], params: SamplingParams
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Chunks of all of them as they come, each with the place of its prompt. Raises ApiError. What still runs when this is
    closed is aborted."""
    streams = [engine.stream(prompt, params) for prompt in prompts]
    try:
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for chunk in stream:
                    _check(chunk.output)
                    yield 0, chunk
            return
        async with aclosing(_merged(streams)) as merged:
            async for place, chunk in merged:
                _check(chunk.output)
                yield place, chunk
    except Exception as error:
        raise _translated(error) from error


async def _merged(streams: Sequence[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    chunks: asyncio.Queue[Any] = asyncio.Queue()

    async def pump(place: int, stream: AsyncGenerator[Chunk, None]) -> None:
        try:
            async with aclosing(stream):
                async for chunk in stream:
                    chunks.put_nowait((place, chunk))
        except Exception as error:
            chunks.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(place, stream)) for place, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            found = await chunks.get()
            if isinstance(found, Exception):
                raise found
            running -= found[1].output is not None
            yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check(output: RequestOutput | None) -> None:
    if output is not None and output.error:
        raise ApiError(500, output.error, code="engine_error")


def _translated(error: Exception) -> ApiError:
    """What an engine refuses is the client's fault; that it runs no more is not."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(400, str(error), code="context_length_exceeded" if "max_model_len" in str(error) else "invalid_value")
    if isinstance(error, RuntimeError):
        return ApiError(503, str(error), code="engine_stopped")
    return fault(error)
