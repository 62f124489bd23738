"""AsyncEngine: an Engine on a thread of its own, for servers on asyncio."""

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from gemma4_compile.config import EngineConfig

from .engine import Engine
from .metrics import EngineMetrics
from .outputs import Chunk, RequestOutput
from .sampling_params import SamplingParams
from .speculative.config import SpeculativeConfig
from .text import Prompt
from .vision.prompts import has_images

_Command = tuple[Any, ...]  # a function of the engine's thread and its arguments


class _Unread:
    """What came for a request and was not read yet; of one event loop. Chunks of a sample that wait are joined: a reader who
    falls behind gets fewer, and they take no more room than its tokens."""

    def __init__(self) -> None:
        self._parts: dict[int | None, Chunk | BaseException] = {}  # by sample, an error under None; the last put is the last
        self._came = asyncio.Event()

    def put(self, part: Chunk | BaseException) -> None:
        if isinstance(part, Chunk):
            waiting = self._parts.pop(part.index, None)
            self._parts[part.index] = waiting.joined(part) if isinstance(waiting, Chunk) else part
        else:
            self._parts[None] = part
        self._came.set()

    async def get(self) -> Chunk | BaseException:
        await self._came.wait()
        part = self._parts.pop(next(iter(self._parts)))
        if not self._parts:
            self._came.clear()
        return part


class AsyncEngine:
    """An Engine that many coroutines share; arguments as Engine's, or an Engine that nobody else drives.

        async with AsyncEngine(model) as engine:
            async for chunk in engine.stream("Why is the sky blue?"):
                print(chunk.text, end="")

    The engine's thread is its only caller. A coroutine that is cancelled aborts its request. Of several ranks rank 0 alone has
    one; the others make an Engine at the same time, and call its `run_worker`.
    """

    def __init__(
        self, model: nn.Module | str | Path | Engine, config: EngineConfig | None = None, tokenizer: Any = None,
        *, speculative: SpeculativeConfig | None = None,
    ):  # fmt: skip
        self._owns = not isinstance(model, Engine)
        self.engine = model if isinstance(model, Engine) else Engine(model, config, tokenizer, speculative=speculative)
        if not self.engine.is_driver:
            raise ValueError(
                "an AsyncEngine must be rank 0's, got another rank; make an Engine there and call its run_worker()"
            )
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._closed, self._lock = False, threading.Lock()
        self._waiting: dict[str, tuple[asyncio.AbstractEventLoop, _Unread]] = {}
        self._thread = threading.Thread(target=self._run, name="gemma4_compile engine", daemon=True)
        self._thread.start()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """A prompt's chunks as they come; the last has the output. Raises ValueError as Engine.add_request, RuntimeError once
        closed."""
        return self._chunks(prompt, params, request_id, stream=True)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """A prompt's whole output, whose text is made once, at the end. Raises as `stream`."""
        output = None
        async for chunk in self._chunks(prompt, params, None, stream=False):
            output = chunk.output
        assert output is not None, "chunks end with an output or an error"
        return output

    async def _chunks(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str | None, stream: bool
    ) -> AsyncGenerator[Chunk, None]:  # fmt: skip
        request_id = request_id or f"async-{next(self._numbers)}"
        if has_images(prompt):  # the engine's thread has steps to launch meanwhile
            prompt = await asyncio.to_thread(self.engine.prepare, prompt)
        chunks = _Unread()
        self._send(self._add, prompt, params, request_id, stream, asyncio.get_running_loop(), chunks)
        ended = False
        try:
            while not ended:
                chunk = await chunks.get()
                if isinstance(chunk, BaseException):
                    ended = True
                    raise chunk
                ended = chunk.output is not None
                yield chunk
        finally:
            if not ended:
                with suppress(RuntimeError):  # closed: nothing is left to abort
                    self._send(self._abort, request_id, chunks)

    @property
    def is_running(self) -> bool:
        """Whether it takes requests: it was not closed, and has not failed."""
        return not self._closed

    async def metrics(self) -> EngineMetrics:
        """The engine's metrics as of now."""
        return self.engine.metrics

    def close(self) -> None:
        """Abort what runs and end the thread; close the engine, unless it was given. Harmless twice."""
        self._commands.put(None)
        self._thread.join()
        if self._owns:
            self.engine.close()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await asyncio.to_thread(self.close)

    def _send(self, *command: Any) -> None:
        """For the engine's thread. Raises RuntimeError if it has ended."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine must run, got one that was closed or has failed; make another")
            self._commands.put(command)

    # On the engine's thread

    def _run(self) -> None:
        error: BaseException = RuntimeError("the engine was closed")
        try:
            while True:
                while not self._commands.empty() or not self.engine.has_work:
                    command = self._commands.get()
                    if command is None:
                        return
                    command[0](*command[1:])
                self._give([(chunk.request_id, chunk) for chunk in self.engine.step()])
        except BaseException as raised:  # a fault of the engine's own: whoever waits must learn of it
            error = raised
        finally:
            with self._lock:
                self._closed = True
            while not self._commands.empty():
                command = self._commands.get()
                if command is not None and command[0] == self._add:
                    command[0](*command[1:])
            waiting = list(self._waiting)
            self._give([(request_id, error) for request_id in waiting])
            for request_id in waiting:  # last: after a fault it may fail too
                self.engine.abort(request_id)

    def _add(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str, stream: bool,
        loop: asyncio.AbstractEventLoop, chunks: _Unread,
    ) -> None:  # fmt: skip
        try:
            self.engine.add_request(prompt, params, request_id, stream=stream)
        except Exception as error:  # goes to the one who asked
            _put(loop, [(chunks, error)])
        else:
            self._waiting[request_id] = loop, chunks

    def _abort(self, request_id: str, chunks: _Unread) -> None:
        if request_id in self._waiting and self._waiting[request_id][1] is chunks:  # not another's, who has this id now
            self.engine.abort(request_id)
            del self._waiting[request_id]

    def _give(self, parts: list[tuple[str, Any]]) -> None:
        """Chunks and errors to those who wait for them; one call for each event loop."""
        calls: dict[asyncio.AbstractEventLoop, list[tuple[_Unread, Any]]] = {}
        for request_id, part in parts:
            if request_id not in self._waiting:
                continue
            loop, chunks = self._waiting[request_id]
            calls.setdefault(loop, []).append((chunks, part))
            if isinstance(part, BaseException) or part.output is not None:
                del self._waiting[request_id]
        for loop, puts in calls.items():
            _put(loop, puts)


def _put(loop: asyncio.AbstractEventLoop, puts: list[tuple[_Unread, Any]]) -> None:
    def put_all() -> None:
        for chunks, part in puts:
            chunks.put(part)

    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(put_all)
