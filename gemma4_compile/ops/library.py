"""The `gemma4` operator library: registration, the shape check, and what the kernels share.

It knows no fusion: each file beside it owns one family of ops and registers it here. Triton is optional: without it the
CPU references and the fakes still register, and a CUDA call says what is missing.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:  # CPU-only installs and platforms without Triton wheels
    triton = tl = None

    def jit(kernel: Callable | None = None, **_: Any) -> Any:
        return kernel if kernel is not None else jit


P = ParamSpec("P")
R = TypeVar("R")


def constant(value: Any) -> Any:
    """A number as kernels read it from their module: other globals are refused."""
    return value if tl is None else tl.constexpr(value)


_LOCAL = threading.local()


@contextmanager
def without_products() -> Iterator[None]:
    """In this thread, cuBLAS' products are left out and their results are anything: for those who call an op to have its
    kernels compiled. Each thread that calls cuBLAS keeps 32 MB of workspace, and giving those back takes them from CUDA graphs
    too."""
    _LOCAL.without_products = True
    try:
        yield
    finally:
        _LOCAL.without_products = False


def product(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear, for launchers."""
    if getattr(_LOCAL, "without_products", False):
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    return F.linear(x, weight)


def own_dtypes() -> AbstractContextManager[Any]:
    """An op computes in the dtypes of its inputs, as its fake says, also where its caller's operations are autocast."""
    return torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else nullcontext()


