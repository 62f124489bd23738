"""The device's side of an engine: memory of the pools, the compiled model, the sampler. Planned steps in, tokens out."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from gemma4_compile.config import EngineConfig
from gemma4_compile.graphs.buckets import Buckets
from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.graphs.recorder import CudaRecorder
from gemma4_compile.hf.parallel import local_part
from gemma4_compile.hf.vision import VisionPart
from gemma4_compile.ops import verify
from gemma4_compile.ops.attention import attention_kernels
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.program import StepResult
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.step_inputs import StepInputs
from gemma4_compile.runtime.scheduling.pages import KVPages
from gemma4_compile.runtime.scheduling.sequence import DecodeBatch, ScheduledChunk
from gemma4_compile.runtime.speculative.config import SpeculativeConfig
from gemma4_compile.runtime.speculative.drafter import Drafter, candidates_of
from gemma4_compile.runtime.speculative.length import DraftLength
from gemma4_compile.runtime.speculative.verification import Drafted, Drafts, propose, reject
from gemma4_compile.runtime.step import invariants
from gemma4_compile.runtime.step.arrays import ImagePart, build
from gemma4_compile.runtime.step.staging import Fetched, Staging
from gemma4_compile.runtime.vision.spans import Patches

from .capture import buckets_of, capture, capture_drafts, within
from .image_steps import ImageSteps
from .memory import MemoryReport, allocate, naive_token_bytes, token_bytes
from .model import PackedModel
from .ranks import Ranks
from .sampler import Counted, Sampled, Sampler, named_logprobs, only
from .sizing import Sizing, padding_step

# Fields of EngineConfig that decide what a rank runs.
_ALIKE = (
    "max_model_len", "max_requests", "max_batched_tokens", "page_size", "expected_tokens", "kv_dtype", "kv_bytes",
    "memory_fraction", "cuda_graphs", "capture_at_start",
)  # fmt: skip
_KV_DTYPES = {"fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class PlannedStep:
    """A step as every rank runs it. Nothing of it lies on a device.

    inputs      what the device is sent
    counted     rows that begin with penalties
    top         likeliest tokens that sampled rows want named, and `prompt_top` those of prompts; -1: no log probabilities
    thresholds  that rows use, of top_k, top_p and min_p
    drafts      that each request gets
    draws       whether they are drawn
    images      whose embeddings the step reads
    new_images  that are encoded before it
    """

    inputs: StepInputs[np.ndarray]
    counted: list[Counted]
    top: int
    prompt_top: int
    thresholds: frozenset[str]
    drafts: int
    draws: bool
    images: Sequence[ImagePart] = ()
    new_images: Sequence[Patches] = ()


class Allowed(TypedDict):
    """Which tokens the constrained rows of a step may get: rows [C] int64 of those that sample, words as of `sampler.only`."""

    rows: np.ndarray
    words: np.ndarray


@dataclass
class Launched:
    """A step that runs, or has run."""

    scheduled: Sequence[ScheduledChunk]
    fetched: Fetched


class _Agreed:
    """Drafts that are rank 0's on all ranks. A draft is the highest of numbers that no collective has made equal."""

    def __init__(self, drafter: Drafter, ranks: Ranks):
        self.drafter, self._ranks = drafter, ranks

    def draft_from(
        self, count: int, fill: Callable[[dict[str, Tensor]], None], drafts: int | None = None, draws: bool = False
    ) -> Drafted:  # fmt: skip
        """As of Drafts."""
        found = self.drafter.draft_from(count, fill, drafts, draws)
        return found._replace(tokens=self._ranks.from_driver(found.tokens))


