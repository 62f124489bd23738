"""The `gemma4` operator library: registration, the shape check, and the device functions that the kernels share.

It knows no fusion: each file beside it owns one family of ops and registers it here. Triton is optional: without it the
CPU references and the fakes still register, and a CUDA call says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:  # CPU-only installs and platforms without Triton wheels
    triton = tl = None

    def jit(kernel: Callable) -> Callable:
        return kernel


class Op(NamedTuple):
    """One registered op: what it computes, and the launcher of its kernel (runs under TRITON_INTERPRET=1 too)."""

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]


OPS: dict[str, Op] = {}
# A fragment: other parts of the package define their own ops in the same namespace.
LIBRARY = torch.library.Library("gemma4", "FRAGMENT")


def register(schema: str, *, reference: Callable, launch: Callable, fake: Callable) -> None:
    """Define one op: the reference on CPU, the kernel on CUDA, and the fake that tracing uses."""
    name = schema.split("(", 1)[0]

    def on_cpu(*args: Any) -> Any:
        result = reference(*args)  # the kernels write contiguous outputs, and the fakes promise them
        return tuple(t.contiguous() for t in result) if isinstance(result, tuple) else result.contiguous()

    def without_triton(*args: Any) -> Any:
        raise ValueError(f"gemma4::{name} on CUDA needs Triton, found none; install the triton that torch pins")

    LIBRARY.define(schema)
    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, without_triton if triton is None else launch, "CUDA")
    torch.library.register_fake(f"gemma4::{name}", fake, lib=LIBRARY)
    OPS[name] = Op(name, reference, launch)


def expect(rule: str, got: Any, wanted: Any, remedy: str) -> None:
    """The one shape check: raises ValueError "rule, got X, wanted Y; remedy" unless the two are equal."""
    if got != wanted:
        raise ValueError(f"{rule}, got {_plain(got)}, wanted {_plain(wanted)}; {remedy}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def fresh(x: Tensor) -> Tensor:
    """A new contiguous tensor of x's shape, dtype and device: what every kernel writes."""
    return x.new_empty(x.shape)
