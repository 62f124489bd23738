"""What this package needs of Dynamo beyond its documentation."""

import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import eval_frame

_COUNT = itertools.count()


def first_line(error: BaseException) -> str:
    """An error in one line, by its type: what Dynamo and Inductor raise is pages long."""
    error = getattr(error, "inner_exception", error)  # of BackendCompilerFailed
    if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
        return "no C++ compiler, which Inductor needs for models on a CPU; install g++ (apt install g++), or name one in CXX"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {text[:200]}"


def switched_off() -> str:
    """Why torch.compile does nothing in this process, empty if it does its work."""
    if torch._dynamo.config.disable:
        return "torch.compile is switched off (TORCH_COMPILE_DISABLE or torch._dynamo.config.disable)"
    stance = eval_frame._stance.stance
    return f"torch.compile is switched off (torch.compiler.set_stance({stance!r}))" if stance == "force_eager" else ""


@contextmanager
def own_state() -> Iterator[None]:
    """What is traced in here does not depend on what the caller has set: a default device (a mode, which would be in the
    graph as arguments), a default dtype, autocast, gradients, inference mode, and whether compilation is switched off."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast(),
            torch._dynamo.config.patch(disable=False), torch.compiler.set_stance("default"),
        ):  # fmt: skip
            yield
    finally:
        torch.set_default_dtype(dtype)
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own.

    Dynamo keeps graphs, and counts them against its limit, for each code object: without this, two models that go through
    one function of ours would share a budget and check each other's guards."""
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{next(_COUNT)}"
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def dense(tensor: Tensor) -> Tensor:
    """The tensor with the strides of its shape, copied only if it must be.

    Dynamo compiles again for other strides: of a view that has those of a longer tensor, of an expanded mask, and also of
    dimensions of size 1, which contiguous() leaves as they are."""
    tensor = tensor.contiguous()
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    return tensor.as_strided(tensor.shape, strides[::-1])
