"""One variant of an inspection: compile the step, read its catalogue, time it where there is a GPU."""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch._dynamo.exc import Unsupported

from gemma4_compile.backend import Backend
from gemma4_compile.config import OptimizeConfig
from gemma4_compile.geometry import Geometry
from gemma4_compile.hf.families import CAUSAL, TEXT
from gemma4_compile.optimized import CompiledModel
from gemma4_compile.passes import Pass
from gemma4_compile.vision.encoder import EncoderCalls

from . import timing
from .capture import CompiledGraph, Recorder, short_path
from .catalogue import catalogue
from .data import Variant
from .step import default_step, given_step


@dataclass(frozen=True)
class Run:
    """What one variant gave: the data, and what the files need besides.

    decompiled    file name -> Dynamo's bytecode for the step as Python, by depyf
    """

    variant: Variant
    graph: CompiledGraph
    geometry: Geometry
    description: str
    decompiled: dict[str, str]
    notes: tuple[str, ...]


def compile_part(part: Any, backend: Backend) -> CompiledModel | EncoderCalls:
    """A part of a model as optimize() compiles it, but that what does not compile is an error.

    part   that of inspected_part"""
    if not isinstance(part, (*CAUSAL, *TEXT)):
        encoder = EncoderCalls(part, backend)
        encoder.falls_back = False
        return encoder
    compiled = CompiledModel(part, backend)
    compiled.whole.falls_back = False
    return compiled


def run_variant(
    name: str,
    target: Any,
    config: OptimizeConfig,
    enabled: frozenset[str],
    passes: Sequence[Pass],
    example_inputs: Any,
    described: dict[str, Any],
    draft: Path | None,
) -> Run:
    """Compile and measure the step with these passes.

    target       that of inspected_part
    described    arguments of default_step, used where example_inputs is None
    draft        folder for the trace; None: no trace

    Raises ValueError for a step that did not compile or is no single graph.
    """
    recorder = Recorder(config, enabled, steps=passes)
    compiled = compile_part(target, recorder)
    step = default_step(target, compiled.geometry, **described) if example_inputs is None else given_step(example_inputs)

    def call(inputs: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return compiled(**inputs)

    start = time.perf_counter()
    with _decompiling() as (decompiled, notes), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a call ran uncompiled is an error here
        try:
            call(step.inputs())
        except Unsupported as error:
            raise ValueError(_graph_break(error)) from error
    seconds = time.perf_counter() - start
    if compiled.eager_reason or not recorder.graphs:
        reason = compiled.eager_reason or "the model was called inside another compilation"
        raise ValueError(f"the step must compile, but it ran as Hugging Face wrote it: {reason}; use another kind of cache")
    graph = recorder.graphs[0]
    kernels = catalogue(graph, compiled.geometry)
    measured = None
    device = next(target.parameters()).device
    if device.type == "cuda":
        trace = None if draft is None else draft / ("trace_plain.json" if name == "plain" else "trace.json")
        with torch.cuda.device(device):
            measured = timing.measure(step.inputs, call, kernels, trace)
        if len(recorder.graphs) > 1:
            raise ValueError(
                "the step must compile to the same graph each time, got another one when it was repeated; use another step"
            )
    variant = Variant(
        name,
        measured.kernels if measured else kernels,
        measured.outside if measured else (),
        seconds,
        measured.busy_microseconds if measured else None,
        measured.wall_microseconds if measured else None,
    )
    if isinstance(compiled, EncoderCalls) and compiled.note:
        notes.append(f"Of the vision tower: {compiled.note}.")
    return Run(variant, graph, compiled.geometry, step.description, decompiled, tuple(notes))


def _graph_break(error: Unsupported) -> str:
    """Dynamo's reason and the user's line of it, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    frames = getattr(error, "real_stack", None) or ()
    where = f" at {short_path(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"the model must compile to one graph, but Dynamo stops{where}: {reason}; remove what it cannot trace there"


@contextmanager
def _decompiling() -> Iterator[tuple[dict[str, str], list[str]]]:
    """Collects what Dynamo compiles, as Python. Only looks: depyf's own prepare_debug would run the decompiled code instead."""
    texts: dict[str, str] = {}
    notes: list[str] = []
    try:
        import depyf
    except ImportError as error:
        notes.append(f"depyf/ is empty: {error}.")
        yield texts, notes
        return

    def look(code: CodeType, new_code: CodeType) -> None:
        try:
            texts[f"{code.co_name}.py"] = depyf.decompile(new_code)
        except Exception as error:  # a bytecode that depyf does not know must not stop the inspection
            notes.append(f"depyf could not decompile {code.co_name}: {error!r}.")

    hook = torch._dynamo.convert_frame.register_bytecode_hook(look)
    try:
        yield texts, notes
    finally:
        hook.remove()
