"""Engine(model): requests in, tokens out. Continuous batching over paged KV, on the compiled step."""

import itertools
import random
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from gemma4_compile.config import EngineConfig
from gemma4_compile.hf.watch import Watch
from gemma4_compile.ops.library import own_dtypes
from gemma4_compile.packed.inputs import bidirectional
from gemma4_compile.torchrun import RanksError

from .metrics import EngineMetrics, RequestMetrics
from .opening import assistant_of, model_of, stop_tokens
from .output_processor import OnChunk, OutputProcessor, Request
from .outputs import Chunk, RequestOutput, Sample
from .sampling_params import SamplingParams
from .scheduling.scheduler import Scheduler
from .scheduling.sequence import DecodeBatch, ScheduledChunk, Sequence
from .speculative.config import SpeculativeConfig
from .step import invariants
from .text import Prompt, TextStream, prompts_of
from .vision.blocks import whole_blocks
from .vision.reader import PromptReader
from .vision.source import vision_of
from .vision.spans import PreparedPrompt
from .worker.memory import MemoryReport
from .worker.model import PackedModel
from .worker.model_runner import Allowed, Launched, ModelRunner


class Engine:
    """Serves a Gemma-4 to many requests at a time.

    model        Gemma4ForCausalLM, the multimodal class (its text part is served), a checkpoint's folder or hub id. A model
                 that is not optimized yet is, in place
    config       EngineConfig
    tokenizer    of text prompts; None: the checkpoint's, if there is one
    processor    image processor, or a whole Gemma4Processor; None: the checkpoint's
    speculative  SpeculativeConfig: an assistant drafts tokens for it; None: nothing is drafted

    Requests that cannot be served end with an error and leave all others as they are. One thread at a time may call it.

    Under torchrun a checkpoint that the engine loads is divided between the ranks (tensor parallel), as is a model of
    `parallel.load`. All ranks make an engine together. Then rank 0, the driver, uses it as if it were alone, and the others
    call `run_worker`; or all call `generate`, where the driver's prompts count. `close` it, or use it in a `with`, so that the
    workers may go on.

    Raises ValueError for a checkpoint that cannot be loaded, a configuration that the model or the memory cannot hold.
    """

    def __init__(
        self, model: nn.Module | str | Path, config: EngineConfig | None = None, tokenizer: Any = None, *,
        processor: Any = None, speculative: SpeculativeConfig | None = None,
    ):  # fmt: skip
        self.config = config = config or EngineConfig()
        self._vision = vision_of(model, processor)
        self.model, self.tokenizer = model_of(model, config, tokenizer)
        if speculative is not None:
            speculative = replace(speculative, assistant=assistant_of(speculative.assistant, self.model))
        self.assistant: Any = None if speculative is None else speculative.assistant
        self._stop_tokens = frozenset(i for i in stop_tokens(self.model) if i < self.model.config.vocab_size)
        self.runner = ModelRunner(PackedModel(self.model), config, self._stop_tokens, speculative)
        self._draft_length = self.runner.draft_length
        adaptive = self._draft_length if self._draft_length is not None and self._draft_length.adaptive else None
        self.scheduler = Scheduler(
            self.runner.pages,
            config.max_batched_tokens,
            prefix_caching=config.prefix_caching,
            drafts=self.runner.speculative_tokens,
        )
        self.max_model_len = self.runner.max_model_len
        self._overlap = self.runner.on_gpu if config.overlap is None else config.overlap
        self._numbers = itertools.count()
        self._seeds = random.Random(config.seed)
        self._running: Launched | None = None
        self._waited = 0.0  # seconds, within this step
        self._metrics = EngineMetrics()
        self.outputs = OutputProcessor(self.scheduler, self.tokenizer, self._metrics, adaptive)
        self._ranks = self.runner.ranks
        self._reader = PromptReader(self.tokenizer, config, self._vision)
        if config.text_only is False:
            self._open_images()
        self._watch = self._watched()
        weakref.finalize(self, self.runner.close)
        if config.capture_at_start:
            shown = config.progress and self.runner.on_gpu and self.is_driver
            capturing = self._ranks.collective("capturing CUDA graphs", limited=False)
            with capturing, tqdm(self.runner.capture(), desc="CUDA graphs", disable=not shown) as bar:
                for name in bar:
                    bar.set_postfix_str(name)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The model's own end tokens."""
        return self._stop_tokens

    # Several ranks

    @property
    def is_driver(self) -> bool:
        """Whether requests are given to this rank: to rank 0 of those that the model is divided between."""
        return self._ranks.is_driver

    def run_worker(self) -> None:
        """On every rank but 0: run what rank 0 plans, until it closes its engine. Rank 0 returns at once.

        Raises RuntimeError if another rank is gone, or fails."""
        while not self.is_driver and self._run_worker() is not None:
            pass

    def close(self) -> None:
        """No more requests: the ranks that follow may go on, and give up their process group. Harmless twice, and without other
        ranks."""
        self.runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _run_worker(self) -> "list[RequestOutput] | str | None":
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
            with self._ranks.collective("a message to the other ranks"):
                self._ranks.broadcast("generated", found)

    # For those who want results

    def generate(
        self, prompts: Prompt | Tokens[Prompt], params: SamplingParams | Tokens[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Run prompts to their ends; outputs in the prompts' order.

        prompts  texts, lists, arrays or tensors of token ids, what a tokenizer gives, {"prompt": text}, {"prompt_token_ids":
                 ids}, or lists of messages; one alone gives a list of one. Images are parts of messages, as in
                 {"type": "image", "image": a PIL image, path, bytes or data URL}, or beside a prompt: {"prompt": text,
                 "images": [...]}; so are videos, {"type": "video", "video": [frames], "fps": 2.0}
        params   for all of them, or one for each; None is greedy

        A prompt that cannot be served gives an output with finish_reason "error", and a warning. Raises ValueError if prompts
        and params differ in number, TypeError for a mapping that is no prompt. Of several ranks all give rank 0's outputs;
        RuntimeError if that raises.
        """
        if not self.is_driver:
            followed = self._run_worker()
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
            prepared = self._reader.read_ahead(several)
            for index, (request_id, prompt, param) in enumerate(zip(ids, several, chosen, strict=True)):
                try:
                    self.add_request(next(prepared)(), param, request_id, stream=False)
                    self.outputs.requests[request_id].outputs = outputs
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

    # To drive it yourself

    def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """A prompt with images as tokens and patches, which `add_request` takes too. Opening pictures takes time: any thread
        may do it.

        Raises ValueError for a prompt, or an image, that can never be served."""
        return self._reader.read(prompt)

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
        if not self.is_driver:
            raise RuntimeError("requests must be given to rank 0, got one on another; call run_worker() there")
        params = params or SamplingParams()
        request_id = self._new_id() if request_id is None else request_id
        if request_id in self.outputs.requests:
            raise ValueError(f"a request_id must be new, got {request_id!r}, which runs; choose another")
        if torch.is_autocast_enabled(self.runner.device.type):
            raise ValueError(
                "an engine computes in its model's dtype, got autocast around it; leave it, or load the model in another dtype"
            )
        ids, images = self.prepare(prompt)
        self._check(ids, params)
        if not self.has_work:
            self._look_at_model()
        blocks: list[tuple[int, int]] = []
        if images:
            self._open_images()
            if bidirectional(self.model.config):
                blocks = whole_blocks(images, self.config.max_batched_tokens, self.runner.pages)
        seed = self._seeds.getrandbits(62) if params.seed is None else params.seed
        metrics = RequestMetrics(arrived=time.perf_counter(), prompt_tokens=len(ids))
        request = Request(request_id, ids, params, metrics, on_chunk, stream)
        limit = min(params.max_tokens or self.max_model_len, self.max_model_len - len(ids))
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._stop_tokens)
        plain = not (stream or params.stop or on_chunk) and params.logprobs is None and params.prompt_logprobs is None
        plain &= params.constraint is None
        for index in range(params.n):
            sequence = Sequence(
                next(self._numbers), list(ids), params, limit, (seed + index) % 2**63, request, stops, images=images,
                blocks=blocks,
            )  # fmt: skip
            sequence.plain = plain
            # Counts of tokens that a penalty needs would hold drafts too; a prompt's log probabilities have rows of their own.
            sequence.speculates = self.assistant is not None and not params.penalizes and params.prompt_logprobs is None
            if params.constraint is not None:
                sequence.constraint, sequence.speculates = params.constraint(), False
            text = None
            if self.tokenizer is not None and (stream or params.stop):
                text = TextStream(self.tokenizer, params.stop, params.skip_special_tokens)
            if index:  # the prompt's log probabilities are those of the first sample
                sequence.prompt_rows = len(ids)
            request.samples.append(sequence)
            request.texts.append(text)
            request.logprobs.append([])
            request.stop_reasons.append(None)
        self.outputs.requests[request_id] = request
        for sequence in request.samples:
            self.scheduler.add(sequence)
        return request_id

    def refresh(self) -> None:
        """Take in all changes of the model and the assistant, and reset the prefix cache.

        An engine looks for changes itself when a request comes while none runs: weights written in place or replaced, modules,
        hooks, attributes, config. It cannot see what is written through `.data`, or to inference tensors: call this then.

        Raises RuntimeError while requests run, ValueError for a change that it cannot follow; no request is served until it is
        undone."""
        if self.has_work:
            raise RuntimeError(f"requests must have ended, got {len(self.outputs.requests)} that run; abort them or step on")
        self.runner.refresh()
        self._watch = self._watched()

    def _watched(self) -> Watch:
        return Watch(self.model, *self.runner.beside)

    def _look_at_model(self) -> None:
        if not self._watch.is_unchanged():
            self.refresh()
        elif self._watch.was_written():
            self.runner.forget()

    def step(self) -> list[Chunk]:
        """Compute one step; returns what requests have got from it, or, where steps overlap, from the one before."""
        start, self._waited = time.perf_counter(), 0.0
        if self._draft_length is not None:
            self.scheduler.drafts = self._draft_length.choose(len(self.scheduler.running))
        scheduled = self.scheduler.schedule()
        launched: Launched | None = None
        chunks: list[Chunk] = []
        if scheduled:
            for w in () if isinstance(scheduled, DecodeBatch) else scheduled:
                if w.begins and w.sequence.request.metrics.scheduled is None:
                    self.outputs.begun(w.sequence, start)
            try:
                with own_dtypes():
                    launched = self.runner.launch(scheduled, self.scheduler.drafts, self._allowing(scheduled, chunks))
            except RanksError:
                raise
            except Exception as error:
                chunks += self._failed(scheduled, error)
            self._metrics.steps += 1
        if self._overlap:
            self._running, launched = launched, self._running
        if launched is not None:
            chunks += self._taken_in(launched)
        if invariants.enabled():
            self.scheduler.check()
        self._metrics.host_seconds += time.perf_counter() - start - self._waited
        return chunks

    def _taken_in(self, launched: Launched) -> list[Chunk]:
        """What requests get from a step, once it has run."""
        before = time.perf_counter()
        try:
            with self._ranks.collective():
                results = launched.fetched.wait()
        except RanksError:
            raise
        except Exception as error:  # of a kernel: it shows only when the host waits
            return self._failed(launched.scheduled, error)
        finally:
            self._waited += time.perf_counter() - before
        return self.outputs.arrived(launched.scheduled, results)

    def _allowing(self, scheduled: Tokens[ScheduledChunk], chunks: list[Chunk]) -> Callable[[], Allowed] | None:
        """What tells, while a step's model runs, which tokens its constrained sequences may get; None if it has none.

        They depend on the tokens of the step before, which is taken in for it: what requests get from that goes to `chunks`.
        """
        sequences = scheduled.sequences if isinstance(scheduled, DecodeBatch) else [w.sequence for w in scheduled]
        if all(sequence.constraint is None for sequence in sequences):
            return None

        def allowed() -> Allowed:
            before, self._running = self._running, None
            if before is not None:
                chunks.extend(self._taken_in(before))
            sampled = [w.sequence for w in scheduled for _ in range(w.sampled)]
            return self._allowed(sampled, chunks)

        return allowed

    def _allowed(self, sampled: list[Sequence], chunks: list[Chunk]) -> Allowed:
        """sampled  the sequence of each row"""
        rows = [row for row, sequence in enumerate(sampled) if sequence.constraint is not None]
        words = np.full((len(rows), -(-self.runner.vocabulary.size // 32)), -1, np.int32)
        for place, row in enumerate(rows):
            sequence = sampled[row]
            if sequence.finish_reason is None and sequence.constraint is not None:
                try:
                    sequence.constraint.fill(words[place])
                except Exception as error:
                    chunks.extend(self.outputs.end_with_error(sequence.request, f"its constraint failed: {error}"))
        return Allowed(rows=np.array(rows, np.int64), words=words)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, with what it has. None if it has ended already, or never was."""
        request = self.outputs.requests.get(request_id)
        if request is None:
            return None
        for sequence in request.samples:
            if sequence.finish_reason is None:
                self.scheduler.finish(sequence, "abort")
        return self.outputs.end(request)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.outputs.requests) or self._running is not None

    @property
    def metrics(self) -> EngineMetrics:
        """As of now; `.prometheus()` gives them as text."""
        found, pools = self._metrics, self.runner.pages.pools
        found.running, found.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        found.preemptions = self.scheduler.preemptions
        found.free_pages = {kind: pool.free for kind, pool in pools.items()}
        found.pages = {kind: pool.pages for kind, pool in pools.items()}
        return found

    @property
    def memory(self) -> MemoryReport:
        """A MemoryReport: weights, pools, what fits, and what the naive layout would hold."""
        return self.runner.memory

    # Within

    def _failed(self, scheduled: Tokens[ScheduledChunk], error: Exception) -> list[Chunk]:
        self.runner.fail()
        return self.outputs.failed(scheduled, error)

    def _new_id(self) -> str:
        return next(name for number in self._numbers if (name := f"request-{number}") not in self.outputs.requests)

    def _open_images(self) -> None:
        """Read and compile what images take, unless that was done."""
        if self.runner.images is not None:
            return
        if self._ranks.several and self.config.text_only is not False:
            raise ValueError("images on several ranks need text_only=False on all of them, got an engine without; make it so")
        if self._vision is None:
            raise ValueError("text_only=False needs a model with a vision part, got a model of text alone; leave it out")
        self.runner.open_images(self._vision.open(self.model))
        self._watch = self._watched()

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
        if params.constraint is not None and self._ranks.several:
            raise ValueError("a constraint needs a model on one rank, got several; ask without, or serve it from one GPU")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, got none with this model; use stop_token_ids")
        if params.n > self.config.max_requests:
            raise ValueError(f"n must be at most max_requests={self.config.max_requests}, got {params.n}; ask in parts")


class ChunkStream:
    """The chunks of one request, as an iterator. `close`, and the end of the last reference to it, abort the request."""

    def __init__(self, engine: Engine, request_id: str, chunks: "deque[Chunk]"):
        self.request_id, self._engine, self._chunks = request_id, engine, chunks

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while not self._chunks and self.request_id in self._engine.outputs.requests:
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


def _refused(request_id: str, prompt: Any, message: str) -> RequestOutput:
    ids = list(prompt) if isinstance(prompt, (list, tuple)) and all(isinstance(i, int) for i in prompt) else []
    return RequestOutput(request_id, ids, [Sample([], "", "error")], RequestMetrics(), error=message)
