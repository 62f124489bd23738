"""CUDA graphs of a packed step: the whole step for decode, piece by piece around attention for prefill.

    FULL        every token's logits are wanted (decode, MTP verification): one graph by token bucket, attention included
    PIECEWISE   any other step: each piece is a graph, attention runs between them with the sizes of the batch at hand

Whatever a graph reads lies in a static buffer: the step's inputs are copied there and padded to the bucket. Padding tokens have
no slot, so nothing of theirs is stored, and belong to no request, so no attention reads or writes for them.

Behind the YOCO boundary a prefill has a few wanted rows, in buckets of their own: the pieces there are captured once for each
row bucket and serve every token bucket. Only the boundary's piece is captured for pairs of both.

All graphs share one memory pool. What one graph leaves for the next is kept alive while the next is captured, so that none is
placed on it; afterwards the pool may reuse it, as each graph is replayed behind the one that writes its inputs.
"""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma4_compile.packed.inputs import KINDS, STEP_INPUTS, check_inputs, step_input, varying_dim
from gemma4_compile.packed.program import Program, Step, StepResult
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.split import SPLIT_POINTS
from gemma4_compile.packed.step_inputs import StepInputs, leaves, rebuilt

from .full import FullGraphs, FullResult, greedy
from .recorder import CudaRecorder, Recorder


class CaptureRefused(Exception):
    """A graph would keep something that the host decides anew for each step. Says what, and what to do."""


