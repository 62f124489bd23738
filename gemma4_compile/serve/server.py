"""Run an application until a signal: uvicorn, and what a shutdown owes to requests that run."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gemma4_compile.runtime.async_engine import AsyncEngine

from .app import create_app
from .config import ServeConfig
from .gate import Gate
from .logs import event, to_stderr


def serve(engine: AsyncEngine, config: ServeConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then let what runs end, within `drain_seconds`. The engine stays open.

    on_ready  called with its URL once it listens

    Raises OSError for an address that cannot be had, ValueError as create_app."""
    app = create_app(engine, config)
    if config.access_log:
        to_stderr()
    with listening(config) as listener:
        host, port = listener.getsockname()[:2]
        on_ready(f"http://{host}:{port}")
        Server(app, app.state.context.gate, config).run([listener])


def listening(config: ServeConfig) -> socket.socket:
    """Raises OSError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    listener.set_inheritable(True)
    return listener


def _protocol(seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's, which alone would wait for ever for the first request of a connection."""

    class Protocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(seconds, self._close_if_nothing_came)

        def _close_if_nothing_came(self) -> None:
            if self.cycle is None:
                self.transport.close()

    return Protocol


class Server(uvicorn.Server):
    """uvicorn's, but the first signal only shuts the gate: while requests run it answers others with 503, so that a probe of
    /health sees it. A second signal ends at once."""

    def __init__(self, app: Any, gate: Gate, config: ServeConfig):
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                http=_protocol(config.request_seconds),
                server_header=False,
                timeout_keep_alive=65,
                timeout_graceful_shutdown=5,
            )
        )
        self._gate, self._drain_seconds = gate, config.drain_seconds
        self._draining: asyncio.Task[None] | None = None  # kept: a loop holds its tasks weakly
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining or self._loop is None:
            self.force_exit = sig == signal.SIGINT
            self.should_exit = True
        else:
            self._gate.draining = True
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        if not await self._gate.drain(self._drain_seconds):
            event("requests still run and are aborted", logging.WARNING, drain_seconds=self._drain_seconds)
            self.force_exit = True
        self.should_exit = True
