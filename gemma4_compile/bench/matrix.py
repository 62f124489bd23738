"""One call of the bench: each model, with and without drafts, on each workload and arrivals, beside its peers."""

import gc
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gemma4_compile.config import EngineConfig
from gemma4_compile.optimized import optimize, restore
from gemma4_compile.runtime.engine import Engine
from gemma4_compile.runtime.speculative.config import SpeculativeConfig

from . import at_url, hugging_face, in_process, vllm
from .acceptance import forced
from .floor import Rates, floor
from .records import Row
from .timings import Timing, summary
from .workloads import Arrivals, Workload, cut_prompts, random_prompts

PEERS = ("hf-eager", "hf-compile", "optimize", "vllm")
_WARM_UP = 128  # new tokens: by then each graph that the workload uses is captured


@dataclass(frozen=True)
class Subject:
    """What is measured.

    name       for the rows
    model      plain, a Gemma4ForCausalLM; an Engine optimizes it in place
    folder     of its checkpoint; None: random weights
    texts      token ids to cut prompts from; None: random ones
    assistant  drafts for it; None: it has none
    """

    name: str
    model: Any
    folder: Path | None = None
    texts: Sequence[list[int]] | None = None
    assistant: Any = None

    def prompts(self, load: Workload, seed: int) -> list[list[int]]:
        """Others for each seed, as far as there are texts."""
        if self.texts is None:
            return random_prompts(load, self.model.config.vocab_size, seed)
        return cut_prompts(random.Random(seed).sample(self.texts, len(self.texts)), load)


@dataclass(frozen=True)
class Plan:
    """What is run of each subject.

    mtp         "off", "on", or tokens a round to force
    drafts      of a round
    against     of PEERS
    repeats     runs, of which the one of median seconds is reported
    agreement   requests whose tokens plain Hugging Face judges; 0: none
    config      of engines; lengths and requests are set by the workloads
    vllm        command that starts its server
    """

    workloads: tuple[Workload, ...]
    arrivals: tuple[Arrivals, ...] = (Arrivals(),)
    mtp: tuple[str, ...] = ("off",)
    drafts: int = 3
    against: tuple[str, ...] = ()
    repeats: int = 1
    agreement: int = 0
    config: EngineConfig = EngineConfig()
    vllm: str = "vllm serve"

    def __post_init__(self) -> None:
        if wrong := [peer for peer in self.against if peer not in PEERS]:
            raise ValueError(f"--against must name {', '.join(PEERS)}, got {wrong[0]!r}; choose one of them")

    @property
    def cases(self) -> list[tuple[Workload, Arrivals]]:
        return [(load, arrivals) for load in self.workloads for arrivals in self.arrivals]

    @property
    def longest(self) -> int:
        return max(load.longest for load in self.workloads)

    def at_a_time(self, load: Workload, arrivals: Arrivals) -> int:
        return min(load.requests, arrivals.concurrency or load.requests)


def measure(subject: Subject, plan: Plan) -> Iterator[Row]:
    """Rows as they are found: peers on the plain model first, then ours, whose tokens the plain model judges."""
    for peer in plan.against:
        yield from _peer(subject, plan, peer)
    if subject.assistant is None and any(mtp != "off" for mtp in plan.mtp):
        raise ValueError(f"MTP needs an assistant, got none for {subject.name}; give --assistant, or --mtp off")
    for mtp in plan.mtp:
        yield from _ours(subject, plan, mtp)


def measure_url(url: str, name: str, vocabulary: int, plan: Plan, key: str | None = None) -> Iterator[Row]:
    """Rows of a server, with random prompts."""

    def run(load: Workload, arrivals: Arrivals, wanted: int, seed: int) -> list[Timing]:
        return at_url.run(url, name, random_prompts(load, vocabulary, seed), wanted, arrivals, seed, key)

    yield from _rows(plan, run, lambda load, arrivals: Row("url", name, "", str(load), str(arrivals), _NOTHING))


_Run = Callable[[Workload, Arrivals, int, int], list[Timing]]
_NOTHING: Any = None  # a summary that is filled in