@dataclass(frozen=True)
class Buckets:
    """Sizes that graphs are captured for; a step takes the smallest that holds it. Ascending.

    decode    tokens of steps whose rows are all wanted
    tokens    tokens of any other step; a longer one runs without graphs
    rows      wanted rows of any other step
    """

    decode: tuple[int, ...] = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256)
    tokens: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192)
    rows: tuple[int, ...] = (4, 16, 64, 256)

    def __post_init__(self) -> None:
        for name in ("decode", "tokens", "rows"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
                raise ValueError(f"{name} must be ascending positive sizes, got {sizes}; sort them and drop doubles")


@dataclass(frozen=True)
class _Bucket:
    """A captured size: tokens, wanted rows, and requests that the static tables hold."""

    tokens: int
    rows: int
    requests: int
    full: bool = False

    @property
    def name(self) -> str:
        return f"decode {self.tokens}" if self.full else f"{self.tokens} tokens, {self.rows} rows"


# What attention reads of each request: as long as there are requests in a step.
_BY_REQUEST = ("visible", *(f"table.{kind}" for kind in KINDS))
_Call = Callable[[int], None]  # one captured step, given the number of requests at hand


def _replay(replay: Callable[[], None]) -> _Call:
    return lambda requests: replay()


class GraphRunner:
    """A program replayed from CUDA graphs. Call it with a step's inputs, as the program itself.

    program     of an optimized model, see runtime/worker/model.py
    inputs      those of any step: the keys and values in it are the ones that all steps must use, and the width of its tables
                is the most pages that a request may have
    requests    the most requests of a step; FULL steps have no limit of their own
    state       of the rows, see row_state.py; without, `decode` gives logits only
    argmax      see full_graphs.py
    own_memory  whether all steps use the keys and values in `inputs`. Without, a step's own are read, as pieces never see them:
                attention, which runs between graphs, is given those of the step at hand. There are no FULL graphs then
    agree       whether a bucket is given up on any rank, told whether it should be on this one; for ranks that run one model.
                There a capture that fails is an error: other ranks' collectives would wait for it

    Graphs are captured when a bucket is first used. Its first replay is compared with the program itself on the same inputs; if
    they differ, the bucket is given up with a warning. `refused` says why a bucket runs without graphs.

    Raises CaptureRefused where no graph can be right: inputs that are not on the GPU, or a piece that works on the host.
    """

    def __init__(
        self, program: Program, inputs: dict[str, Tensor], requests: int, buckets: Buckets | None = None,
        recorder: Recorder | None = None, state: RowState | None = None, argmax: Callable[[Tensor], Tensor] = greedy,
        agree: Callable[[bool], bool] | None = None, own_memory: bool = True,
    ):  # fmt: skip
        self._agree, self._own_memory = agree, own_memory
        self.program, self.requests, self.buckets = program, requests, buckets or Buckets()
        device = inputs["input_ids"].device
        if recorder is None:
            _check_on_gpu(inputs)
            recorder = CudaRecorder(device)
        _check_pieces(program)
        self.recorder = recorder
        self.memory = {name: tensor for name, tensor in inputs.items() if name.startswith(("keys.", "values."))}
        if requests < 1:
            raise ValueError(f"a step must be allowed at least one request, got {requests}; say how many it may have")
        tokens, rows = max(self.buckets.tokens, default=1), max(self.buckets.rows, default=1)
        sizes = {"input_ids": (1, tokens), "positions": (tokens,), "rows": (rows,), "starts": (requests + 1,)}
        if not own_memory:
            sizes["position_ids"] = (tokens,)
        width = max(inputs[f"table.{kind}"].shape[1] for kind in KINDS)
        for kind in KINDS:
            sizes |= {f"slots.{kind}": (tokens,), f"table.{kind}": (requests, width)}
        self.static = {
            name: torch.zeros(size, dtype=step_input(inputs, name).dtype, device=device) for name, size in sizes.items()
        }
        self._given: dict[str, Tensor] = {}  # of a step that brings its own memory: what attention reads of it
        self.refused: dict[str, str] = {}
        self.replays = 0  # steps that ran from graphs
        self.full = FullGraphs(program.run, self.memory, self.buckets.decode, width, recorder, device, state, argmax)
        self._heads: dict[int, tuple[list[_Call], dict[int, list[_Call]]]] = {}  # tokens -> before the boundary, rows -> at it
        self._tails: dict[int, tuple[list[_Call], StepResult]] = {}
        self._crossing: dict[int, list[Tensor]] = {}
        self._attended: dict[tuple[Any, ...], Tensor] = {}
        self._checked: set[_Bucket] = set()

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [1, N, vocabulary] of the N wanted rows. From a graph they are valid until the next step."""
        return self.run(inputs).logits

    def run(self, inputs: dict[str, Tensor]) -> StepResult:
        """Logits [1, N, vocabulary] and final-normed states [N, H] of the N wanted rows. From a graph they are valid until the
        next step."""
        check_inputs(inputs)
        if self._own_memory:
            self._check_memory(inputs)
        else:
            self._given = {name: step_input(inputs, name) for name in (*self.memory, *_BY_REQUEST)}
        wanted, requests = inputs["rows"].shape[0], inputs["table.full_attention"].shape[0]
        bucket = self._bucket(inputs["input_ids"].shape[1], wanted, requests)
        if bucket is None or bucket.name in self.refused:
            return self.program.run(inputs)
        if bucket.full:
            step = StepInputs.of_model({name: inputs[name].cpu().numpy() for name in STEP_INPUTS})
            found = self._full_step(bucket, step)
            return self.program.run(inputs) if found is None else StepResult(found.logits, found.hidden)
        try:
            if bucket not in self._checked:
                return self._first(bucket, partial(self._fill, inputs), wanted, requests)
            self._fill(inputs, bucket)
            result = self._run_pieces(bucket, requests)
        except (RuntimeError, CaptureRefused) as error:
            if self._agree is not None:
                raise
            self._give_up(bucket, f"its capture failed: {error}")
            return self.program.run(inputs)
        self.replays += 1
        return _cut(result, wanted)

    def decode(self, step: StepInputs[np.ndarray]) -> FullResult | None:
        """A FULL step from the host's own arrays, in one copy; None if no graph holds it. Greedy tokens go to `targets`. The
        result's inputs are as long as they were given."""
        bucket = self._bucket(step.positions.shape[0], step.rows.shape[0], step.starts.shape[0] - 1)
        if bucket is None or not bucket.full or bucket.name in self.refused:
            return None
        return self._full_step(bucket, step)

    def _full_step(self, bucket: _Bucket, step: StepInputs[np.ndarray]) -> FullResult | None:
        """None where the bucket turns out to run without graphs; nothing was sampled then."""
        wanted, step = step.positions.shape[0], replace(step, sampling=None)
        try:
            if bucket not in self._checked:
                self._first(bucket, partial(self._send, step), wanted, step.starts.shape[0] - 1)
                if bucket.name in self.refused:
                    self.full.restore()
                    return None
            else:
                self.full.send(bucket.tokens, step)
                self.replays += 1
                self.full.run(bucket.tokens)
        except (RuntimeError, CaptureRefused) as error:
            if self._agree is not None:
                raise
            self._give_up(bucket, f"its capture failed: {error}")
            return None
        logits, tokens, hidden, views = self.full.result(bucket.tokens)
        given, whole = dict(leaves(step)), dict(leaves(views))
        cut = {name: whole[name][: array.shape[0]] if array.ndim == 1 else whole[name] for name, array in given.items()}
        inputs = rebuilt(step, cut)
        return FullResult(logits[:, :wanted], None if tokens is None else tokens[:wanted], hidden[:wanted], inputs)

    def _send(self, step: StepInputs[np.ndarray], bucket: _Bucket, empty: bool = False) -> None:
        self.full.send(bucket.tokens, None if empty else step)

    def _bucket(self, tokens: int, wanted: int, requests: int) -> _Bucket | None:
        size = fitting(self.buckets.decode, tokens)
        if tokens == wanted and size and requests <= size:
            return _Bucket(size, size, size, full=True)
        size, rows = fitting(self.buckets.tokens, tokens), fitting(self.buckets.rows, wanted)
        return _Bucket(size, rows, self.requests) if size and rows and requests <= self.requests else None

    def _first(self, bucket: _Bucket, fill: Callable[..., None], wanted: int, requests: int) -> StepResult:
        """Capture over padding alone, then replay the step and compare it with the program: whatever a graph kept shows."""
        fill(bucket, empty=True)
        if bucket.full:
            self.full.run(bucket.tokens)
        else:
            self._run_pieces(bucket, requests)
        fill(bucket)
        # Replay first: where it fails to store keys, its logits must not come from those that the program stored.
        if bucket.full:
            actual, expected = (_cut(result, wanted) for result in self.full.compare(bucket.tokens))
        else:
            actual = _cut(self._run_pieces(bucket, requests), wanted)
            # Attention as in the replay: with another number of requests it may sum in another order.
            expected = _cut(self.program.run(self._views(replace(bucket, requests=requests))), wanted)
        difference = (actual.logits.float() - expected.logits.float()).square().mean().sqrt()
        scale = expected.logits.float().square().mean().sqrt()
        differs = bool(not difference <= 1e-2 * scale)  # also if either is not a number
        if differs if self._agree is None else self._agree(differs):
            self._give_up(bucket, f"a replay gave other logits than the program (rms {difference:.3g} of {scale:.3g})")
            return expected
        self._checked.add(bucket)
        self.replays += 1
        return actual

    def _give_up(self, bucket: _Bucket, reason: str) -> None:
        self.refused[bucket.name] = reason
        self._heads.pop(bucket.tokens, None)  # other buckets with this head capture it anew, and are checked again
        self._forget(bucket.tokens)
        warnings.warn(f"gemma4_compile runs the bucket '{bucket.name}' without CUDA graphs: {reason}", stacklevel=4)

    def _forget(self, tokens: int) -> None:
        """Buckets of this many tokens are compared with the program again at their next replay."""
        self._checked = {bucket for bucket in self._checked if bucket.full or bucket.tokens != tokens}

    def _check_memory(self, inputs: dict[str, Tensor]) -> None:
        for name, tensor in self.memory.items():
            given = inputs.get(name)
            same = given is tensor or given is not None and (given.data_ptr(), given.shape, given.stride()) == (
                tensor.data_ptr(), tensor.shape, tensor.stride()
            )  # fmt: skip
            if not same:
                what = "none" if given is None else "another tensor"
                raise CaptureRefused(
                    f"graphs keep the address of keys and values, got {what} as {name}; make a new GraphRunner for it"
                )
        for kind in KINDS:
            pages, most = inputs[f"table.{kind}"].shape[1], self.full.width
            if pages > most:
                raise CaptureRefused(
                    f"a request may have {most} pages here, got a table.{kind} of {pages}; make a new GraphRunner"
                )

    def _fill(self, inputs: dict[str, Tensor], bucket: _Bucket, empty: bool = False) -> None:
        """Copy a step to the static buffers and pad it; `empty` leaves padding only."""
        views = self._views(bucket)
        if empty:
            # Behind the bucket too: larger row buckets are captured with it, and an earlier step's indices may be too high.
            self.static["rows"].fill_(bucket.tokens - 1)
        tokens = 0 if empty else inputs["input_ids"].shape[1]
        padding = {f"slots.{kind}": -1 for kind in KINDS}
        padding |= {"starts": tokens, "rows": bucket.tokens - 1}  # which ascend
        for name in self.static:
            given, view = step_input(inputs, name), views[name]
            dim = varying_dim(name)
            length = 0 if empty else given.shape[dim]
            target = view.narrow(dim, 0, length)
            if name.startswith("table."):
                target = target[:, : given.shape[1]]
            target.copy_(given.narrow(dim, 0, length))
            view.narrow(dim, length, view.shape[dim] - length).fill_(padding.get(name, 0))

    def _views(self, bucket: _Bucket) -> dict[str, Tensor]:
        lengths = {"rows": bucket.rows, "starts": bucket.requests + 1} | {f"table.{kind}": bucket.requests for kind in KINDS}
        views = {name: buffer.narrow(varying_dim(name), 0, lengths.get(name, bucket.tokens))
                 for name, buffer in self.static.items()}  # fmt: skip
        if self._own_memory:
            return views | self.memory
        fits = self._given["visible"].shape[0] == bucket.requests  # else pieces are captured, for more of them
        return views | {name: tensor for name, tensor in self._given.items() if fits or name not in _BY_REQUEST}

    # PIECEWISE

    def _run_pieces(self, bucket: _Bucket, requests: int) -> StepResult:
        if bucket.rows not in self._tails:
            self._capture_tail(bucket, requests)
        if bucket.tokens not in self._heads or bucket.rows not in self._heads[bucket.tokens][1]:
            self._capture_head(bucket, requests)
        head, boundaries = self._heads[bucket.tokens]
        tail, result = self._tails[bucket.rows]
        for part in (head, boundaries[bucket.rows], tail):
            for call in part:
                call(requests)
        return result

    def _capture_head(self, bucket: _Bucket, requests: int) -> None:
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
        self._forget(bucket.tokens)

    def _warm_up(self, bucket: _Bucket, requests: int) -> None:
        """With as many requests as the step at hand has: for more, attention would be compiled in vain."""
        views = self._views(replace(bucket, requests=requests))
        self.recorder.warm_up(lambda: self.program(views))

    def _capture_tail(self, bucket: _Bucket, requests: int) -> None:
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

    def _capture(self, steps: Sequence[Step], values: list[Any]) -> list[_Call]:
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

    def _attention(self, step: Step, out: Tensor, arguments: list[Any]) -> _Call:
        point = SPLIT_POINTS[step.op]
        table, starts = point.argument("table"), point.argument("starts")  # one row a request
        borrowed = [self.recorder.borrow(a) if isinstance(a, Tensor) else a for a in arguments]
        names = {place: self.program.input_names.get(index, "") for place, index in enumerate(step.arguments)}
        own = [] if self._own_memory else [place for place, name in names.items() if name in self._given]

        def call(requests: int) -> None:
            given = list(borrowed)
            given[table] = given[table][:requests]
            given[starts] = given[starts][: requests + 1]
            for place in own:  # tables too: for those of another width attention would be compiled again
                given[place] = self._given[names[place]]
            point.into(out, *given)

        return call


def _cut(result: StepResult, wanted: int) -> StepResult:
    """Without the rows of padding."""
    return StepResult(result.logits[:, :wanted], result.hidden[:wanted])


def fitting(sizes: Sequence[int], wanted: int) -> int:
    """The smallest of the sizes that is enough; 0 if none is."""
    index = bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else 0


def _check_on_gpu(inputs: dict[str, Tensor]) -> None:
    for name, tensor in inputs.items():
        if tensor.device.type != "cuda":
            raise CaptureRefused(f"a graph reads its inputs on the GPU, got {name} on {tensor.device}; move it there")


def check_host(program: Program) -> None:
    """Raises CaptureRefused for a piece that works on the host."""
    for call in program.plan.calls:
        if call.host:
            raise CaptureRefused(f"a graph cannot hold {call.host}: the host decides it anew for each step; run without graphs")


def _check_pieces(program: Program) -> None:
    check_host(program)
    before = {index for step in program.steps[: program.boundary] for index in step.results}
    for step in program.steps[program.boundary + 1 :]:
        if before & set(step.arguments):
            raise CaptureRefused("steps behind the boundary must read what its piece passes on, got values from before it")
