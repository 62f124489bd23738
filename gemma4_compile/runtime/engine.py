"""Engine(model): requests in, tokens out. Continuous batching over paged KV, on the compiled step."""

import itertools
import random
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from gemma4_compile.config import EngineConfig
from gemma4_compile.hf.watch import Watch
from gemma4_compile.ops.library import own_dtypes
from gemma4_compile.torchrun import RanksError

from .metrics import EngineMetrics, RequestMetrics
from .opening import assistant_of, model_of, stop_tokens
from .outputs import Chunk, RequestOutput, Sample, TokenLogprob
from .sampling_params import SamplingParams
from .scheduling.scheduler import Scheduler
from .scheduling.sequence import Decodes, Sequence, Work
from .speculative.config import SpeculativeConfig
from .speculative.length import DraftLength
from .step import invariants
from .text import Prompt, TextStream, encode, prompts_of
from .worker.model import PackedModel
from .worker.model_runner import Launched, ModelRunner

OnChunk = Callable[[Chunk], None]


@dataclass(eq=False)
class _Request:
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


class Engine:
    """Serves a Gemma-4 to many requests at a time.

    model      Gemma4ForCausalLM, the multimodal class (its text part is served), a checkpoint's folder or hub id. A model that
               is not optimized yet is, in place
    config     EngineConfig
    tokenizer  of text prompts; None: the checkpoint's, if there is one
    speculative   SpeculativeConfig: an assistant drafts tokens for it; None: nothing is drafted

    Requests that cannot be served end with an error and leave all others as they are. One thread at a time may call it.

    Under torchrun a checkpoint that the engine loads is divided between the ranks (tensor parallel), as is a model of
    `parallel.load`. All ranks make an engine together. Then rank 0 uses it as if it were alone, and the others call `follow`;
    or all call `generate`, where rank 0's prompts count. `close` it, or use it in a `with`, so that the others may go on.

    Raises ValueError for a checkpoint that cannot be loaded, a configuration that the model or the memory cannot hold.
    """

    def __init__(
        self, model: nn.Module | str | Path, config: EngineConfig | None = None, tokenizer: Any = None, *,
        speculative: SpeculativeConfig | None = None,
    ):  # fmt: skip
        self.config = config = config or EngineConfig()
        self._draft_length = None if speculative is None else DraftLength(speculative.tokens)
        self._adaptive = self._draft_length if self._draft_length is not None and self._draft_length.adaptive else None
        self.model, self.tokenizer = model_of(model, config, tokenizer)
        if speculative is not None:
            speculative = replace(speculative, assistant=assistant_of(speculative.assistant, self.model))
        self.assistant: Any = None if speculative is None else speculative.assistant
        self._stop_tokens = frozenset(i for i in stop_tokens(self.model) if i < self.model.config.vocab_size)
        self.runner = ModelRunner(PackedModel(self.model), config, self._stop_tokens, speculative)
        self.scheduler = Scheduler(
            self.runner.pages, config.max_batched_tokens, reuse=config.prefix_reuse, drafts=self.runner.speculative_tokens
        )
        self.max_model_len = self.runner.max_model_len
        self._overlap = self.runner.on_gpu if config.overlap is None else config.overlap
        self._requests: dict[str, _Request] = {}
        self._numbers = itertools.count()
        self._seeds = random.Random(config.seed)
        self._running: Launched | None = None
        self._last_round: tuple[tuple[int, int] | None, float] = None, 0.0
        self._metrics = EngineMetrics()
        self._ranks = self.runner.ranks
        self._watch = self._watched()
        weakref.finalize(self, self.runner.close)
        if config.capture_at_start:
            shown = config.progress and self.runner.on_gpu and self.leads
            capturing = self._ranks.together("capturing CUDA graphs", limited=False)
            with capturing, tqdm(self.runner.capture(), desc="CUDA graphs", disable=not shown) as bar:
                for name in bar:
                    bar.set_postfix_str(name)

    # Several ranks

    @property
    def leads(self) -> bool:
        """Whether requests are given to this rank: to rank 0 of those that the model is divided between."""
        return self._ranks.leads

    def follow(self) -> None:
        """On every rank but 0: run what rank 0 plans, until it closes its engine. Rank 0 returns at once.

        Raises RuntimeError if another rank is gone, or fails."""
        while not self.leads and self._follow() is not None:
            pass

    def close(self) -> None:
        """No more requests: the ranks that follow may go on, and give up their process group. Harmless twice, and without other
        ranks."""
        self.runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _follow(self) -> "list[RequestOutput] | str | None":
        """Until rank 0's `generate` ends, whose outputs or error are returned, or its engine closes."""
        for kind, content in self._ranks.messages():
            if kind == "step":
                self.runner.run(content)
            else:
                return content
        self.close()
        return None

    def _ended_with(self, found: "list[RequestOutput] | str") -> None:
        """Rank 0's `generate` is through."""
        if self._ranks.several and self._ranks.open:
            with self._ranks.together("a message to the other ranks"):
                self._ranks.tell("generated", found)

    # For those who want results

    def generate(
        self, prompts: Prompt | Tokens[Prompt], params: SamplingParams | Tokens[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Run prompts to their ends; outputs in the prompts' order.

        prompts  texts, lists, arrays or tensors of token ids, what a tokenizer gives, {"prompt": text}, {"prompt_token_ids":
                 ids}, or lists of messages; one alone gives a list of one
        params   for all of them, or one for each; None is greedy

        A prompt that cannot be served gives an output with finish_reason "error", and a warning. Raises ValueError if prompts
        and params differ in number, TypeError for a mapping that is no prompt. Of several ranks all give rank 0's outputs;
        RuntimeError if that raises.
        """
        if not self.leads:
            followed = self._follow()
            if followed is None:
                raise RanksError("rank 0's engine must be open, got one that was closed; make a new one on all ranks")
            if isinstance(followed, str):
                raise RuntimeError(f"rank 0 must end what it generates, got {followed}; see there")
            return followed
        try:
            found = self._generate(prompts, params)
        except BaseException as error:
            self._ended_with(f"{type(error).__name__}: {error}")
            raise
        self._ended_with(found)
        return found

    def _generate(
        self, prompts: Prompt | Tokens[Prompt], params: SamplingParams | Tokens[SamplingParams] | None
    ) -> list[RequestOutput]:  # fmt: skip
        several = prompts_of(prompts)
        if params is None or isinstance(params, SamplingParams):
            chosen = [params or SamplingParams()] * len(several)
        else:
            chosen = list(params)
        if len(chosen) != len(several):
            raise ValueError(f"there must be params for each prompt, got {len(chosen)} for {len(several)}; pass one for all")
        outputs: dict[str, RequestOutput] = {}
        ids = [self._new_id() for _ in several]
        try:
            for index, (request_id, prompt, param) in enumerate(zip(ids, several, chosen, strict=True)):
                try:
                    self.add_request(prompt, param, request_id, stream=False)
                    self._requests[request_id].outputs = outputs
                except ValueError as error:
                    warnings.warn(f"prompt {index} is not served: {error}", stacklevel=3)
                    outputs[request_id] = _refused(request_id, prompt, str(error))
            with tqdm(total=len(ids), desc="requests", disable=not self.config.progress) as bar:
                while len(outputs) < len(ids):
                    self.step()
                    bar.update(len(outputs) - bar.n)
        except BaseException:
            for request_id in ids:
                self.abort(request_id)
            raise
        return [outputs[request_id] for request_id in ids]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> "ChunkStream":
        """One prompt's chunks as they come; what is no longer read is aborted. Raises ValueError as `add_request`."""
        chunks: deque[Chunk] = deque()
        return ChunkStream(self, self.add_request(prompt, params, on_chunk=chunks.append), chunks)

    # For those who drive it

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None,
        on_chunk: OnChunk | None = None, stream: bool = True,
    ) -> str:  # fmt: skip
        """Queue a prompt; returns its id. `step` does the work.

        on_chunk  called with each chunk of it; an exception there ends this request alone
        stream    whether chunks have text; without, texts are made once, at the end

        Raises ValueError for a prompt or params that can never be served, an id in use, autocast, a change of the model that
        the engine cannot follow. Nothing is queued then.
        """
        if not self.leads:
            raise RuntimeError("requests must be given to rank 0, got one on another; call follow() there")
        params = params or SamplingParams()
        request_id = self._new_id() if request_id is None else request_id
        if request_id in self._requests:
            raise ValueError(f"a request_id must be new, got {request_id!r}, which runs; choose another")
        if torch.is_autocast_enabled(self.runner.device.type):
            raise ValueError(
                "an engine computes in its model's dtype, got autocast around it; leave it, or load the model in another dtype"
            )
        ids = encode(prompt, self.tokenizer, self.config.chat)
        self._check(ids, params)
        if not self.has_work:
            self._look_at_model()
        seed = self._seeds.getrandbits(62) if params.seed is None else params.seed
        metrics = RequestMetrics(arrived=time.perf_counter(), prompt_tokens=len(ids))
        request = _Request(request_id, ids, params, metrics, on_chunk, stream)
        limit = min(params.max_tokens or self.max_model_len, self.max_model_len - len(ids))
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._stop_tokens)
        plain = not (stream or params.stop or on_chunk) and params.logprobs is None and params.prompt_logprobs is None
        for index in range(params.n):
            sequence = Sequence(next(self._numbers), list(ids), params, limit, (seed + index) % 2**63, request, stops)
            sequence.plain = plain
            # Counts of tokens that a penalty needs would hold drafts too; a prompt's log probabilities have rows of their own.
            sequence.speculates = self.assistant is not None and not params.penalizes and params.prompt_logprobs is None
            text = None
            if self.tokenizer is not None and (stream or params.stop):
                text = TextStream(self.tokenizer, params.stop, params.skip_special_tokens)
            if index:  # the prompt's log probabilities are those of the first sample
                sequence.prompt_rows = len(ids)
            request.samples.append(sequence)
            request.texts.append(text)
            request.logprobs.append([])
            request.stop_reasons.append(None)
        self._requests[request_id] = request
        for sequence in request.samples:
            self.scheduler.add(sequence)
        return request_id

    def refresh(self) -> None:
        """Take in all changes of the model and the assistant, and forget the prefixes that earlier prompts have left.

        An engine looks for changes itself when a request comes while none runs: weights written in place or replaced, modules,
        hooks, attributes, config. It cannot see what is written through `.data`, or to inference tensors: call this then.

        Raises RuntimeError while requests run, ValueError for a change that it cannot follow; no request is served until it is
        undone."""
        if self.has_work:
            raise RuntimeError(f"requests must have ended, got {len(self._requests)} that run; abort them or step on")
        self.runner.refresh()
        self._watch = self._watched()

    def _watched(self) -> Watch:
        return Watch(self.model, *([] if self.assistant is None else [self.assistant]))

    def _look_at_model(self) -> None:
        if not self._watch.is_unchanged():
            self.refresh()
        elif self._watch.was_written():
            self.runner.pages.forget()

    def step(self) -> list[Chunk]:
        """Compute one step; returns what requests have got from it, or, where steps overlap, from the one before."""
        start, waited = time.perf_counter(), 0.0
        if self._draft_length is not None:
            self.scheduler.drafts = self._draft_length.choose(len(self.scheduler.running))
        work = self.scheduler.schedule()
        launched, chunks = None, []
        if work:
            for w in () if isinstance(work, Decodes) else work:
                if w.begins and w.sequence.request.metrics.scheduled is None:
                    self._begun(w.sequence, start)
            try:
                with own_dtypes():
                    launched = self.runner.launch(work, self.scheduler.drafts)
            except RanksError:
                raise
            except Exception as error:
                chunks = self._fail(work, error)
            self._metrics.steps += 1
        if self._overlap:
            self._running, launched = launched, self._running
        if launched is not None:
            before = time.perf_counter()
            try:
                with self._ranks.together():
                    results = launched.fetched.wait()
            except RanksError:
                raise
            except Exception as error:  # of a kernel: it shows only when the host waits
                chunks += self._fail(launched.work, error)
                results = None
            waited = time.perf_counter() - before
            if results is not None:
                chunks += self._arrived(launched.work, results)
        if invariants.enabled():
            self.scheduler.check()
        self._metrics.host_seconds += time.perf_counter() - start - waited
        return chunks

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, with what it has. None if it has ended already, or never was."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for sequence in request.samples:
            if sequence.finish_reason is None:
                self.scheduler.finish(sequence, "abort")
        return self._ended(request)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests) or self._running is not None

    @property
    def metrics(self) -> EngineMetrics:
        """As of now; `.prometheus()` gives them as text."""
        found, pools = self._metrics, self.runner.pages.pools
        found.running, found.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        found.preemptions = self.scheduler.preemptions
        found.pages_free = {kind: pool.free for kind, pool in pools.items()}
        found.pages = {kind: pool.pages for kind, pool in pools.items()}
        return found

    @property
    def memory(self) -> Any:
        """A MemoryReport: weights, pools, what fits, and what the naive layout would hold."""
        return self.runner.memory

    # Within

    def _new_id(self) -> str:
        return next(name for number in self._numbers if (name := f"request-{number}") not in self._requests)

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        vocabulary = self.runner.vocabulary.size
        if not ids:
            raise ValueError("a prompt must have at least one token, got none; begin it with <bos>")
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"a prompt must leave room for a token within max_model_len={self.max_model_len}, got {len(ids)} tokens; "
                "shorten it, or raise max_model_len or the memory of the pools"
            )
        if wrong := [i for i in ids if not 0 <= i < vocabulary]:
            raise ValueError(f"token ids must be 0 to {vocabulary - 1}, got {wrong[0]}; use this model's tokenizer")
        if wrong := [i for i in params.token_ids() if not 0 <= i < vocabulary]:
            raise ValueError(f"tokens in params must be 0 to {vocabulary - 1}, got {wrong[0]}; use this model's tokenizer")
        if (most := max(params.logprobs or 0, params.prompt_logprobs or 0)) > vocabulary:
            raise ValueError(f"logprobs must be at most the vocabulary's {vocabulary}, got {most}; ask for fewer")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, got none with this model; use stop_token_ids")
        if params.n > self.config.max_requests:
            raise ValueError(f"n must be at most max_requests={self.config.max_requests}, got {params.n}; ask in parts")

    def _fail(self, work: Tokens[Work], error: Exception) -> list[Chunk]:
        """A step could not be computed: its requests end, the others never notice."""
        self.runner.fail()
        chunks: list[Chunk] = []
        for request in dict.fromkeys(w.sequence.request for w in work):
            for chunk in self._end_with_error(request, f"a step failed: {type(error).__name__}: {error}"):
                self._tell(request, chunk)
                chunks.append(chunk)
        return chunks

    def _end_with_error(self, request: _Request, message: str) -> list[Chunk]:
        if request.request_id not in self._requests:
            return []
        request.error = message
        for sequence in request.samples:
            if sequence.finish_reason is None:
                self.scheduler.finish(sequence, "error")
        output = self._ended(request)
        return [Chunk(request.request_id, len(request.samples) - 1, [], "", "error", output=output)]

    def _arrived(self, work: Tokens[Work], results: dict[str, Any]) -> list[Chunk]:
        """Tokens of a step that has run, given to their requests."""
        now = time.perf_counter()
        tokens = results["tokens"].tolist() if "tokens" in results else []
        if isinstance(work, Decodes) and work.plain:
            return self._decoded(work, tokens, results, now)
        chunks: list[Chunk] = []
        row = prompt_row = round_row = 0
        accepted = results["accepted"].tolist() if "accepted" in results else []
        for w in work:
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
                    self._metrics.observe_round(w.drafts, count - 1)
                    if self._adaptive is not None:
                        self._adaptive.observe(w.drafts, count - 1)
                    request.metrics.drafted_tokens += w.drafts
                    request.metrics.accepted_tokens += count - 1
                chunk = self._add_tokens(request, sequence, tokens[row : row + count], results, row, now, w.drafts)
                if chunk is not None:
                    chunks += self._deliver(request, chunk)
            row += w.sampled
        if self._adaptive is not None:
            self._time_round(self._adaptive, work, now)
        return chunks

    def _time_round(self, length: DraftLength, work: Tokens[Work], now: float) -> None:
        """A round's time is that since the round before, if both are of as many requests with as many drafts each."""
        drafts = work[0].drafts
        this = (len(work), drafts) if all(w.ahead >= 0 and w.drafts == drafts for w in work) else None
        before, at = self._last_round
        if this is not None and this == before:
            length.took(*this, now - at)
        self._last_round = this, now

    def _decoded(self, work: Decodes, tokens: list[int], results: dict[str, Any], now: float) -> list[Chunk]:
        """Most tokens of a batch: one each, read by nobody yet. Those that end a sequence or fill a page go the long way."""
        lengths = work.starts + 2  # with the new one
        special = set(np.flatnonzero((lengths >= work.ends) | (lengths % self.config.page_size == 0)).tolist())
        if not work.stops.isdisjoint(tokens):
            special |= {row for row, token in enumerate(tokens) if token in work.stops}
        chunks: list[Chunk] = []
        for row, (sequence, token) in enumerate(zip(work.sequences, tokens, strict=True)):
            if sequence.finish_reason is not None:
                continue
            if row not in special:
                sequence.tokens.append(token)
                sequence.pending -= 1
                self._metrics.output_tokens += 1
                continue
            chunk = self._add_tokens(sequence.request, sequence, [token], results, row, now)
            if chunk is not None:
                chunks += self._deliver(sequence.request, chunk)
        return chunks

    def _begun(self, sequence: Sequence, now: float) -> None:
        metrics = sequence.request.metrics
        metrics.scheduled, metrics.cached_tokens = now, sequence.cached or 0
        self._metrics.prompt_tokens += metrics.prompt_tokens
        self._metrics.cached_tokens += metrics.cached_tokens

    def _add_tokens(
        self, request: _Request, sequence: Sequence, tokens: list[int], results: Any, row: int, now: float,
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
        self.scheduler.arrived(sequence, tokens, verified)
        self._metrics.output_tokens += len(tokens)
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

    def _deliver(self, request: _Request, chunk: Chunk) -> list[Chunk]:
        if all(sequence.finish_reason is not None for sequence in request.samples):
            chunk = replace(chunk, output=self._ended(request))
        error = self._tell(request, chunk)
        if not error:
            return [chunk]
        if chunk.output is None:
            return self._end_with_error(request, error)
        return [replace(chunk, finish_reason="error", output=replace(chunk.output, error=error))]  # it had ended anyway

    @staticmethod
    def _tell(request: _Request, chunk: Chunk) -> str:
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

    def _ended(self, request: _Request) -> RequestOutput:
        del self._requests[request.request_id]
        metrics = request.metrics
        metrics.finished = time.perf_counter()
        metrics.preemptions = sum(s.preemptions for s in request.samples)
        lengths = [len(s.tokens) - s.prompt_length for s in request.samples]
        metrics.output_tokens, metrics.longest_output = sum(lengths), max(lengths)
        self._metrics.requests += 1
        self._metrics.errors += bool(request.error)
        self._metrics.observe(metrics)
        wants_prompt = request.params.prompt_logprobs is not None
        output = RequestOutput(
            request.request_id, request.prompt, [self._sample(request, i) for i in range(len(request.samples))], metrics,
            list(request.prompt_logprobs) if wants_prompt else None, request.error,
        )  # fmt: skip
        if request.outputs is not None:
            request.outputs[request.request_id] = output
        return output

    def _sample(self, request: _Request, index: int) -> Sample:
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


class ChunkStream:
    """The chunks of one request, as an iterator. `close`, and the end of the last reference to it, abort the request."""

    def __init__(self, engine: Engine, request_id: str, chunks: "deque[Chunk]"):
        self.request_id, self._engine, self._chunks = request_id, engine, chunks

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while not self._chunks and self.request_id in self._engine._requests:
            self._engine.step()
        if not self._chunks:
            raise StopIteration
        return self._chunks.popleft()

    def close(self) -> None:
        """No more of it."""
        self._engine.abort(self.request_id)
        self._chunks.clear()

    def __del__(self) -> None:
        self.close()


def _logprobs(results: dict[str, Any], prefix: str, rows: range, tokens: Tokens[int], top: int) -> list[TokenLogprob]:
    chosen, ranks = results[f"{prefix}chosen"], results[f"{prefix}ranks"]
    values, ids = results[f"{prefix}top"], results[f"{prefix}top_ids"]
    return [
        TokenLogprob(token, float(chosen[row]), int(ranks[row]), dict(zip(ids[row, :top].tolist(), values[row, :top].tolist(),
                                                                          strict=True)))
        for row, token in zip(rows, tokens, strict=False)
    ]  # fmt: skip


def _refused(request_id: str, prompt: Any, message: str) -> RequestOutput:
    ids = list(prompt) if isinstance(prompt, (list, tuple)) and all(isinstance(i, int) for i in prompt) else []
    return RequestOutput(request_id, ids, [Sample([], "", "error")], RequestMetrics(), error=message)