def _rows(plan: Plan, run: _Run, row: Callable[[Workload, Arrivals], Row]) -> Iterator[Row]:
    for load, arrivals in plan.cases:
        run(load, replace(arrivals, rate=None), min(load.wanted, _WARM_UP), 1)
        runs = [summary(run(load, arrivals, load.wanted, 2 + i), load.given) for i in range(plan.repeats)]
        yield replace(row(load, arrivals), summary=sorted(runs, key=lambda found: found.seconds)[len(runs) // 2])


def _peer(subject: Subject, plan: Plan, peer: str) -> Iterator[Row]:
    with ExitStack() as stack:
        if peer == "optimize":
            optimize(subject.model, plan.config.optimize)
            stack.callback(restore, subject.model)
        if peer == "vllm":
            dummy = subject.folder is None
            folder = subject.folder or vllm.config_folder(
                subject.model.config, Path(stack.enter_context(tempfile.TemporaryDirectory()))
            )
            most = max(plan.at_a_time(*case) for case in plan.cases)
            url, name = stack.enter_context(vllm.served(folder, plan.vllm, plan.longest + 1, most, dummy))

        def run(load: Workload, arrivals: Arrivals, wanted: int, seed: int) -> list[Timing]:
            prompts = subject.prompts(load, seed)
            if peer == "vllm":
                return at_url.run(url, name, prompts, wanted, arrivals, seed)
            return hugging_face.run(subject.model, prompts, wanted, arrivals, compiled=peer == "hf-compile")

        yield from _rows(plan, run, lambda load, arrivals: Row(peer, subject.name, "off", str(load), str(arrivals), _NOTHING))


def _ours(subject: Subject, plan: Plan, mtp: str) -> Iterator[Row]:
    judged = list(_on_engine(subject, plan, mtp))  # in a function of its own: the engine's memory is free behind it
    restore(subject.model)
    gc.collect()
    torch.cuda.empty_cache()
    for row, prompts, timings in judged:
        honest = mtp in ("off", "on") and plan.agreement
        yield replace(row, agreement=hugging_face.agreement(subject.model, prompts, timings)) if honest else row


def _on_engine(subject: Subject, plan: Plan, mtp: str) -> Iterator[tuple[Row, list[list[int]], list[Timing]]]:
    """Rows, each with prompts and what came of them, for plain Hugging Face to judge."""
    forcing = forced(float(mtp), plan.drafts) if mtp not in ("off", "on") else nullcontext()
    speculative = None if mtp == "off" else SpeculativeConfig(subject.assistant, plan.drafts)
    most = max(plan.at_a_time(*case) for case in plan.cases)
    config = replace(plan.config, max_model_len=plan.longest + 1, expected_tokens=plan.longest, max_requests=most)
    with forcing, Engine(subject.model, config, speculative=speculative) as engine:
        if not engine.is_driver:
            engine.run_worker()
            return
        rates = Rates.measured(subject.model.dtype) if engine.runner.on_gpu else None
        last: list[tuple[list[list[int]], list[Timing], _Counts]] = []

        def run(load: Workload, arrivals: Arrivals, wanted: int, seed: int) -> list[Timing]:
            prompts, before = subject.prompts(load, seed), _Counts.of(engine)
            timings = in_process.run(engine, prompts, wanted, arrivals, seed)
            last[:] = [(prompts[: plan.agreement], timings[: plan.agreement], _Counts.of(engine).since(before))]
            return timings

        def row(load: Workload, arrivals: Arrivals) -> Row:
            least = None  # a small model lies in a CPU's caches, and of a divided one this rank has a part: no floor of those
            if rates is not None and not engine.runner.ranks.several and arrivals.rate is None and mtp == "off":
                least = floor(subject.model, load, plan.at_a_time(load, arrivals), rates, engine.runner.kv_dtype.itemsize).total
            counts = last[0][2]
            return Row(
                "ours", subject.name, mtp, str(load), str(arrivals), _NOTHING, least, counts.tokens_a_round,
                counts.acceptance, memory=_memory(engine), host_ms=1e3 * counts.host_seconds / max(counts.steps, 1),
            )  # fmt: skip

        for found in _rows(plan, run, row):
            yield found, *last[0][:2]


class _Counts(NamedTuple):
    """An engine's rounds and drafts, its steps and what the host worked on them."""

    rounds: float
    drafted: float
    accepted: float
    steps: float
    host_seconds: float

    @classmethod
    def of(cls, engine: Engine) -> "_Counts":
        metrics = engine.metrics
        return cls(
            metrics.draft_tokens_at.get(1, 0), metrics.draft_tokens, metrics.accepted_draft_tokens, metrics.steps,
            metrics.host_seconds,
        )  # fmt: skip

    def since(self, before: "_Counts") -> "_Counts":
        return _Counts(*(now - then for now, then in zip(self, before, strict=True)))

    @property
    def tokens_a_round(self) -> float | None:
        return 1 + self.accepted / self.rounds if self.rounds else None

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None


def _memory(engine: Engine) -> dict[str, int]:
    """Bytes of weights, of pools, and of what steps need beside on a GPU."""
    pools = sum(tensor.nbytes for tensor in engine.runner.kv.values())
    return {"weights": engine.memory.weights, "pools": pools, "steps": engine.memory.steps}
