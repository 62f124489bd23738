"""Holds every kernel to the rule of dependent launches under Triton's interpreter. Started by test_dependent.py.

The interpreter runs kernel behind kernel, program behind program, so nothing goes wrong here. But each load and store says
where it goes, and each start and wait when it comes: whatever a dependent kernel touches before its wait must be constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from tests.ops.interpret import attempt  # isort: skip  (before all that imports Triton: it switches the interpreter on)

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

from gemma4_compile.ops import OPS, dependent
from gemma4_compile.ops.attention import attention
from gemma4_compile.ops.dependent import alone, constants, ready, start
from gemma4_compile.ops.examples import SMALL, example
from gemma4_compile.ops.fusions.attention_qkv import attention_qkv
from tests.ops.attention_cases import NEW_MIXES, raw, step
from tests.ops.dependent_cases import KEPT, weights_of

CHAINS = ("experts", "ple_tail", "ple_tail_norm", "norm_ple")  # ops of kernels that are dependent in any launch


class Watch:
    """What kernels do between their start and their wait. Tensors `given` are constant."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.ranges = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in given]
        self.waited = True
        self.dependent = False
        self.before: list[np.ndarray] | None = None  # what the kernel before it wrote; None for the first of the op
        self.written: list[np.ndarray] | None = None
        self.found: list[str] = []
        self.launches = 0
        self.kernel = ""

    def begin(self, kernel: str, dependent: bool) -> None:
        self.kernel, self.dependent = kernel, dependent
        self.before, self.written = self.written, []
        self.launches += dependent

    def begin_program(self) -> None:
        self.waited = not self.dependent

    def end(self) -> None:
        """Of a program."""
        if not self.waited:
            self.found.append(f"{self.kernel} has a program that never waits")
        self.waited = True

    def wait(self) -> None:
        self.waited = True

    def let_next_start(self) -> None:
        if not self.waited:
            self.found.append(f"{self.kernel} lets the next start before its wait")

    def load(self, addresses: np.ndarray) -> None:
        if self.waited:
            return
        constant = np.zeros(addresses.shape, dtype=bool)
        for begin, size in self.ranges:
            constant |= (addresses >= begin) & (addresses < begin + size)
        others = addresses[~constant]
        if others.size and (self.before is None or any(np.isin(others, written).any() for written in self.before)):
            self.found.append(f"{self.kernel} reads before its wait what is no constant")

    def store(self, addresses: np.ndarray) -> None:
        if not self.waited:
            self.found.append(f"{self.kernel} writes before its wait")
        assert self.written is not None
        self.written.append(np.unique(addresses))


watch = Watch([])


def _patched(name: str, of: str) -> None:
    """Have each access of a kind tell the watch."""
    plain = getattr(interpreter.InterpreterBuilder, name)

    def told(self: Any, *args: Any) -> Any:
        pointers, mask = {"load": (0, 1), "store": (0, 2), "rmw": (1, 3)}[of]
        addresses = args[pointers].data[np.broadcast_to(args[mask].data.astype(bool), args[pointers].data.shape)]
        (watch.load if of == "load" else watch.store)(addresses)
        return plain(self, *args)

    setattr(interpreter.InterpreterBuilder, name, told)


def _watched_launch(run: Callable) -> Callable:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.begin(self.fn.__name__, bool(kwargs.get("launch_pdl")))
        run(self, *args, **kwargs)
        watch.end()

    return call


def _watched_program(begin: Callable) -> Callable:
    def call(self: Any, *place: int) -> None:
        watch.end()
        watch.begin_program()
        begin(self, *place)

    return call


interpreter.GridExecutor.__call__ = _watched_launch(interpreter.GridExecutor.__call__)
interpreter.InterpreterBuilder.set_grid_idx = _watched_program(interpreter.InterpreterBuilder.set_grid_idx)
_patched("create_masked_load", "load")
_patched("create_masked_store", "store")
_patched("create_atomic_rmw", "rmw")
tl.extra.cuda.gdc_wait = lambda: watch.wait()
tl.extra.cuda.gdc_launch_dependents = lambda: watch.let_next_start()
dependent.supported = lambda: True  # type: ignore[assignment]


def check(launch: Callable[..., Any], args: Sequence[Any], weights: Sequence[Tensor], recorded: bool) -> int:
    """No kernel of the launch breaks the rule; how many kernels were dependent."""
    global watch
    watch = Watch(weights)
    with constants(weights) if recorded else nullcontext():
        launch(*args)
    assert not watch.found, sorted(set(watch.found))
    return watch.launches


def cases_of(name: str) -> Iterator[tuple[tuple, list[Tensor]]]:
    for tokens in (1, 6, 20):  # of each kind of plan
        args = example(name, SMALL, tokens, torch.bfloat16)
        yield args, [args[place] for place in weights_of(name, args)]


def keeps_the_rule(name: str) -> None:
    dependents = 0
    for args, weights in cases_of(name):
        dependents += check(OPS[name].launch, args, weights, recorded=True)
        if name in CHAINS:
            assert check(OPS[name].launch, args, weights, recorded=False)
        check(OPS[name].launch, args, [], recorded=True)  # weights that an earlier kernel may have computed
    assert dependents, "no kernel is dependent"


def attention_keeps_the_rule() -> None:
    made = step(NEW_MIXES["mixed"], heads=4, kv_heads=2, dtype=torch.bfloat16, padding=2, unwritten=0.0)
    assert check(attention.launch, made.fresh(), [], recorded=True) > 1
    assert check(attention_qkv.launch, raw(made, False), [], recorded=True) > 1


@triton.jit
def _bad_kernel(x_ptr, weight_ptr, out_ptr, WAY: tl.constexpr, DEPENDENT: tl.constexpr):
    if WAY == 0:  # reads its input first
        x = tl.load(x_ptr + tl.arange(0, 16))
        start(DEPENDENT)
        ready(DEPENDENT)
    elif WAY == 1:  # never waits
        x = tl.load(weight_ptr + tl.arange(0, 16))
    elif WAY == 2:  # returns before its wait
        start(DEPENDENT)
        if tl.program_id(0) == 1:
            return
        ready(DEPENDENT)
        x = tl.load(x_ptr + tl.arange(0, 16))
    elif WAY == 3:  # lets the next start before its wait
        tl.extra.cuda.gdc_launch_dependents()
        start(DEPENDENT)
        ready(DEPENDENT)
        x = tl.load(x_ptr + tl.arange(0, 16))
    else:  # writes before its wait
        start(DEPENDENT)
        x = tl.load(weight_ptr + tl.arange(0, 16))
        tl.store(out_ptr + tl.arange(0, 16), x)
        ready(DEPENDENT)
    tl.store(out_ptr + tl.arange(0, 16), x)


def is_found(way: int, message: str) -> None:
    """The watch sees a kernel that breaks the rule."""
    x, weight, out = torch.ones(16), torch.ones(16), torch.zeros(16)

    def launch() -> None:
        kind, options = alone(weight)
        _bad_kernel[(2,)](x, weight, out, way, kind, **options)

    try:
        check(launch, (), [weight], recorded=True)
    except AssertionError as error:
        assert message in str(error), error
    else:
        raise AssertionError("not found")


BAD = ("reads before its wait", "never waits", "never waits", "lets the next start", "writes before its wait")


def main() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for name in KEPT:
        attempt(name, partial(keeps_the_rule, name))
    attempt("attention", attention_keeps_the_rule)
    for way, message in enumerate(BAD):
        attempt(f"bad kernel {way}", partial(is_found, way, message))


if __name__ == "__main__":
    main()
