"""Gate: how many sequences a server takes on, and none while it ends."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ApiError

_RETRY_SECONDS = 1


class Gate:
    """Lets sequences in up to what an engine runs at a time and `max_waiting` more. For one event loop.

    inside    sequences that are in
    draining  nobody is let in any more
    """

    def __init__(self, max_running: int, max_waiting: int):
        self.capacity = max_running + max_waiting
        self.inside, self.draining = 0, False
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def enter(self, sequences: int) -> Iterator[None]:
        """Raises ApiError: 400 for more than will ever fit, 429 for more than fit now, 503 while draining."""
        if sequences > self.capacity:
            raise ApiError(400, f"a request must have at most {self.capacity} prompts times n, got {sequences}; ask in parts")
        if self.draining:
            raise ApiError(503, "the server is shutting down; ask another", code="draining", headers={"connection": "close"})
        if self.inside + sequences > self.capacity:
            raise ApiError(
                429, f"{self.inside} of at most {self.capacity} sequences run or wait; try again later", code="queue_full",
                headers={"retry-after": str(_RETRY_SECONDS)},
            )  # fmt: skip
        self.inside += sequences
        self._empty.clear()
        try:
            yield
        finally:
            self.inside -= sequences
            if not self.inside:
                self._empty.set()

    async def drain(self, seconds: float) -> bool:
        """Let nobody in; True once all have left, False if that takes longer."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True
