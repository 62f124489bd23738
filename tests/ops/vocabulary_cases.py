"""Ranks that divide a vocabulary, as threads of one process: what test_vocabulary.py and interpret_vocabulary.py share."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemma4_compile.ops.sampling import vocabulary
from gemma4_compile.ops.sampling.vocabulary import Vocabulary

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"max": partial(torch.amax, dim=0), "sum": partial(torch.sum, dim=0)}


class Ranks:
    """Threads in place of processes; `counts` is how often they meet, by what for. `replace` sets attributes of modules."""

    def __init__(self, ranks: int, replace: Callable[[Any, str, Any], None]):
        self.ranks, self.counts = ranks, Counter[str]()
        self._barrier, self._rank = threading.Barrier(ranks, timeout=60), threading.local()
        self._given: list[Any] = [None] * ranks
        replace(vocabulary, "_all_reduce", lambda x, kind, group: REDUCTIONS[kind](self._all(x, kind)))
        replace(vocabulary, "_all_gather", lambda x, ranks, group: self._all(x, "gather"))

    def _all(self, x: Tensor, kind: str) -> Tensor:
        self._given[self._rank.value] = x
        self._barrier.wait()
        parts = torch.stack(self._given)
        if self._barrier.wait() == 0:
            self.counts[kind] += 1
        return parts

    def call(self, method: str, logits: Tensor, *args: Any) -> Any:
        """What the method gives all ranks, each with its own part of the logits. It must be the same for all."""
        size = logits.shape[1]
        here = size // self.ranks

        def run(rank: int) -> Any:
            self._rank.value = rank
            try:
                divided = Vocabulary(size, rank * here, here, "threads" if self.ranks > 1 else "")
                return getattr(divided, method)(logits[:, rank * here :][:, :here], *args)
            except Exception as error:
                errors.append(error)  # the first; the others' are of the barrier
                self._barrier.abort()  # or they would wait

        errors: list[Exception] = []
        with ThreadPoolExecutor(self.ranks) as threads:
            found = list(threads.map(run, range(self.ranks)))
        if errors:
            raise errors[0]
        for other in found:
            torch.testing.assert_close(other, found[0], rtol=0, atol=0, equal_nan=True)
        return found[0]
