"""Ranks in step: rank 0 plans each step and tells the others, which run it too. And no rank waits for one that is gone.

Plans go over sockets of their own, not over the process group: a socket tells at once that the process at its other end has
ended, and may be idle for hours. A thread of each rank listens there. Where a rank is gone, the others cannot finish the step
that they are in, and on a GPU the host cannot even leave it: a kernel waits there for memory that nobody will write, and the
process for the kernel. So whoever is in a step, or has one on its GPU, then prints why and ends the process; whoever has none
gets a RuntimeError at its next call. A step that takes longer than the time-out ends the run in the same way.
"""

import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gemma4_compile.hf.parallel import Division
from gemma4_compile.torchrun import RanksError

_TICK = 0.1  # seconds between two looks at the clock
_CLOSE = ("close", None)
_FAILED = ("failed", None)


class Ranks:
    """This process among those that run one model; alone, nothing here costs time.

    division  of the model
    timeout   seconds that a step may take
    in_flight whether a step that was started has not run yet; to be set by who knows

    Made by all ranks together. Raises RanksError from any method once the run has ended.
    """

    def __init__(self, division: Division, timeout: float):
        self.division, self.timeout = division, timeout
        self.is_driver, self.several = division.rank == 0, division.ranks > 1
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._connections: list[Connection] = []
        self._sending = threading.Lock()
        self._state = _State(f"rank {division.rank} of {division.ranks}")
        self.in_flight: Callable[[], bool] = lambda: False
        if self.several:
            self._connect()
            threading.Thread(target=self._listen, name="gemma4_compile ranks", daemon=True).start()

    # Steps

    def broadcast(self, kind: str, content: Any = None) -> None:
        """Rank 0: a message to all others, within `collective`. `step` is one, a plan that they will run."""
        if not self.several:
            return
        message = ForkingPickler.dumps((kind, content))
        with self._sending:
            for connection in self._connections:
                connection.send_bytes(message)

    def messages(self) -> Iterator[tuple[str, Any]]:
        """Any other rank: what rank 0 tells, until it closes."""
        while not self._state.closed:
            kind, content = self._inbox.get()
            self._state.check()
            if (kind, content) == _CLOSE:
                self._state.closed = True
            else:
                yield kind, content
        self._state.check()

    @contextmanager
    def collective(self, what: str = "a step", limited: bool = True) -> Iterator[None]:
        """All ranks do something that none can finish alone. An error in it, or an interrupt, ends the run for all.

        limited  by the time-out"""
        if not self.several:
            yield
            return
        self._state.check()
        if self.is_driver and self._state.closed:  # before anything that the others would hear of
            raise RanksError("the engine must be open, got one that was closed, whose other ranks have gone; make a new one")
        self._state.begin(what, self.timeout if limited else float("inf"))
        try:
            yield
        except BaseException as error:
            reason = f"{what} failed: {type(error).__name__}: {error}"
            self._state.wait_for_reason(0.5)  # perhaps as another rank is gone, which the listener is about to learn
            self._state.end(reason)
            self._report(reason)
            if not isinstance(error, Exception):
                raise
            raise RanksError(f"{self._state.name} ends: {reason}") from error
        self._state.end()

    def least(self, value: int) -> int:
        """The lowest of what the ranks give."""
        return min(self._gathered(value)) if self.several else value

    def any_rank(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so on any rank. Waits for the device."""
        if not self.several:
            return flag
        collectives = torch.ops._c10d_functional
        found = collectives.all_reduce(torch.tensor(float(flag), device=device), "max", self.division.group)
        return bool(collectives.wait_tensor(found).item())

    def from_driver(self, x: Tensor) -> Tensor:
        """Rank 0's tensor on all ranks. Nothing waits for the device."""
        if not self.several:
            return x
        collectives = torch.ops._c10d_functional
        return collectives.wait_tensor(collectives.broadcast(x.contiguous(), 0, self.division.group))

    def check_equal(self, what: Mapping[str, Any]) -> None:
        """Raises ValueError where the ranks give other values by the same names."""
        if not self.several:
            return
        given = self._gathered({name: repr(value) for name, value in what.items()})
        for name in what:
            if len({one[name] for one in given}) > 1:
                values = ", ".join(one[name] for one in given)
                raise ValueError(f"all ranks must make their engine with the same {name}, got {values}; give all the same")

    def close(self) -> None:
        """Rank 0: no more steps; the others may go on. Harmless twice, and on other ranks."""
        if self.is_driver and not self._state.closed:
            self._state.closed = True
            self._send(_CLOSE)

    @property
    def open(self) -> bool:
        """Whether steps may come."""
        return not self._state.closed

    @property
    def failed(self) -> bool:
        """Whether the run has ended with an error."""
        return bool(self._state.reason)

    # Within

    def _group(self) -> Any:
        return dist.distributed_c10d._resolve_process_group(self.division.group)  # type: ignore[arg-type]

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.division.ranks
        dist.all_gather_object(values, value, group=self._group())
        return values

    def _connect(self) -> None:
        """A socket from rank 0 to each other rank; on one host a local one."""
        ranks, group = self.division.ranks, self._group()
        one_host = len(set(self._gathered(socket.gethostname()))) == 1
        key = secrets.token_bytes(32) if self.is_driver else b""
        listener = None
        if self.is_driver:
            # Where torchrun's other processes have found this host; its own name may mean itself alone.
            address = None if one_host else (os.environ.get("MASTER_ADDR", socket.gethostname()), 0)
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

    def _send(self, message: tuple[str, Any]) -> None:
        """To all, as far as they are there; not longer than a second, as a rank may read nothing."""

        def send() -> None:
            with self._sending:
                for connection in self._connections:
                    with suppress(OSError):
                        connection.send(message)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        sender.join(1)

    def _report(self, reason: str) -> None:
        self._send(("failed", reason))

    def _listen(self) -> None:
        """Of its own thread: messages, ends of connections, and the clock; until nothing is to come and nothing runs."""
        ranks = range(1, self.division.ranks) if self.is_driver else (0,)
        names = dict(zip(self._connections, ranks, strict=True))
        closing = False  # rank 0 has said so: its end is no failure then
        while (runs := self._runs()) is not None or not self._state.closed:
            if runs is not None and time.monotonic() > runs[1]:
                self._fail(f"{runs[0]} took longer than step_timeout={self.timeout:g} s; raise it, or see what keeps a rank")
                return
            if not names:
                time.sleep(_TICK)
            for connection in wait(list(names), _TICK) if names else ():
                assert isinstance(connection, Connection)
                rank = names[connection]
                try:
                    kind, content = connection.recv()
                except Exception:  # of the socket, or of half a message
                    if not (closing or self._state.closed):
                        how = "its process died, or left before rank 0 closed the engine" if rank else "its process died"
                        self._fail(f"rank {rank} is gone: {how}")
                        return
                    del names[connection]
                    continue
                if kind == "failed":
                    self._fail(content if rank else f"rank 0 ended the run: {content}")
                    return
                closing |= (kind, content) == _CLOSE
                self._inbox.put((kind, content))

    def _runs(self) -> tuple[str, float] | None:
        """What this rank, or its GPU, is about, and when it must be through."""
        found = self._state.doing
        if found is None and self._flies():  # not asked within a step, where a graph may be captured
            found = "a step", self._state.ended + self.timeout
        return found

    def _flies(self) -> bool:
        try:
            return self.in_flight()
        except Exception:  # CUDA has failed
            return True

    def _fail(self, reason: str) -> None:
        if self.is_driver or not reason.startswith("rank 0"):
            self._report(reason)
        self._state.fail(reason, self._flies)
        self._inbox.put(_FAILED)  # whoever waits for a message learns of it


class _State:
    """Whether this rank is in a step, and why the run has ended; between the caller's thread and the listening one."""

    def __init__(self, name: str):
        self.name, self.closed, self.reason = name, False, ""
        self.doing: tuple[str, float] | None = None  # what, and when it must be through
        self.ended = time.monotonic()
        self._lock, self._failed = threading.Lock(), threading.Event()

    def begin(self, what: str, seconds: float) -> None:
        with self._lock:
            self.doing = what, time.monotonic() + seconds

    def end(self, reason: str = "") -> None:
        """reason: of an error that ends the run here."""
        with self._lock:
            self.doing, self.ended = None, time.monotonic()
            if reason and not self.reason:
                self.reason, self.closed = reason, True
                self._failed.set()

    def fail(self, reason: str, flies: Callable[[], bool]) -> None:
        """The run has ended. In a step so does this process: the step may never come back."""
        with self._lock:
            if self.reason:  # the first is the cause of all others
                return
            self.reason, self.closed = reason, True
            self._failed.set()
            if self.doing or flies():
                with suppress(Exception):
                    sys.stdout.flush()
                print(f"gemma4-compile: {self.name} ends: {reason}", file=sys.stderr, flush=True)
                os._exit(1)

    def check(self) -> None:
        if self._failed.is_set():
            raise RanksError(f"{self.name} cannot go on: {self.reason}; start all ranks anew")

    def wait_for_reason(self, within: float) -> None:
        """An error may have a cause that the listening thread is about to learn; that ends this rank."""
        self._failed.wait(within)