class ModelRunner:
    """Runs planned steps of one model; where several ranks run it, all make one together.

    ranks          this process among them
    pages          the pools and page tables that steps are planned over
    max_model_len  tokens of the longest request
    memory         what the memory goes to
    drafter        drafts the tokens that a round verifies; None: nothing is drafted
    images         runs prompt steps with images, once `open_images` was called

    Raises ValueError if the memory does not hold a step, or not one request of the longest length.
    """

    def __init__(
        self, packed: PackedModel, config: EngineConfig, stop_tokens: Iterable[int],
        speculative: SpeculativeConfig | None = None,
    ):  # fmt: skip
        self.packed, self.config = packed, config
        self._assistant: Any = None if speculative is None else speculative.assistant
        self._by_block = speculative is not None and speculative.verification == "block"
        self.draft_length = None if speculative is None else DraftLength(speculative.tokens)
        self.speculative_tokens = 0 if self.draft_length is None else self.draft_length.most
        # Rows of a step that want logits at most, but for those of prompts.
        self._rows = min(config.max_requests * (1 + self.speculative_tokens), config.max_batched_tokens)
        self.ranks = Ranks(packed.division, config.step_timeout)
        self._closed = False
        alike: dict[str, Any] = {f"EngineConfig.{name}": getattr(config, name) for name in _ALIKE}
        fusions = [*config.optimize.enabled(), *(fusion.name for fusion in config.optimize.fusions)]
        alike |= {"fusions": sorted(fusions), "stop tokens": sorted(stop_tokens)}
        alike |= {"assistant": type(self._assistant), "speculative tokens": self.speculative_tokens}
        alike |= {"rejection sampling": self._by_block}
        self.ranks.check_equal(alike)
        with self.ranks.collective("making the engine", limited=False):
            self._make(packed, config, stop_tokens)

    def _make(self, packed: PackedModel, config: EngineConfig, stop_tokens: Iterable[int]) -> None:
        model = packed.model
        self.device: torch.device = model.device
        self._dtype: torch.dtype = model.dtype
        self.vocabulary = packed.vocabulary
        self._pad_token = int(model.config.pad_token_id or 0)
        self.on_gpu = self.device.type == "cuda"
        self._launched: torch.cuda.Event | None = None
        if self.ranks.several and self.on_gpu:
            self._launched = launched = torch.cuda.Event()
            self.ranks.in_flight = lambda: not launched.query()
        graphs = self.on_gpu if config.cuda_graphs is None else config.cuda_graphs
        if graphs and not self.on_gpu:
            raise ValueError(f"cuda_graphs=True needs a model on the GPU, got one on {self.device}; leave it out")
        self.kv_dtype = _KV_DTYPES.get(config.kv_dtype, model.dtype)
        self.staging = Staging(self.device)
        layers = {kind: packed.geometry.kv_owners(kind) for kind in KINDS}
        window = int(model.config.sliding_window or 0)
        self.windows = {kind: window if kind == "sliding_attention" else 0 for kind in KINDS if layers[kind]}

        self.owning = {kind: [layer.index for layer in found] for kind, found in layers.items()}

        # Before what is left is divided: scores of drafts can be as wide as the vocabulary.
        candidates, whole = candidates_of(self._assistant) if self._by_block else (0, False)
        self.state = RowState.empty(config.max_requests, self.speculative_tokens, self.device, candidates, whole)
        self.sizing = Sizing(packed, config, self.ranks, self.windows, self.kv_dtype, self._rows)
        steps = self.sizing.measure_step(graphs) if self.on_gpu else 0
        sizes = self.sizing.divide(self.sizing.kv_bytes(steps))
        self.max_model_len = sizes.longest
        self.pages = KVPages(
            sizes.pages, self.windows, config.page_size, config.max_requests, -(-sizes.longest // config.page_size)
        )
        self.memory = MemoryReport(
            weights=sum(t.untyped_storage().nbytes() for t in _unique(map(local_part, model.parameters()))),
            steps=steps, pools=sizes, page_size=config.page_size,
            token_bytes={kind: token_bytes(layers[kind], self.kv_dtype.itemsize) for kind in self.windows},
            naive_token_bytes=naive_token_bytes(packed.geometry, self.kv_dtype.itemsize),
        )  # fmt: skip
        self.kv = allocate(packed.geometry, sizes.pages, config.page_size, self.kv_dtype, self.device)
        self.sampler = Sampler(config.max_requests, self.vocabulary, self.state, stop_tokens)
        self._graphed = graphs
        self.images: ImageSteps | None = None
        self._compile()

    def open_images(self, part: VisionPart) -> None:
        """Prepare for prompts with images; on all ranks. Raises ValueError where their step does not compile."""
        self.images = ImageSteps(self.packed, part, self.kv, self.graphs, self.config.image_cache_bytes)

    def _compile(self) -> None:
        """What replays the program, and drafts, as the models are now."""
        packed, config, graphs = self.packed, self.config, self._graphed
        self.graphs: GraphRunner | None = None
        self.drafter: Drafts | None = None
        agree = self._agree if self.ranks.several else None
        if graphs:
            inputs = self._padding_step(1, 1, self._width)
            buckets = buckets_of(self._rows, config.max_batched_tokens, self.speculative_tokens)
            self.graphs = GraphRunner(
                packed.program, inputs | self.kv, config.max_requests, buckets, state=self.state,
                argmax=self.vocabulary.argmax, agree=agree,
            )  # fmt: skip
        if self._assistant is not None:
            drafted = within(Buckets().decode, config.max_requests) if graphs else ()
            self.drafter = Drafter(
                packed.model, self._assistant, self.speculative_tokens, self.kv, width=self._width, sizes=drafted,
                draws=self._by_block, agree=agree,
            )  # fmt: skip
            if self.ranks.several:
                self.drafter = _Agreed(self.drafter, self.ranks)
        if self.images is not None:
            self.images.compile(self.graphs)

    @property
    def _width(self) -> int:
        """Pages of a request at most."""
        return self.pages.tables[next(iter(self.windows))].shape[1]

    def refresh(self) -> None:
        """Take in the models as they are now, while nothing runs; what earlier requests left in pages is forgotten.

        Raises ValueError for a change that would take memory of other sizes, or does not compile."""
        model = self.packed.model
        if self.ranks.several:
            raise ValueError("a model that ranks share must stay as it was, got a change; make a new engine on all ranks")
        if (model.device, model.dtype) != (self.device, self._dtype):
            raise ValueError(
                f"the model must stay {self._dtype} on {self.device}, got {model.dtype} on {model.device}; make a new engine"
            )
        if self.packed.refresh() or self._assistant is not None or self.images is not None:
            self._compile()
        if self.images is not None:
            self.images.encoder.compile()
        self.pages.reset()

    @property
    def beside(self) -> list[Any]:
        """The models that run beside the text model: an assistant, a vision part."""
        return [m for m in (self._assistant, None if self.images is None else self.images.encoder.part) if m is not None]

    def forget(self) -> None:
        """Weights were written: what was computed with the old ones is not to be reused."""
        self.pages.reset()
        if self.images is not None:
            self.images.encoder.forget()

    def capture(self) -> Iterator[str]:
        """Capture all graphs; yields the name of each before it begins. Nothing to do without graphs."""
        if self.graphs is None:
            return
        shapes = self.attention_shapes()
        sizes = self._width, self.config.page_size, lambda *step: self._attention_kernels(shapes, *step)
        yield from capture(self.graphs, lambda *step: self._padding_step(*step) | self.kv, *sizes)
        if (drafter := self._own_drafter()) is not None and self.draft_length is not None:
            yield from capture_drafts(drafter, within(Buckets().decode, self.config.max_requests), self.draft_length)
        if (images := self.images) is not None and images.graphs is not None:
            yield from capture(images.graphs, lambda *step: images.without(self._padding_step(*step)) | self.kv, *sizes)
            yield from images.encoder.capture()
        yield "sampling"
        self._warm_sampling()

    @torch.no_grad()
    def _warm_sampling(self) -> None:
        """Compile the kernels that the first sampled request would wait for; they serve any number of rows."""
        assert self.graphs is not None
        logits = self.graphs(self._padding_step(1, 1, 1) | self.kv)[0]
        one = torch.ones(1, device=logits.device)
        none = torch.zeros(1, dtype=torch.int64, device=logits.device)
        shaping = one, none.int(), 0.5 * one, 0 * one, none
        self.vocabulary.sample(logits, *shaping, none)
        state = self.state
        if state.scores is not None:
            candidates = None if state.candidates is None else state.candidates[:1]
            verify(
                self.vocabulary.gather(logits), none, none, state.drafts[:1], state.scores[:1], candidates, *shaping, none, True
            )

    def _own_drafter(self) -> Drafter | None:
        """What drafts on this rank."""
        drafter = self.drafter.drafter if isinstance(self.drafter, _Agreed) else self.drafter
        return drafter if isinstance(drafter, Drafter) else None

    def attention_shapes(self) -> set[tuple[bool, tuple[int, int, int, int]]]:
        """Of all layers: whether wanted rows alone ask, as behind YOCO's boundary; KV heads, query heads of each, their size,
        window."""
        program = self.packed.program
        cut = any(step.op for step in program.steps[program.boundary :])
        return {
            (cut and layer.shares_kv, (layer.kv_heads, layer.heads // layer.kv_heads, layer.head_dim, self.windows[layer.kind]))
            for layer in self.packed.geometry.layers
        }

    def _attention_kernels(
        self, shapes: Iterable[tuple[bool, tuple[int, int, int, int]]], tokens: int, rows: int, requests: int
    ) -> Iterator[Hashable]:  # fmt: skip
        """Those of a step with so many tokens, wanted rows and requests."""
        most = self._width * self.config.page_size
        for few, shape in shapes:
            yield from attention_kernels(shape, most, self._dtype.itemsize, rows if few else tokens, requests)

    def _padding_step(self, tokens: int, rows: int, width: int, requests: int | None = None) -> dict[str, Tensor]:
        return padding_step(tokens, rows, width, self.config.page_size, self.device, requests)

    # Steps

    @torch.no_grad()
    def launch(
        self, scheduled: Sequence[ScheduledChunk], drafts: int | None = None, allowed: Callable[[], Allowed] | None = None
    ) -> Launched:  # fmt: skip
        """Start a planned step, which makes so many drafts of each request, K unless given. On a GPU this returns before it has
        run.

        allowed  called while the model runs, for the step's constrained rows; None: there are none
        """
        plan = self._plan(scheduled, drafts)  # an error here is this step's alone
        with self.ranks.collective():
            self.ranks.broadcast("step", plan)
            return Launched(scheduled, Fetched(self._run(plan, allowed)))

    def _plan(self, scheduled: Sequence[ScheduledChunk], drafts: int | None) -> PlannedStep:
        begun = () if isinstance(scheduled, DecodeBatch) else [self.sampler.begin(w) for w in scheduled if w.begins]
        inputs = build(scheduled, self.pages, self._pad_token)
        if invariants.enabled():
            invariants.check_step(scheduled, inputs, self.pages, self.vocabulary.size, self.owning)
        inputs = replace(inputs, sampling=self.sampler.sampling(scheduled, inputs))
        prompt_top = -1
        if inputs.prompts is not None:
            prompt_top = max(w.sequence.params.prompt_logprobs or 0 for w in scheduled if w.prompt)
        rows, speculation = inputs.targets, inputs.speculation
        parts, new = ([], []) if self.images is None else self.images.plan(scheduled)
        drawn = inputs.sampling is not None and inputs.sampling.shaping is not None
        return PlannedStep(
            inputs, [counted for counted in begun if counted is not None], self.sampler.top(rows), prompt_top,
            self.sampler.thresholds(rows) if self.ranks.several and drawn else frozenset(),
            self.speculative_tokens if drafts is None else drafts,
            draws=self.state.scores is not None and speculation is not None and self.sampler.draws(speculation.state_rows),
            images=parts, new_images=new,
        )  # fmt: skip

    @torch.no_grad()
    def run(self, plan: PlannedStep) -> None:
        """On another rank than 0: start a step that rank 0 has planned."""
        with self.ranks.collective():
            self._run(plan)

    def _run(self, plan: PlannedStep, allowed: Callable[[], Allowed] | None = None) -> dict[str, Tensor]:
        for counted in plan.counted:
            self.sampler.count(*counted)
        (logits, hidden), step, greedy = self._forward(plan)
        logits = logits[0]
        results: dict[str, Tensor] = {}
        if (prompts := step.prompts) is not None:
            wanted = logits[prompts.rows]
            results |= named_logprobs("prompt_", self.vocabulary, wanted, prompts.next_tokens, plan.prompt_top)
            logits = logits[prompts.sampled]
        if sampled := len(plan.inputs.targets):
            constrained = None if allowed is None else self.staging.send(dict(allowed()))
            results |= self._new_tokens(plan, step, logits[:sampled], hidden, greedy, constrained)
        if self._launched is not None:
            self._launched.record()
        return results

    def _forward(self, plan: PlannedStep) -> tuple[StepResult, StepInputs[Tensor], Tensor | None]:
        """Logits and states of the wanted rows; the step as the model saw it; and greedy tokens where a graph made them and
        they are in the state already."""
        planned = plan.inputs
        if plan.images and self.images is not None:
            step = self.state.resolve(self.staging.send(planned), self.config.page_size)
            return self.images.run(step, plan.images, plan.new_images), step, None
        if self.graphs is not None and len(planned.targets) == planned.positions.shape[0]:
            found = self.graphs.decode(planned)
            if found is not None:
                result, step = StepResult(found.logits, found.hidden), found.inputs
                if planned.sampling is None:
                    return result, step, found.tokens
                return result, replace(step, sampling=self.staging.send(planned.sampling)), None
        step = self.state.resolve(self.staging.send(planned), self.config.page_size)
        return (self.graphs or self.packed).run(step.model() | self.kv), step, None

    def _new_tokens(
        self, plan: PlannedStep, step: StepInputs[Tensor], logits: Tensor, hidden: Tensor, greedy: Tensor | None,
        constrained: dict[str, Tensor] | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Tokens [S] of these logits [S, shard], their log probabilities where asked for, and how many draft tokens of
        each request are accepted, [D], where there are any."""
        accepted: Tensor | None = None
        if greedy is not None and constrained is None:
            tokens = greedy
        else:
            shaped = logits if constrained is None else only(logits, **constrained, first=self.vocabulary.start)
            sampled = self.sampler(shaped, step, plan.thresholds)
            tokens = sampled.tokens
            if plan.draws:
                tokens, accepted = self._reject(sampled, step)
        found = {"tokens": tokens}
        if plan.top >= 0:
            found |= named_logprobs("", self.vocabulary, logits, tokens, plan.top)
        if self.drafter is not None and step.speculation is not None:
            found["accepted"] = propose(self.drafter, self.state, tokens, hidden, step, plan.drafts, accepted, plan.draws)
        return found

    def _reject(self, sampled: Sampled, step: StepInputs[Tensor]) -> tuple[Tensor, Tensor]:
        """Rejection sampling, on all ranks alike."""
        assert sampled.offsets is not None, "a step with drawn drafts says how tokens are sampled"
        tokens, accepted = reject(self.state, sampled.tokens, self.vocabulary.gather(sampled.logits), sampled.offsets, step)
        if self.ranks.several:  # decided by numbers with a fraction: one rank's word holds
            both = self.ranks.from_driver(torch.cat((tokens, accepted)))
            tokens, accepted = both.split((len(tokens), len(accepted)))
        return tokens, accepted

    def close(self) -> None:
        """No step will follow; on every rank. Harmless twice."""
        if self._closed or not self.ranks.several or self.ranks.failed:
            return
        self._closed = True
        owners = (self.graphs, self._own_drafter())
        with self.ranks.collective("the last step"):
            for recorder in {getattr(owner, "recorder", None) for owner in owners}:
                if isinstance(recorder, CudaRecorder):
                    recorder.close()
        self.ranks.close()

    def _agree(self, flag: bool) -> bool:
        return self.ranks.any_rank(flag, self.device)

    def fail(self) -> None:
        """A step did not run: nothing that it should have stored is to be reused."""
        self.pages.reset()


def _unique(tensors: Iterable[Any]) -> list[Any]:
    return list({t.untyped_storage().data_ptr(): t for t in tensors}.values())
