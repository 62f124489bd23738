"""FULL graphs: a whole step whose rows are all wanted (decode, MTP verification), by token bucket, as one CUDA graph.

What such a step needs of the host lies in one buffer, which the graph unpacks (step_buffer.py). Where a state of the rows is
given, the graph ends with the greedy tokens, put where the next step finds them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.program import StepResult
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.step_inputs import StepInputs

from .recorder import Recorder
from .step_buffer import StepBuffer


class FullResult(NamedTuple):
    """logits [1, N, vocabulary], greedy tokens [N] (None without a state of the rows), final-normed states [N, H], and the
    step's inputs as the model saw them, without its sampling; valid until the next step."""

    logits: Tensor
    tokens: Tensor | None
    hidden: Tensor
    inputs: StepInputs[Tensor]


def greedy(logits: Tensor) -> Tensor:
    """The likeliest tokens, of logits that are all here."""
    return logits.argmax(-1)


@dataclass
class _Bucket:
    """A size of step, and its graph once it is captured."""

    buffer: StepBuffer
    replay: Callable[[], None] | None = None
    result: FullResult | None = None


class FullGraphs:
    """Graphs of one program's FULL steps.

    program   gives logits and final-normed states for a bucket's inputs
    memory    keys and values, by name
    sizes     buckets, in tokens; ascending
    width     pages that a request may have
    recorder  captures
    state     of the rows, which tokens come from and go to. None: no tokens are sampled
    argmax    of logits [N, vocabulary], or of the part of them that a rank has
    """

    def __init__(
        self, program: Callable[[dict[str, Tensor]], StepResult], memory: dict[str, Tensor], sizes: tuple[int, ...], width: int,
        recorder: Recorder, device: torch.device, state: RowState | None = None, argmax: Callable[[Tensor], Tensor] = greedy,
    ):  # fmt: skip
        self.program, self.memory, self.recorder, self.state, self.width = program, memory, recorder, state, width
        self.argmax = argmax
        self.last = None if state is None else state.last
        self._page_size = next(iter(memory.values())).shape[1]
        most = max(sizes, default=1)
        self._tables = {kind: torch.zeros((most, width), dtype=torch.int32, device=device) for kind in KINDS}
        self._before: Tensor | None = None
        self._buckets: dict[int, _Bucket] = {}

    def _bucket(self, tokens: int) -> _Bucket:
        if tokens not in self._buckets:
            self._buckets[tokens] = _Bucket(StepBuffer(tokens, self._tables, self.state, self._page_size))
        return self._buckets[tokens]

    def compare(self, tokens: int) -> tuple[StepResult, StepResult]:
        """What a replay gives, and the program on the same inputs, which are unpacked anew for it."""
        buffer = self._bucket(tokens).buffer
        self._before = None if self.last is None else self.last.clone()
        replayed = self.run(tokens)
        actual = StepResult(replayed.logits.clone(), replayed.hidden.clone())
        sampled = None if self.last is None else self.last.clone()
        self.restore()
        buffer.unpack()
        expected = self.program(buffer.views.model() | self.memory)
        if self.last is not None and sampled is not None:
            self.last.copy_(sampled)
        return actual, expected

    def restore(self) -> None:
        """Take back what the step that was compared has sampled."""
        if self.last is not None and self._before is not None:
            self.last.copy_(self._before)

    def send(self, tokens: int, step: StepInputs[np.ndarray] | None) -> None:
        """One copy of a step to the bucket of so many tokens, padded. None is padding alone."""
        self._bucket(tokens).buffer.send(step)

    def run(self, tokens: int) -> FullResult:
        """The bucket's step, captured if it is its first time."""
        bucket = self._bucket(tokens)
        if bucket.replay is None:
            self.recorder.warm_up(lambda: self._step(bucket))
            bucket.replay, results = self.recorder.record(lambda: self._step(bucket))
            logits, hidden, *sampled = map(self.recorder.borrow, results)
            bucket.result = FullResult(logits, sampled[0] if sampled else None, hidden, bucket.buffer.views)
        bucket.replay()
        return self.result(tokens)

    def result(self, tokens: int) -> FullResult:
        """Where the bucket's last step left its results."""
        result = self._bucket(tokens).result
        assert result is not None, "a bucket has run before its result is asked for"
        return result

    def seen(self, tokens: int, step: StepInputs[np.ndarray]) -> StepInputs[Tensor]:
        """The bucket's last step, as it was given and the model saw it."""
        return self._bucket(tokens).buffer.seen(step)

    def _step(self, bucket: _Bucket) -> list[Tensor]:
        bucket.buffer.unpack()
        logits, hidden = self.program(bucket.buffer.views.model() | self.memory)
        if self.last is None:
            return [logits, hidden]
        tokens = self.argmax(logits[0])
        self.last.index_copy_(0, bucket.buffer.views.targets, tokens)
        return [logits, hidden, tokens]
