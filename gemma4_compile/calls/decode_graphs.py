"""A decode step of Hugging Face's calls as one CUDA graph, by batch bucket.

A token for each sequence of one cache: all stand at the same place, so the graph counts positions and slots itself, from the
cache's length and from where its regions lie. A step copies tokens, positions and mask into static buffers, on the GPU, and
replays. Nothing of it waits.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from gemma4_compile.graphs.buckets import Buckets, fitting
from gemma4_compile.graphs.checks import difference
from gemma4_compile.graphs.recorder import Recorder
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.program import Program

from .kv_memory import PAGE, Lease, Slab

BATCHES = Buckets().decode
_NOWHERE = -(2**40)  # a base that no length makes a slot of


class _Graph:
    """One bucket of sequences over one slab."""

    def __init__(
        self, program: Program, slab: Slab, size: int, masked: bool, recorder: Recorder, clean: Callable[[Tensor], Tensor]
    ):
        self._program, self._recorder, self._clean, self.size, self.slab = program, recorder, clean, size, slab
        device = next(iter(slab.memory.values())).device
        width = max(pool.pages for pool in slab.pools.values())
        even = size + size % 2  # rows begin at 16 bytes: compiled pieces copy an input that does not
        with torch.inference_mode(False):
            self.length = torch.zeros((), dtype=torch.int64, device=device)
            self.base = torch.full((1 + len(KINDS), even), _NOWHERE, dtype=torch.int64, device=device)
            self.base[0] = 0
            self._moved = torch.zeros_like(self.base)
            starts = torch.arange(size + 1, dtype=torch.int32, device=device)
            self.given = torch.zeros((1, size), dtype=torch.int64, device=device)
            self.inputs = slab.memory | {
                "input_ids": self.given.clone(), "position_ids": torch.zeros(size, dtype=torch.int64, device=device),
                "positions": self._moved[0, :size], "rows": torch.arange(size, device=device), "starts": starts,
                "visible": torch.zeros((size, width * PAGE if masked else 0), dtype=torch.bool, device=device),
            }  # fmt: skip
            for row, kind in enumerate(KINDS, 1):
                self.inputs[f"slots.{kind}"] = self._moved[row, :size]
                self.inputs[f"table.{kind}"] = torch.zeros((size, width), dtype=torch.int32, device=device)
        self.width = width
        self._bound: tuple[weakref.ref[Lease] | None, int] = (None, -1)
        self._replay: Callable[[], None] | None = None
        self._logits: Tensor | None = None

    def bind(self, lease: Lease) -> None:
        """Point the graph at a cache's regions."""
        bound, version = self._bound
        if bound is not None and bound() is lease and version == lease.version:
            return
        self.base[1:] = _NOWHERE
        for row, kind in enumerate(KINDS, 1):
            if kind in lease.regions:
                self.base[row, : lease.batch] = lease.regions[kind].base()
                self.inputs[f"table.{kind}"][: lease.batch] = lease.regions[kind].table(self.width)
        torch.arange(self.size + 1, out=self.inputs["starts"]).clamp_(max=lease.batch)
        self._bound = weakref.ref(lease), lease.version

    def run(self) -> Tensor:
        """Logits [1, size, vocabulary], valid until another graph runs."""
        if self._replay is None:
            expected = self._step()[0].clone()  # as a warm-up: what it stores, the replay stores again
            self._recorder.warm_up(self._step)
            self._replay, (logits,) = self._recorder.record(self._step)
            self._logits = self._recorder.borrow(logits)
            self._replay()
            if wrong := difference(self._logits, expected):
                raise RuntimeError(f"a replay gave other logits than the program ({wrong})")
            return self._logits
        assert self._logits is not None
        self._replay()
        return self._logits

    def _step(self) -> list[Tensor]:
        torch.add(self.base, self.length, out=self._moved)
        self.inputs["input_ids"].copy_(self._clean(self.given))
        return [self._program.run_recorded(self.inputs).logits]


class DecodeGraphs:
    """The graphs of one program, by slab, bucket and whether there is a mask.

    clean    of token ids: those that the model embeds

    `refused` says why a bucket runs without a graph."""

    def __init__(self, program: Program, recorder: Recorder, clean: Callable[[Tensor], Tensor]):
        self._program, self._recorder, self._clean = program, recorder, clean
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self.refused: dict[tuple[int, bool], str] = {}
        self.replays = 0

    def forget(self, slabs: list[Slab]) -> None:
        """Drop the graphs of all slabs but these."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if graph.slab in slabs}

    def step(
        self, lease: Lease, ids: Tensor, position_ids: Tensor | None, visible: Tensor | None
    ) -> Tensor | None:  # fmt: skip
        """Logits [batch, 1, vocabulary] of one more token of each sequence, whose keys and values are stored; the caller's to
        keep. None where no graph holds it.

        ids           [batch, 1] int64
        position_ids  [batch, 1] int64; None: the place in the cache
        visible       [batch, length + 1]: which keys may be seen, not 0 where they may; None: all
        """
        size, masked = fitting(BATCHES, lease.batch), visible is not None
        if not size or (size, masked) in self.refused:
            return None
        key = (id(lease.slab), size, masked)
        graph = self._graphs.get(key)
        if graph is None:
            graph = _Graph(self._program, lease.slab, size, masked, self._recorder, self._clean)
            self._graphs[key] = graph
        graph.bind(lease)
        batch = lease.batch
        graph.length.fill_(lease.length)
        graph.given[0, :batch].copy_(ids[:, 0])
        if position_ids is None:
            graph.inputs["position_ids"].fill_(lease.length)
        else:
            graph.inputs["position_ids"][:batch].copy_(position_ids[:, 0])
        if visible is not None:
            graph.inputs["visible"][:batch, : lease.length + 1].copy_(visible)
        try:
            logits = graph.run()
        except RuntimeError as error:
            del self._graphs[key]
            self.refused[size, masked] = str(error).split("\n", 1)[0]
            warnings.warn(f"gemma4_compile decodes batches of {size} without a CUDA graph: {error}", stacklevel=2)
            return None
        self.replays += 1
        return logits[0, :batch, None].clone()
