"""PIECEWISE graphs: each piece of a program is a graph, attention runs between them with the sizes of the batch at hand.

Behind the YOCO boundary a prefill has a few wanted rows, in buckets of their own: the pieces there are captured once for each
row bucket and serve every token bucket. Only the boundary's piece is captured for pairs of both.

All graphs share one memory pool. What one graph leaves for the next is kept alive while the next is captured, so that none is
placed on it; afterwards the pool may reuse it, as each graph is replayed behind the one that writes its inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemma4_compile.packed.inputs import IMAGE_INPUTS, KINDS, step_input, varying_dim
from gemma4_compile.packed.program import BoundCall, Program, StepResult
from gemma4_compile.packed.split import SPLIT_POINTS

from .buckets import Bucket, Buckets
from .recorder import Recorder

# What attention reads of each request: as long as there are requests in a step.
_BY_REQUEST = ("visible", *(f"table.{kind}" for kind in KINDS))
_Call = Callable[[int], None]  # one captured step, given the number of requests at hand


def _replay(replay: Callable[[], None]) -> _Call:
    return lambda requests: replay()


class PiecewiseGraphs:
    """Graphs of a program's pieces, by bucket of tokens and of wanted rows.

    memory     keys and values, by name, which all steps use; None: each step brings its own. Pieces never see them: attention,
               which runs between graphs, is given those of the step at hand
    inputs     of any step: dtypes, and as many columns of tables as a request may have
    requests   the most requests of a step
    """

    def __init__(
        self, program: Program, memory: dict[str, Tensor] | None, inputs: dict[str, Tensor], requests: int, buckets: Buckets,
        recorder: Recorder,
    ):  # fmt: skip
        self.program, self.memory, self.recorder = program, memory, recorder
        device = inputs["input_ids"].device
        tokens, rows = max(buckets.tokens, default=1), max(buckets.rows, default=1)
        sizes = {"input_ids": (1, tokens), "positions": (tokens,), "rows": (rows,), "starts": (requests + 1,)}
        if memory is None:
            sizes["position_ids"] = (tokens,)
        sizes |= {name: (tokens, *inputs[name].shape[1:]) for name in (*IMAGE_INPUTS, "until") if name in inputs}
        width = max(inputs[f"table.{kind}"].shape[1] for kind in KINDS)
        for kind in KINDS:
            sizes |= {f"slots.{kind}": (tokens,), f"table.{kind}": (requests, width)}
        self._static = {
            name: torch.zeros(size, dtype=step_input(inputs, name).dtype, device=device) for name, size in sizes.items()
        }
        self._given: dict[str, Tensor] = {}  # of a step that brings its own memory: what attention reads of it
        self._heads: dict[int, tuple[list[_Call], dict[int, list[_Call]]]] = {}  # tokens -> before the boundary, rows -> at it
        self._tails: dict[int, tuple[list[_Call], StepResult]] = {}
        self._crossing: dict[int, list[Tensor]] = {}
        self._attended: dict[tuple[Any, ...], Tensor] = {}

    def run(self, bucket: Bucket, requests: int) -> StepResult:
        """The step that was filled in, captured where it is the first of its bucket."""
        if bucket.rows not in self._tails:
            self._capture_tail(bucket, requests)
        if not self.is_captured(bucket):
            self._capture_head(bucket, requests)
        head, boundaries = self._heads[bucket.tokens]
        tail, result = self._tails[bucket.rows]
        for part in (head, boundaries[bucket.rows], tail):
            for call in part:
                call(requests)
        return result

    def is_captured(self, bucket: Bucket) -> bool:
        """Whether a run of it replays what was captured before."""
        return bucket.rows in self._tails and bucket.tokens in self._heads and bucket.rows in self._heads[bucket.tokens][1]

    def expected(self, bucket: Bucket, requests: int) -> StepResult:
        """What the program gives for the step that was filled in. Attention as in the replay: with another number of requests
        it may sum in another order."""
        return self.program.run(self._views(replace(bucket, requests=requests)))

    def forget(self, bucket: Bucket) -> None:
        """Other buckets with this head capture it anew."""
        self._heads.pop(bucket.tokens, None)

    def bring(self, inputs: dict[str, Tensor], names: Sequence[str]) -> None:
        """Keys and values of these names, tables and masks of a step that brings its own."""
        self._given = {name: step_input(inputs, name) for name in (*names, *_BY_REQUEST)}

    def fill(self, inputs: dict[str, Tensor], bucket: Bucket, empty: bool = False) -> None:
        """Copy a step to the static buffers and pad it; `empty` leaves padding only."""
        views = self._views(bucket)
        if empty:
            # Behind the bucket too: larger row buckets are captured with it, and an earlier step's indices may be too high.
            self._static["rows"].fill_(bucket.tokens - 1)
        tokens = 0 if empty else inputs["input_ids"].shape[1]
        padding = {f"slots.{kind}": -1 for kind in KINDS}
        padding |= {"starts": tokens, "rows": bucket.tokens - 1}  # which ascend
        for name in self._static:
            given, view = step_input(inputs, name), views[name]
            dim = varying_dim(name)
            length = 0 if empty else given.shape[dim]
            target = view.narrow(dim, 0, length)
            if name.startswith("table."):
                target = target[:, : given.shape[1]]
            target.copy_(given.narrow(dim, 0, length))
            view.narrow(dim, length, view.shape[dim] - length).fill_(padding.get(name, 0))

    def _views(self, bucket: Bucket) -> dict[str, Tensor]:
        lengths = {"rows": bucket.rows, "starts": bucket.requests + 1} | {f"table.{kind}": bucket.requests for kind in KINDS}
        views = {name: buffer.narrow(varying_dim(name), 0, lengths.get(name, bucket.tokens))
                 for name, buffer in self._static.items()}  # fmt: skip
        if self.memory is not None:
            return views | self.memory
        fits = self._given["visible"].shape[0] == bucket.requests  # else pieces are captured, for more of them
        return views | {name: tensor for name, tensor in self._given.items() if fits or name not in _BY_REQUEST}

    def _capture_head(self, bucket: Bucket, requests: int) -> None:
        """Everything before the boundary, and its piece for each row bucket in use: now, while what it reads is alive."""
        boundary = self.program.steps[self.program.boundary]
        views = self._views(bucket)
        self._warm_up(bucket, requests)
        values = self.program.bind(views)
        head = self._capture(self.program.steps[: self.program.boundary], values)
        boundaries: dict[int, list[_Call]] = {}
        for rows, buffers in self._crossing.items():
            self.program.rebind(values, self._views(replace(bucket, rows=rows)))
            arguments = [values[i] for i in boundary.arguments]

            def pass_on(arguments: list[Any] = arguments, buffers: list[Tensor] = buffers) -> list[Tensor]:
                for buffer, result in zip(buffers, boundary.function(*arguments), strict=True):
                    buffer.copy_(result)
                return []

            self.recorder.warm_up(pass_on)
            boundaries[rows] = [_replay(self.recorder.record(pass_on)[0])]
        self._heads[bucket.tokens] = head, boundaries

    def _warm_up(self, bucket: Bucket, requests: int) -> None:
        """With as many requests as the step at hand has: for more, attention would be compiled in vain."""
        views = self._views(replace(bucket, requests=requests))
        self.recorder.warm_up(lambda: self.program(views))

    def _capture_tail(self, bucket: Bucket, requests: int) -> None:
        """Everything behind the boundary, on static buffers that its piece's results are copied to."""
        steps, boundary = self.program.steps, self.program.boundary
        values = self.program.bind(self._views(bucket))
        probe = list(values)
        with torch.no_grad():  # for the sizes alone: attention would be compiled for as many requests as the bucket may have
            for step in steps[:boundary]:
                if step.op:
                    probe[step.results[0]] = self._attended_buffer(probe[step.arguments[0]])
                else:
                    step.run(probe)
            results = steps[boundary].function(*[probe[i] for i in steps[boundary].arguments])
        del probe
        buffers = [torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device=r.device).zero_() for r in results]
        for index, buffer in zip(steps[boundary].results, buffers, strict=True):
            values[index] = buffer
        self._warm_up(bucket, requests)
        tail = self._capture(steps[boundary + 1 :], values)
        self._crossing[bucket.rows] = buffers
        self._tails[bucket.rows] = tail, StepResult(*map(self.recorder.borrow, self.program.result(values)))

    def _capture(self, steps: Sequence[BoundCall], values: list[Any]) -> list[_Call]:
        calls: list[_Call] = []
        for step in steps:
            arguments = [values[i] for i in step.arguments]
            if step.op:
                results = [self._attended_buffer(arguments[0])]
                calls.append(self._attention(step, results[0], arguments))
            else:
                replay, results = self.recorder.record(partial(step.function, *arguments))
                calls.append(_replay(replay))
            for index, result in zip(step.results, results, strict=True):
                values[index] = result
            for index in step.dead:
                values[index] = None
        return calls

    def _attended_buffer(self, q: Tensor) -> Tensor:
        """Where attention writes, so that the next piece finds it. Layers take turns: the next piece alone reads it."""
        key = (q.shape[1:], q.dtype)
        if key not in self._attended:
            self._attended[key] = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        return self._attended[key]

    def _attention(self, step: BoundCall, out: Tensor, arguments: list[Any]) -> _Call:
        point = SPLIT_POINTS[step.op]
        table, starts = point.argument("table"), point.argument("starts")  # one row a request
        borrowed = [self.recorder.borrow(a) if isinstance(a, Tensor) else a for a in arguments]
        names = {place: self.program.input_names.get(index, "") for place, index in enumerate(step.arguments)}
        own = [] if self.memory is not None else [place for place, name in names.items() if name in self._given]

        def call(requests: int) -> None:
            given = list(borrowed)
            given[table] = given[table][:requests]
            given[starts] = given[starts][: requests + 1]
            for place in own:  # tables too: for those of another width attention would be compiled again
                given[place] = self._given[names[place]]
            point.into(out, *given)

        return call
