"""The `gemma4` operator library: registration, the shape check, and what the kernels share.

It knows no fusion: each file beside it owns one family of ops and registers it here. Triton is optional: without it the
CPU references and the fakes still register, and a CUDA call says what is missing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

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


class Op(NamedTuple):
    """One registered op: what it computes, and the launcher of its kernel (runs under TRITON_INTERPRET=1 too)."""

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]


OPS: dict[str, Op] = {}
_DEFINED: list[str] = []
# A fragment: other parts of the package define their own ops in the same namespace.
LIBRARY = torch.library.Library("gemma4", "FRAGMENT")
# ptxas may contract the rounded product of a rope or an embedding with the sum after it into one fma, which does not
# round between them: on an H200 23% of bf16 outputs then differed from the unfused graph. With this, none.
UNFUSED = {"enable_fp_fusion": False}
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def register(schema: str, *, reference: Callable, launch: Callable, fake: Callable) -> None:
    """Define one pure op and list it in OPS."""
    name = define(schema, reference=reference, launch=launch, fake=fake)
    OPS[name] = Op(name, reference, launch)


def define(schema: str, *, reference: Callable, launch: Callable, fake: Callable) -> str:
    """Define one op: the reference on CPU, the kernel on CUDA, and the fake that tracing uses. Returns its name."""
    name = schema.split("(", 1)[0]

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

    # The launchers take any strides. Without the tag, Inductor copies each argument that is no buffer yet, for each call anew:
    # cos and sin once a layer.
    LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"gemma4::{name}", fake, lib=LIBRARY)
    _DEFINED.append(name)
    return name


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
