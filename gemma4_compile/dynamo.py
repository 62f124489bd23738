"""What this package needs of Dynamo beyond its documentation."""

import itertools
import types
from collections.abc import Callable
from typing import Any

_COUNT = itertools.count()


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own.

    Dynamo keeps graphs, and counts them against its limit, for each code object: without this, two models that go through
    one function of ours would share a budget and check each other's guards."""
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{next(_COUNT)}"
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
