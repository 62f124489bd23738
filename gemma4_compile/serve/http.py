"""Between ASGI and endpoints: bodies within limits, responses that end when their client goes."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError

_Result = TypeVar("_Result")
DONE = b"data: [DONE]\n\n"


async def body_of(request: Request, most: int, seconds: float) -> bytes:
    """Raises ApiError: 413 for more bytes than that, 408 if they take longer. An announced length is believed."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > most:
        raise _too_large(most)
    try:
        return await asyncio.wait_for(_read(request, most), seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body must come within {seconds:g} s; send it again", headers={"connection": "close"}
        ) from None


async def _read(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
    return b"".join(parts)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"the body must have at most {most} bytes; ask in parts", code="body_too_large", headers={"connection": "close"}
    )


class Run(Protocol):
    """A request that can be answered whole, or as a stream."""

    async def whole(self) -> Response: ...

    def events(self) -> AsyncGenerator[Any, None]: ...


async def answered(request: Request, run: Run, stream: bool) -> Response:
    """Raises what the run raises before its first event, ClientDisconnect if the client goes."""
    if not stream:
        return await unless_gone(request, run.whole())
    events = run.events()
    return EventStream(await unless_gone(request, anext(events)), events)


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """What work returns; it is cancelled if the client goes meanwhile. Raises ClientDisconnect then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _cancelled(working, leaving)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):  # it was not awaited for its result
            await task


class EventStream(Response):
    """Server-sent events. The generator is closed at once when the client goes.

    first, events  of `events`; an error in them is the last event. Objects become JSON
    """

    media_type = "text/event-stream"

    def __init__(self, first: Any, events: AsyncGenerator[Any, None]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events = first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending, leaving = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _cancelled(sending, leaving)

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await _send_event(send, self._first)
            try:
                async for event in events:
                    await _send_event(send, event)
            except ApiError as error:
                await _send_event(send, error.body())
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def _send_event(send: Send, event: Any) -> None:
    await send({"type": "http.response.body", "body": b"data: " + to_json(event) + b"\n\n", "more_body": True})
