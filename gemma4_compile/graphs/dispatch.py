"""CUDA graphs of a packed step: the whole step for decode, piece by piece around attention for prefill.

    FULL        every token's logits are wanted (decode, MTP verification): one graph by token bucket, attention included
    PIECEWISE   any other step: each piece is a graph, attention runs between them with the sizes of the batch at hand

Whatever a graph reads lies in a static buffer: the step's inputs are copied there and padded to the bucket. Padding tokens have
no slot, so nothing of theirs is stored, and belong to no request, so no attention reads or writes for them.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from gemma4_compile.packed.inputs import KINDS, STEP_INPUTS, check_inputs
from gemma4_compile.packed.program import Program, StepResult
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.step_inputs import StepInputs

from .buckets import Bucket, Buckets, fitting
from .checks import CaptureRefused, check_on_gpu, check_pieces, difference
from .full import FullGraphs, FullResult, greedy
from .piecewise import PiecewiseGraphs
from .recorder import CudaRecorder, Recorder


class GraphRunner:
    """A program replayed from CUDA graphs. Call it with a step's inputs, as the program itself.

    program     of an optimized model, see runtime/worker/model.py
    inputs      those of any step: the keys and values in it are the ones that all steps must use, and the width of its tables
                is the most pages that a request may have
    requests    the most requests of a step; FULL steps have no limit of their own
    state       of the rows, see packed/row_state.py; without, `decode` gives logits only
    argmax      see full.py
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
        self._example = {name: inputs[name] for name in STEP_INPUTS}
        self.program, self.requests, self.buckets = program, requests, buckets or Buckets()
        device = inputs["input_ids"].device
        if recorder is None:
            check_on_gpu(inputs)
            recorder = CudaRecorder(device)
        check_pieces(program)
        self.recorder = recorder
        self.memory = {name: tensor for name, tensor in inputs.items() if name.startswith(("keys.", "values."))}
        if requests < 1:
            raise ValueError(f"a step must be allowed at least one request, got {requests}; say how many it may have")
        self.refused: dict[str, str] = {}
        self.replays = 0  # steps that ran from graphs
        width = max(inputs[f"table.{kind}"].shape[1] for kind in KINDS)
        self.full = FullGraphs(program.run_recorded, self.memory, self.buckets.decode, width, recorder, device, state, argmax)
        memory = self.memory if own_memory else None
        self.piecewise = PiecewiseGraphs(program, memory, inputs, requests, self.buckets, recorder)
        self._checked: set[Bucket] = set()

    def beside(self, program: Program, more: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> "GraphRunner":
        """A runner of another program of prompt steps, over the same memory and in the same pool.

        more   a step of this one as one of its"""
        inputs, buckets = more(self._example) | self.memory, replace(self.buckets, decode=())
        return GraphRunner(program, inputs, self.requests, buckets, self.recorder, agree=self._agree)

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
            self.piecewise.bring(inputs, list(self.memory))
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
                return self._first(bucket, partial(self.piecewise.fill, inputs), wanted, requests)
            self.piecewise.fill(inputs, bucket)
            result = self.piecewise.run(bucket, requests)
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

    def _full_step(self, bucket: Bucket, step: StepInputs[np.ndarray]) -> FullResult | None:
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
        logits, tokens, hidden, _ = self.full.result(bucket.tokens)
        inputs = self.full.seen(bucket.tokens, step)
        return FullResult(logits[:, :wanted], None if tokens is None else tokens[:wanted], hidden[:wanted], inputs)

    def _send(self, step: StepInputs[np.ndarray], bucket: Bucket, empty: bool = False) -> None:
        self.full.send(bucket.tokens, None if empty else step)

    def _bucket(self, tokens: int, wanted: int, requests: int) -> Bucket | None:
        size = fitting(self.buckets.decode, tokens)
        if tokens == wanted and size and requests <= size:
            return Bucket(size, size, size, full=True)
        size, rows = fitting(self.buckets.tokens, tokens), fitting(self.buckets.rows, wanted)
        return Bucket(size, rows, self.requests) if size and rows and requests <= self.requests else None

    def _first(self, bucket: Bucket, fill: Callable[..., None], wanted: int, requests: int) -> StepResult:
        """Capture over padding alone, then replay the step and compare it with the program: whatever a graph kept shows."""
        fill(bucket, empty=True)
        if bucket.full:
            self.full.run(bucket.tokens)
        else:
            if not self.piecewise.is_captured(bucket):
                self._check_again(bucket.tokens)  # its head is captured anew
            self.piecewise.run(bucket, requests)
        fill(bucket)
        # Replay first: where it fails to store keys, its logits must not come from those that the program stored.
        if bucket.full:
            actual, expected = (_cut(result, wanted) for result in self.full.compare(bucket.tokens))
        else:
            actual = _cut(self.piecewise.run(bucket, requests), wanted)
            expected = _cut(self.piecewise.expected(bucket, requests), wanted)
        wrong = difference(actual.logits, expected.logits)
        if wrong if self._agree is None else self._agree(bool(wrong)):
            self._give_up(bucket, f"a replay gave other logits than the program ({wrong or 'on another rank'})")
            return expected
        self._checked.add(bucket)
        self.replays += 1
        return actual

    def _give_up(self, bucket: Bucket, reason: str) -> None:
        self.refused[bucket.name] = reason
        self.piecewise.forget(bucket)
        self._check_again(bucket.tokens)
        warnings.warn(f"gemma4_compile runs the bucket '{bucket.name}' without CUDA graphs: {reason}", stacklevel=4)

    def _check_again(self, tokens: int) -> None:
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


def _cut(result: StepResult, wanted: int) -> StepResult:
    """Without the rows of padding."""
    return StepResult(result.logits[:, :wanted], result.hidden[:wanted])
