"""OutputProcessor: the tokens of steps that have run, given to their requests as text, chunks and outputs."""

import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .metrics import EngineMetrics, RequestMetrics
from .outputs import Chunk, RequestOutput, Sample, TokenLogprob
from .sampling_params import SamplingParams
from .scheduling.scheduler import Scheduler
from .scheduling.sequence import DecodeBatch, ScheduledChunk, Sequence
from .speculative.length import DraftLength
from .text import TextStream

OnChunk = Callable[[Chunk], None]


@dataclass(eq=False)
class Request:
    """A prompt and its n samples."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    on_chunk: OnChunk | None
    stream: bool
    samples: list[Sequence] = field(default_factory=list)
    texts: list[TextStream | None] = field(default_factory=list)
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    stop_reasons: list[int | str | None] = field(default_factory=list)
    error: str = ""
    outputs: dict[str, RequestOutput] | None = None  # where its output goes when it ends, in whatever way


class OutputProcessor:
    """What running requests have got so far.

    scheduler  is told of tokens, and of sequences that end
    tokenizer  of texts; None: there are none
    metrics    of the engine
    length     learns what rounds of multi-token prediction accept and take; None: nobody asks
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Any, metrics: EngineMetrics, length: DraftLength | None):
        self.scheduler, self.tokenizer, self.metrics, self._length = scheduler, tokenizer, metrics, length
        self.requests: dict[str, Request] = {}
        self._last_round: tuple[tuple[int, int] | None, float] = None, 0.0

    def begun(self, sequence: Sequence, now: float) -> None:
        """Its first tokens are computed in a step that starts now."""
        metrics = sequence.request.metrics
        metrics.scheduled, metrics.cached_tokens = now, sequence.cached or 0
        self.metrics.prompt_tokens += metrics.prompt_tokens
        self.metrics.cached_tokens += metrics.cached_tokens

    def arrived(self, scheduled: Tokens[ScheduledChunk], results: dict[str, Any]) -> list[Chunk]:
        """Tokens of a step that has run, given to their requests."""
        now = time.perf_counter()
        tokens = results["tokens"].tolist() if "tokens" in results else []
        if isinstance(scheduled, DecodeBatch) and scheduled.plain:
            return self._decoded(scheduled, tokens, results, now)
        chunks: list[Chunk] = []
        row = prompt_row = round_row = 0
        accepted = results["accepted"].tolist() if "accepted" in results else []
        for w in scheduled:
            sequence = w.sequence
            request = sequence.request
            if w.prompt:
                if w.sequence is request.samples[0]:
                    request.prompt_logprobs += _logprobs(
                        results, "prompt_", range(prompt_row, prompt_row + w.prompt),
                        request.prompt[w.prompt_from + 1 :], request.params.prompt_logprobs or 0,
                    )  # fmt: skip
                prompt_row += w.prompt
            if not w.samples:
                continue
            count = 1
            if sequence.speculates:
                count += accepted[round_row]
                round_row += 1
            if sequence.finish_reason is None:
                if w.drafts:
                    self.metrics.observe_round(w.drafts, count - 1)
                    if self._length is not None:
                        self._length.observe(w.drafts, count - 1)
                    request.metrics.draft_tokens += w.drafts
                    request.metrics.accepted_draft_tokens += count - 1
                chunk = self._add_tokens(request, sequence, tokens[row : row + count], results, row, now, w.drafts)
                if chunk is not None:
                    chunks += self._deliver(request, chunk)
            row += w.sampled
        if self._length is not None:
            self._time_round(self._length, scheduled, now)
        return chunks

    def _time_round(self, length: DraftLength, scheduled: Tokens[ScheduledChunk], now: float) -> None:
        """A round's time is that since the round before, if both are of as many requests with as many drafts each."""
        drafts = scheduled[0].drafts
        this = (len(scheduled), drafts) if all(w.ahead >= 0 and w.drafts == drafts for w in scheduled) else None
        before, at = self._last_round
        if this is not None and this == before:
            length.took(*this, now - at)
        self._last_round = this, now

    def _decoded(self, scheduled: DecodeBatch, tokens: list[int], results: dict[str, Any], now: float) -> list[Chunk]:
        """Most tokens of a batch: one each, read by nobody yet. Those that end a sequence or fill a page take the slow path."""
        lengths = scheduled.starts + 2  # with the new one
        special = set(np.flatnonzero((lengths >= scheduled.ends) | (lengths % self.scheduler.pages.page_size == 0)).tolist())
        if not scheduled.stops.isdisjoint(tokens):
            special |= {row for row, token in enumerate(tokens) if token in scheduled.stops}
        chunks: list[Chunk] = []
        for row, (sequence, token) in enumerate(zip(scheduled.sequences, tokens, strict=True)):
            if sequence.finish_reason is not None:
                continue
            if row not in special:
                sequence.tokens.append(token)
                sequence.pending -= 1
                self.metrics.output_tokens += 1
                continue
            chunk = self._add_tokens(sequence.request, sequence, [token], results, row, now)
            if chunk is not None:
                chunks += self._deliver(sequence.request, chunk)
        return chunks

    def failed(self, scheduled: Tokens[ScheduledChunk], error: Exception) -> list[Chunk]:
        """A step could not be computed: its requests end, the others never notice."""
        chunks: list[Chunk] = []
        for request in dict.fromkeys(w.sequence.request for w in scheduled):
            chunks += self.end_with_error(request, f"a step failed: {type(error).__name__}: {error}")
        return chunks

    def end_with_error(self, request: Request, message: str) -> list[Chunk]:
        """End a request, and tell it; nothing if it has ended already."""
        chunks = self._end_with_error(request, message)
        for chunk in chunks:
            self._tell(request, chunk)
        return chunks

    def _end_with_error(self, request: Request, message: str) -> list[Chunk]:
        if request.request_id not in self.requests:
            return []
        request.error = message
        for sequence in request.samples:
            if sequence.finish_reason is None:
                self.scheduler.finish(sequence, "error")
        output = self.end(request)
        return [Chunk(request.request_id, len(request.samples) - 1, [], "", "error", output=output)]

    def _add_tokens(
        self, request: Request, sequence: Sequence, tokens: list[int], results: Any, row: int, now: float,
        verified: int = 0,
    ) -> Chunk | None:  # fmt: skip
        """New tokens of a sample, from rows `row` on, up to one that ends it; None if nobody wants chunks and none does.

        verified  drafts in its step, of which these tokens have been accepted, all but the last
        """
        params = request.params
        index = sequence.number - request.samples[0].number if params.n > 1 else 0
        text = request.texts[index]
        length, reason = len(sequence.tokens) - sequence.prompt_length, None
        for count, token in enumerate(tokens, 1):
            length += 1
            if text is not None:
                text.push(token, may_stop=length > params.min_tokens)
            if token in sequence.stops:
                reason, request.stop_reasons[index] = "stop", token
            elif text is not None and text.stopped:
                reason, request.stop_reasons[index] = "stop", text.stopped
            elif length >= sequence.limit:
                reason = "length"
            if reason is not None:
                tokens = tokens[:count]  # the rest was accepted for nothing
                break
        if sequence.constraint is not None:
            for token in tokens:
                sequence.constraint.accept(token)
        self.scheduler.arrived(sequence, tokens, verified)
        self.metrics.output_tokens += len(tokens)
        if request.metrics.first_token is None:
            request.metrics.first_token = now
        logprobs = None
        if params.logprobs is not None:
            logprobs = _logprobs(results, "", range(row, row + len(tokens)), tokens, params.logprobs)
            request.logprobs[index] += logprobs
        if reason is not None:
            self.scheduler.finish(sequence, reason)
            if text is not None:
                text.close()
        elif not request.stream:
            return None
        piece = text.take(last=reason is not None) if text is not None else ""
        return Chunk(request.request_id, index, tokens, piece, reason, logprobs)

    def _deliver(self, request: Request, chunk: Chunk) -> list[Chunk]:
        if all(sequence.finish_reason is not None for sequence in request.samples):
            chunk = replace(chunk, output=self.end(request))
        error = self._tell(request, chunk)
        if not error:
            return [chunk]
        if chunk.output is None:
            return self._end_with_error(request, error)
        return [replace(chunk, finish_reason="error", output=replace(chunk.output, error=error))]  # it had ended anyway

    @staticmethod
    def _tell(request: Request, chunk: Chunk) -> str:
        """Call the request's on_chunk; what is wrong with it, if it raises."""
        if request.on_chunk is None:
            return ""
        try:
            request.on_chunk(chunk)
        except Exception as error:
            message = f"its on_chunk raised {type(error).__name__}: {error}"
            warnings.warn(f"request {request.request_id} ends: {message}", stacklevel=2)
            return message
        return ""

    def end(self, request: Request) -> RequestOutput:
        """The output of a request all of whose samples have ended."""
        del self.requests[request.request_id]
        metrics = request.metrics
        metrics.finished = time.perf_counter()
        metrics.preemptions = sum(s.preemptions for s in request.samples)
        lengths = [len(s.tokens) - s.prompt_length for s in request.samples]
        metrics.output_tokens, metrics.longest_output = sum(lengths), max(lengths)
        self.metrics.requests += 1
        self.metrics.errors += bool(request.error)
        self.metrics.observe(metrics)
        wants_prompt = request.params.prompt_logprobs is not None
        output = RequestOutput(
            request.request_id, request.prompt, [self._sample(request, i) for i in range(len(request.samples))], metrics,
            list(request.prompt_logprobs) if wants_prompt else None, request.error,
        )  # fmt: skip
        if request.outputs is not None:
            request.outputs[request.request_id] = output
        return output

    def _sample(self, request: Request, index: int) -> Sample:
        sequence, text = request.samples[index], request.texts[index]
        assert sequence.finish_reason is not None
        if text is not None:
            said = text.text
        elif self.tokenizer is not None:
            said = self.tokenizer.decode(sequence.output, skip_special_tokens=request.params.skip_special_tokens)
        else:
            said = ""
        logprobs = request.logprobs[index] if request.params.logprobs is not None else None
        return Sample(sequence.output, said, sequence.finish_reason, request.stop_reasons[index], logprobs)


def _logprobs(results: dict[str, Any], prefix: str, rows: range, tokens: Tokens[int], top: int) -> list[TokenLogprob]:
    chosen, ranks = results[f"{prefix}chosen"], results[f"{prefix}ranks"]
    values, ids = results[f"{prefix}top"], results[f"{prefix}top_ids"]
    return [
        TokenLogprob(token, float(chosen[row]), int(ranks[row]), dict(zip(ids[row, :top].tolist(), values[row, :top].tolist(),
                                                                          strict=True)))
        for row, token in zip(rows, tokens, strict=False)
    ]  # fmt: skip
