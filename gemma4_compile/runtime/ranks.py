"""Ranks in step: rank 0 plans each step and tells the others, which run it too. And no rank waits for one that is gone.

Plans go over sockets of their own, not over the process group: a socket tells at once that the process at its other end has
ended, and may be idle for hours. A thread of each rank listens there. Where a rank is gone, the others cannot finish the step
that they are in, and on a GPU the host cannot even leave it: a kernel waits there for memory that nobody will write, and the
process for the kernel. So whoever is in a step, or has one on its GPU, then prints why and ends the process; whoever has none
gets a RuntimeError at its next call.

A step that takes longer than the time-out ends the run in the same way.
"""

import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import torch
import torch.distributed as dist

from gemma4_compile.parallel import Division

_TICK = 0.1  # seconds between two looks at the clock
_CLOSE = ("close", None)


class Ranks:
    """This process among those that run one model; alone, everything here is free of cost.

    division  of the model
    timeout   seconds that a step may take
    in_flight whether a step that was started has not run yet; to be set by who knows

    Made by all ranks together. Raises RuntimeError from any method once the run has ended.
    """

    def __init__(self, division: Division, timeout: float):
        self.division, self.timeout = division, timeout
        self.leads, self.several = division.rank == 0, division.ranks > 1
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._connections: list[Connection] = []
        self._sending = threading.Lock()
        self._state = _State(f"rank {division.rank} of {division.ranks}")
        self.in_flight: Callable[[], bool] = lambda: False
        if self.several:
            self._connect()
            threading.Thread(target=self._listen, name="gemma4_compile ranks", daemon=True).start()

    # Steps

    def tell(self, kind: str, content: Any = None) -> None:
        """Rank 0: a message to all others. `step` is one, a plan that they will run."""
        if not self.several:
            return
        self._state.check()
        if self._state.closed:
            raise RanksError("the engine must be open, got one that was closed, whose other ranks have gone; make a new one")
        with self.together("a message to the other ranks"), self._sending:
            for connection in self._connections:
                connection.send((kind, content))

    def messages(self) -> Iterator[tuple[str, Any]]:
        """Any other rank: what rank 0 tells, until it closes."""
        while not (self._state.closed and self._inbox.empty()):
            kind, content = self._inbox.get()
            self._state.check()
            if (kind, content) != _CLOSE:
                yield kind, content
        self._state.check()

    @contextmanager
    def together(self, what: str = "a step", limited: bool = True) -> Iterator[None]:
        """All ranks do something that none can finish alone. An error in it ends the run for all.

        limited  by the time-out"""
        if not self.several:
            yield
            return
        self._state.check()
        self._state.begin(what, time.monotonic() + self.timeout if limited else float("inf"))
        try:
            yield
        except Exception as error:
            reason = f"{what} failed: {type(error).__name__}: {error}"
            self._state.wait_for_reason(0.5)  # perhaps as another rank is gone, which the listener is about to learn
            self._state.end(reason)
            self._report(reason)
            raise RanksError(f"{self._state.name} ends: {reason}") from error
        except BaseException:  # of the user, who may go on
            self._state.end()
            raise
        self._state.end()

    def least(self, value: int) -> int:
        """The lowest of what the ranks give."""
        if not self.several:
            return value
        values: list[Any] = [None] * self.division.ranks
        dist.all_gather_object(values, value, group=self._group())
        return min(values)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so on any rank. Waits for the device."""
        if not self.several:
            return flag
        collectives = torch.ops._c10d_functional
        found = collectives.all_reduce(torch.tensor(float(flag), device=device), "max", self.division.group)
        return bool(collectives.wait_tensor(found).item())

    def close(self) -> None:
        """Rank 0: no more steps; the others may go on. Harmless twice, and on other ranks."""
        if self.leads and not self._state.closed:
            self._state.closed = True
            with self._sending:
                for connection in self._connections:
                    with suppress(OSError):
                        connection.send(_CLOSE)

    # Within

    def _group(self) -> Any:
        return dist.distributed_c10d._resolve_process_group(self.division.group)  # type: ignore[arg-type]

    def _connect(self) -> None:
        """A socket from rank 0 to each other rank; on one host a local one."""
        ranks, group = self.division.ranks, self._group()
        hosts: list[Any] = [None] * ranks
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        one_host = len(set(hosts)) == 1
        key = secrets.token_bytes(32) if self.leads else b""
        listener = None
        if self.leads:
            address = None if one_host else (socket.gethostname(), 0)
            listener = Listener(address, "AF_UNIX" if one_host else "AF_INET", backlog=ranks, authkey=key)
        told: list[Any] = [(listener.address, key) if listener is not None else None]
        dist.broadcast_object_list(told, src=dist.get_global_rank(group, 0), group=group)
        if listener is None:
            address, key = told[0]
            self._connections = [Client(address, authkey=key)]
            self._connections[0].send(self.division.rank)
            return
        accepted = [listener.accept() for _ in range(ranks - 1)]
        by_rank = {connection.recv(): connection for connection in accepted}
        self._connections = [by_rank[rank] for rank in range(1, ranks)]
        listener.close()

    def _report(self, text: str) -> None:
        if self._sending.acquire(timeout=1):  # a message may be on its way to a rank that reads none
            for connection in self._connections:
                with suppress(OSError):
                    connection.send(("failed", text))
            self._sending.release()

    def _listen(self) -> None:
        """Of its own thread: messages, ends of connections, and the clock."""
        state, ranks = self._state, range(1, self.division.ranks) if self.leads else (0,)
        names = dict(zip(self._connections, ranks, strict=True))
        while not state.closed:
            if (late := state.late()) is not None:
                reason = f"{late} took longer than step_timeout={self.timeout:g} s; raise it, or see what keeps a rank"
                self._report(reason)
                self._fail(reason)
                return
            for connection in wait(list(names), _TICK):
                assert isinstance(connection, Connection)
                rank = names[connection]
                try:
                    kind, content = connection.recv()
                except (EOFError, OSError):
                    if not state.closed:
                        how = "its process died, or left before rank 0 closed the engine" if rank else "its process died"
                        self._fail(f"rank {rank} is gone: {how}")
                    return
                if kind == "failed":
                    self._fail(f"rank {rank} ended the run: {content}")
                    return
                if (kind, content) == _CLOSE:
                    state.closed = True
                self._inbox.put((kind, content))

    def _fail(self, reason: str) -> None:
        self._state.fail(reason, self.in_flight)
        self._inbox.put(("failed", None))  # whoever waits for a message learns of it


class RanksError(RuntimeError):
    """The ranks are not in step any more: none of them can go on."""


class _State:
    """Whether this rank is in a step, and why the run has ended; between the caller's thread and the listening one."""

    def __init__(self, name: str):
        self.name, self.closed = name, False
        self._lock, self._failed = threading.Lock(), threading.Event()
        self._doing, self._deadline, self._reason = "", float("inf"), ""

    def begin(self, what: str, deadline: float) -> None:
        with self._lock:
            self._doing, self._deadline = what, deadline

    def end(self, reason: str = "") -> None:
        """reason: of an error that ends the run here."""
        with self._lock:
            self._doing, self._deadline = "", float("inf")
            if reason and not self._reason:
                self._reason, self.closed = reason, True
                self._failed.set()

    def late(self) -> str | None:
        """What has taken too long, if anything has."""
        with self._lock:
            return self._doing if self._doing and time.monotonic() > self._deadline else None

    def fail(self, reason: str, in_flight: Callable[[], bool]) -> None:
        """The run has ended. In a step so does this process: the step may never come back."""
        with self._lock:
            if self._reason:  # the first is the cause of all others
                return
            self._reason, self.closed = reason, True
            self._failed.set()
            if self._doing or in_flight():
                print(f"gemma4-compile: {self.name} ends: {reason}", file=sys.stderr, flush=True)
                os._exit(1)

    def check(self) -> None:
        if self._failed.is_set():
            raise RanksError(f"{self.name} cannot go on: {self._reason}; start all ranks anew")

    def wait_for_reason(self, within: float = 1.0) -> None:
        """An error may have a cause that the listening thread is about to learn; that ends this rank."""
        self._failed.wait(within)
        self.check()
