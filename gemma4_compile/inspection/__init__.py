"""inspect(model): what the compiler made of a step, from the line of the model to the kernel.

    step (what is run) -> capture (compile it, keep all) -> catalogue (which kernel computes what) -> timing (on a GPU)
      -> compare (with plain Inductor) -> tables, page, files

What comes after the catalogue reads `data` only.
"""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from gemma4_compile.config import OptimizeConfig
from gemma4_compile.hf.vision import tower_of
from gemma4_compile.optimized import check_model, compiled_part, existing_state
from gemma4_compile.passes import FUSIONS, SWITCHES, Record, Site, pipeline, prepare
from gemma4_compile.reporting import unmatched_sites
from gemma4_compile.vision.encoder import fusions_in

from .capture import CompiledGraph
from .catalogue import layers_of
from .compare import fusions
from .data import Inspection, PassRow, Unmatched
from .files import changed_lines, check_folder, whole_or_nothing, write
from .run import run_variant
from .step import IMAGES, inspected_part

__all__ = ["Inspection", "inspect"]

OURS, PLAIN = "gemma4-compile", "plain"


def inspect(
    model: nn.Module,
    example_inputs: Any = None,
    out: str | Path | None = None,
    *,
    step: str = "decode",
    batch: int = 1,
    context: int | None = None,
    static_cache: bool = True,
    compare: str | None = None,
    config: OptimizeConfig | None = None,
    force: bool = False,
    name: str = "",
) -> Inspection:
    """Compile one step of a Gemma-4 with the caches off and say what became of it.

    model            plain or optimized, and left as it is; an optimized one is inspected with its own config
    example_inputs   token ids [batch, tokens] int64, or the keyword arguments of a call of the text part; None: the step that
                     `step`, `batch`, `context` and `static_cache` describe, on random tokens and random keys and values. Each
                     call gets a copy of the cache
    step             "decode", "prefill", or "images": the encoder of the vision tower in Hugging Face's own calls
    batch            sequences, or images
    context          tokens that are cached, of the prefill, or that each image becomes; None: 1024, of an image 280
    out              folder for report.html, inspection.json, catalogue.txt, graphs/, inductor/, depyf/ and, from a GPU, the
                     traces for Perfetto; None writes nothing
    compare          "plain" compiles and measures the same step without our passes too
    config           for a model that is not optimized; OptimizeConfig() unless given
    force            replace what an earlier inspection left in `out`; other files there stay
    name             what the report calls the model

    Raises TypeError for another model; ValueError for what optimize() refuses, images without a vision tower, a folder that is
    not empty or not writable, a value out of range, a step that did not compile, or one that is no single graph. Nothing is
    left in `out` then.
    """
    if compare not in (None, PLAIN):
        raise ValueError(f'compare must be "plain" or None, got {compare!r}; leave it out')
    target = inspected_part(model, step)
    if step == IMAGES and example_inputs is not None:
        raise ValueError(f"step={IMAGES!r} makes its own images, got example_inputs; give batch and context instead")
    text = compiled_part(model)
    state = existing_state(text)
    if state is not None and config not in (None, state.backend.config):
        raise ValueError("an optimized model is inspected with its own config, got another; leave it out, or restore(model)")
    config = state.backend.config if state else config or OptimizeConfig()
    enabled = fusions_in(target.config, state.backend.enabled if state else config.enabled())
    config = dataclasses.replace(config, cuda_graphs=False)  # a replayed graph is one launch: nothing to tell its kernels by
    check_model(text, config)
    device = next(target.parameters()).device
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        check_folder(folder, force)
    prepare(config.fusions)

    described = {"kind": step, "batch": batch, "context": context, "static_cache": static_cache}
    steps = {OURS: pipeline(enabled, config.fusions)} | ({PLAIN: ()} if compare else {})
    with whole_or_nothing(folder) if folder else nullcontext() as draft:
        runs = {
            variant: run_variant(
                variant, target, config, enabled if variant == OURS else frozenset(), passes, example_inputs, described, draft
            )
            for variant, passes in steps.items()
        }
        ours, plain = runs[OURS], runs.get(PLAIN)
        on_gpu = ours.variant.busy_microseconds is not None
        found = Inspection(
            model=name or type(model).__name__,
            step=ours.description,
            device=torch.cuda.get_device_name(device) if on_gpu else device.type,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
            layers=layers_of(ours.geometry),
            passes=_passes(
                ours.graph, {name: SWITCHES[name].sites(ours.geometry) for name in enabled if not SWITCHES[name].packed}
            ),
            ours=ours.variant,
            plain=plain.variant if plain else None,
            fusions=fusions(ours.graph.record, _in_order(enabled), plain.variant.kernels, ours.variant.kernels)
            if plain
            else (),
            notes=tuple(_notes(on_gpu, plain is not None, step != IMAGES and tower_of(model) is not None, ours.notes)),
        )
        if draft is not None:
            write(draft, found, {variant: run.graph for variant, run in runs.items()}, ours.decompiled)
    return found


def _in_order(enabled: frozenset[str]) -> list[str]:
    return [name for name in FUSIONS if name in enabled]


def _passes(graph: CompiledGraph, expected: dict[str, tuple[str, ...]]) -> tuple[PassRow, ...]:
    stages = dict(graph.stages)
    names = list(stages)
    return tuple(
        PassRow(
            name=name,
            milliseconds=seconds * 1e3,
            expected=len(expected[name]) if name in expected else None,
            matched=len(sites := [site for site in graph.record.matched(name) if _is_promised(site)]),
            left=sum(bool(site.left) for site in sites),
            changed_lines=changed_lines(stages[names[names.index(name) - 1]], stages[name]),
            unmatched=_unmatched(graph.record, name, expected.get(name)),
        )
        for name, seconds in graph.record.seconds.items()
    )


def _is_promised(site: Site) -> bool:
    return site.fusion not in SWITCHES or SWITCHES[site.fusion].promised(site.path)


def _unmatched(record: Record, name: str, sites: tuple[str, ...] | None) -> tuple[Unmatched, ...]:
    """The sites that a fusion was expected at. A step that promises none lists where its pattern fitted and the guard objected:
    parts of a pattern, such as an addition, are found everywhere."""
    if sites is not None:
        return tuple(Unmatched(one.site, one.reason, one.pattern) for one in unmatched_sites(record, SWITCHES[name], sites))
    refused = [miss for miss in record.misses if miss.fusion == name and miss.missing < 0]
    return tuple(Unmatched(miss.path, miss.reason, miss.source) for miss in refused)


def _notes(on_gpu: bool, compared: bool, more: bool, own: tuple[str, ...]) -> list[str]:
    notes = list(own)
    if not on_gpu:
        notes.append("Without a GPU each call counts as one kernel, and our ops run as CPU references: no times are given.")
    if more:
        notes.append(f"The vision tower has a graph of its own: step={IMAGES!r} (--step {IMAGES}) shows it.")
    if compared:
        notes.append(
            "Plain is the same step, with the same cache handling, through Inductor without our passes. A kernel counts for a "
            "fusion if it computes nothing else; the rows of the fusions add up to both graphs."
        )
    return notes
