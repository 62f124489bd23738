"""Programmatic dependent launch: kernels of a CUDA graph that start while the one before them still runs.

A decode step is a chain of some 400 kernels of a few microseconds each. Between two of them the GPU's memory idles: the first
drains, the second starts, computes addresses and waits for its first weights. A dependent kernel is there already, has read its
weights, and waits for the one before it. The layers of E2B, one request: 1819 us with plain launches, 1617 with dependent ones,
1552 with weights before the wait (one H200, CUDA graph; benchmarks/dependent-h200.json).

The rule that keeps it right:

1. In every program of a kernel that is launched dependently, also in those that return at once, `start(DEPENDENT)` comes first
   and `ready(DEPENDENT)` somewhere behind it; a kernel that reads nothing early needs `start` alone.
2. Between the two a kernel reads only what no kernel of the step writes, which its launcher names to `alone`, `first` or
   `behind`, and it writes nothing. A later kernel of an op may also read there what the op was given.
3. A kernel lets the next start behind its own wait. So when a kernel starts, all have ended but the one before it, and when it
   ends, all before it have: kernels of others, which are launched plainly, may stand anywhere in the chain.

That each lets the next start at once is right too, as long as all wait, but the chain then runs far ahead of itself, and what
waits is in the way of what works: 1663 us and more.

What no kernel of a step writes is known where a graph is captured: the weights of its program (`constants`). All other tensors,
copies of strided weights and weights that are computed in the graph (adapters, quantized weights) among them, are waited for.
Outside of such a capture only later kernels of one op are dependent: the first of them is launched plainly, so everything
before it has ended. tests/ops/test_dependent.py holds each kernel to the rule under Triton's interpreter, tests/gpu on a GPU.

Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, griddepcontrol.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .library import INTERPRETED, constant, jit, tl

# What a kernel's DEPENDENT may be.
PLAIN = constant(0)  # it waits for nothing, and lets none start early
WAIT = constant(1)  # it waits, then lets the next start
EARLY = constant(2)  # it reads constants, waits, then lets the next start


class Launch(NamedTuple):
    """A kernel's DEPENDENT, and options for its launch."""

    kind: int
    options: dict[str, bool]


# Rows up to which a step's products are kernels of ours. Beyond, cuBLAS' stand between, and it is no chain any more.
ROWS = 128
_PLAINLY, _DEPENDENTLY = dict[str, bool](), {"launch_pdl": True}
_PLAIN = Launch(int(PLAIN), _PLAINLY)
_LOCAL = threading.local()


@functools.cache
def supported() -> bool:
    """Hopper and newer."""
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@contextmanager
def constants(tensors: Iterable[Tensor]) -> Iterator[None]:
    """In this thread kernels are dependent, and these tensors are written by none of them.

    For what a CUDA graph holds, and for calls before a capture that compile its kernels: a graph begins when all that came
    before it has ended, which a plain call, right behind an optimizer's step for example, does not."""
    before = _known()
    _LOCAL.known = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)
    try:
        yield
    finally:
        _LOCAL.known = before


def _known() -> frozenset[int] | None:
    return getattr(_LOCAL, "known", None)


def alone(*weights: Tensor | None) -> Launch:
    """Of an op's only kernel, which reads `weights` before its wait; also of one whose followers are not dependent on it."""
    known = _known()
    if known is None or not supported():
        return _PLAIN
    return Launch(_kind(weights, known), _DEPENDENTLY)


def first(*weights: Tensor | None) -> Launch:
    """Of the first of several kernels of an op: launched plainly where no graph is captured, but the second may start early."""
    if not supported():
        return _PLAIN
    known = _known()
    return Launch(_kind(weights, known), _PLAINLY if known is None else _DEPENDENTLY)


def behind(*weights: Tensor | None) -> Launch:
    """Of a kernel behind another of its op."""
    return Launch(_kind(weights, _known()), _DEPENDENTLY) if supported() else _PLAIN


def _kind(weights: tuple[Tensor | None, ...], known: frozenset[int] | None) -> int:
    """EARLY if all weights are constant. known None: an op's first kernel is launched plainly, so what the op was given is
    complete. Strided weights are not: launchers copy them."""
    given = [weight for weight in weights if weight is not None]
    early = bool(given) and all(
        weight.is_contiguous() and (known is None or weight.untyped_storage().data_ptr() in known) for weight in given
    )
    return int(EARLY if early else WAIT)


@jit
def start(DEPENDENT: tl.constexpr):
    """The first thing that a kernel does. Behind it all that earlier kernels wrote may be read, unless it is EARLY."""
    if DEPENDENT == WAIT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit
def ready(DEPENDENT: tl.constexpr):
    """Behind it all that earlier kernels wrote may be read."""
    if DEPENDENT == EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
