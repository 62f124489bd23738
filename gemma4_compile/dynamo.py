"""What this package needs of Dynamo beyond its documentation."""

import itertools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

_COUNT = itertools.count()


def first_line(error: BaseException) -> str:
    """An error in one line, by its type: what Dynamo and Inductor raise is pages long."""
    error = getattr(error, "inner_exception", error)  # of BackendCompilerFailed
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {text[:200]}"


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