class Op(Generic[P, R]):
    """One registered op. A call runs torch.ops.gemma4.<name>: by the tensors' device the reference or the kernels.

    reference  what it computes, in PyTorch, rounding where the kernels round
    launch     the same by its kernels, which run under TRITON_INTERPRET=1 too; some take options by keyword
    check      what both begin with: raises ValueError for arguments that do not fit
    example    draws arguments (examples.py); None: the op is not in OPS
    """

    def __init__(
        self,
        function: Callable[P, R],
        launch: Callable[..., Any],
        check: Callable[..., None] | None,
        example: Callable[[Any], tuple[Any, ...]] | None,
    ) -> None:
        functools.update_wrapper(self, function)  # docstring and signature
        self.name: str = function.__name__
        self.places = {name: i for i, name in enumerate(inspect.signature(function).parameters)}
        self.example = example
        self._check = check
        wanted = inspect.signature(check).parameters if check else {}
        every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
        self._checked = {name: i for name, i in self.places.items() if every or name in wanted}
        self.reference: Callable[P, R] = self.checked(function)
        self.launch: Callable[..., R] = self.checked(launch)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return getattr(torch.ops.gemma4, self.name)(*args, **kwargs)

    def check(self, *args: Any) -> None:
        if self._check:
            # PyTorch's dispatcher leaves out arguments at the end that equal their defaults.
            self._check(self.name, **{name: args[i] for name, i in self._checked.items() if i < len(args)})

    def checked(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The same behind the op's check; itself if there is none."""
        if self._check is None:
            return run

        @functools.wraps(run)
        def call(*args: Any, **options: Any) -> Any:
            self.check(*args)
            return run(*args, **options)

        return call


# Those with an example. They compute on their arguments alone: tests and benchmarks treat them all alike.
OPS: dict[str, Op[Any, Any]] = {}
_DEFINED: list[str] = []
# A fragment: other parts of the package define their own ops in the same namespace.
LIBRARY = torch.library.Library("gemma4", "FRAGMENT")
# ptxas may contract the rounded product of a rope or an embedding with the sum after it into one fma, which does not
# round between them: on an H200 23% of bf16 outputs then differed from the unfused graph. With this, none.
UNFUSED = {"enable_fp_fusion": False}
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def op(
    *,
    launch: Callable[..., Any],
    like: str | tuple[str, ...] = (),
    fake: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    example: Callable[[Any], tuple[Any, ...]] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make a reference the op of its name, with the schema of its signature.

    launch   the op's arguments -> its results, by its kernels
    like     the argument, or for several results the arguments, whose shape, dtype and device each result has
    fake     the op's arguments -> results, of which only shapes, dtypes and devices count, where `like` cannot say them;
             neither: the reference. Passes call fakes at hundreds of sites: one should cost no more than its results
    check    raises ValueError for arguments that do not fit; runs before reference, launch and fake. It is given the op's name
             and, by their names, those of the op's arguments that it has too, or all of them if it takes **others
    example  a Draw of examples.py -> arguments; ops with an example are listed in OPS
    mutates  arguments that are written
    """

    def register(function: Callable[P, R]) -> Op[P, R]:
        made: Op[P, R] = Op(function, launch, check, example)
        shapes = fake or (_fake_like(like, made.places) if like else function)
        schema = torch.library.infer_schema(function, mutates_args=mutates, op_name=made.name)
        _define(made, schema, made.checked(shapes))
        if example:
            OPS[made.name] = made
        return made

    return register


def _fake_like(like: str | tuple[str, ...], places: dict[str, int]) -> Callable[..., Any]:
    if isinstance(like, str):
        place = places[like]
        return lambda *args: fresh(args[place])
    chosen = [places[name] for name in like]
    return lambda *args: tuple(fresh(args[i]) for i in chosen)


def _define(op: Op[Any, Any], schema: str, fake: Callable[..., Any]) -> None:
    """The reference on CPU, the kernels on CUDA, and the fake that tracing uses."""
    name, reference, launch = op.name, op.reference, op.launch

    def on_cpu(*args: Any) -> Any:
        with own_dtypes():
            result = reference(*args)  # the kernels write contiguous outputs, and the fakes promise them
        return tuple(t.contiguous() for t in result) if isinstance(result, tuple) else result.contiguous()

    def on_cuda(*args: Any) -> Any:
        if triton is None:
            raise ValueError(f"gemma4::{name} on CUDA needs Triton, found none; install the triton that torch pins")
        device = args[0].device  # Triton launches on the current device, whatever the tensors' own is
        if device.index == torch.cuda.current_device() and not torch._C._is_any_autocast_enabled():
            return launch(*args)
        with torch.cuda.device(device), own_dtypes():
            return launch(*args)

    # Integers are constants of a kernel, not sizes of tensors: no graph shall hold one that varies.
    schema = schema.replace("SymInt", "int")
    # The launchers take any strides. Without the tag, Inductor copies each argument that is no buffer yet, for each call anew:
    # cos and sin once a layer.
    LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"gemma4::{name}", fake, lib=LIBRARY)
    _DEFINED.append(name)


def register_fallbacks() -> None:
    """Tell Inductor that it is to call our ops as they are; harmless twice.

    It would find out by itself. But up to torch 2.11 it writes a log line first, log or no log, which prints an op's arguments
    with all that they are computed of: nested, twice as long with each layer before the op's first use. At the depth of a real
    model that never ends."""
    from torch._inductor import lowering  # seconds to import, for those who compile only

    for name in _DEFINED:
        op = getattr(torch.ops.gemma4, name).default
        if op not in lowering.lowerings:
            lowering.make_fallback(op, warn=False)


def expect(op: str, rule: str, got: Any, wanted: Any, remedy: str) -> None:
    """The one shape check: raises ValueError "op: rule, got X, wanted Y; remedy" unless the two are equal."""
    if got != wanted:
        raise ValueError(f"{op}: {rule}, got {_plain(got)}, wanted {_plain(wanted)}; {remedy}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def fresh(x: Tensor) -> Tensor:
    """A new contiguous tensor of x's shape, dtype and device: what every kernel writes."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def as_rows(x: Tensor) -> Tensor:
    """x as [rows, width] with unit stride inside a row: a view wherever strides allow one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def unit_stride(x: Tensor) -> Tensor:
    """x itself, whatever its outer strides, or a copy if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_two(n: int) -> int:
    """The least power of two >= n: Triton's block sizes."""
    return 1 << max(n - 1, 0).bit_length()


def power_of_two_within(n: int) -> int:
    """The largest power of two that is no more than n, 1 at least."""
    return 1 << max(n, 1).bit_length() - 1


@jit
def pinned(scalar):
    """A float argument as fp32, whatever the caller's launcher made of it (Inductor passes fp64)."""
    return tl.full((), scalar, tl.float32)


@jit
def rounded(x, dtype: tl.constexpr):
    """x as the unfused graph would hand it on: rounded to dtype, back in fp32."""
    return x.to(dtype).to(tl.float32)


@jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(u)) written as x sigmoid(2u), which does not cancel for negative x."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@jit
def exponential(x):
    """exp(x) as 2^whole * 2^part of x log2 e, with log2 e in two words, as expf does it.

    Plain tl.exp was three times as far from fp64 as eager, in weights of about 0.1 (measured on an H200).
    """
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    part = tl.fma(x, 1.4426950408889634, -whole) + x * 1.925963033500e-8
    return tl.where(x == float("-inf"), 0.0, tl.exp2(part) * tl.exp2(whole))
