"""Rewrite: search, replace and guard of one fusion form. WHAT is rewritten; passes/ say WHEN."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from .template import Match, Template, trace, value_of

Guard = Callable[[Match], str | None]


def _always(match: Match) -> str | None:
    return None


@dataclass(frozen=True)
class Rewrite:
    """One form of a fusion.

    search, replace   functions of the same parameters, of tensors and literals, or templates; they return the same outputs
    inputs            example arguments by name, for the test that search and replace compute the same
    guard             None if the match may be replaced, else the reason why not. Templates ignore shapes, dtypes and
                      broadcasting; the guard may not
    """

    name: str
    search: Callable[..., Any] | Template
    replace: Callable[..., Any] | Template
    inputs: Callable[[], dict[str, Any]]
    guard: Guard = _always

    @cached_property
    def searched(self) -> Template:
        return self.search if isinstance(self.search, Template) else trace(self.search)

    @cached_property
    def replacement(self) -> Template:
        return self.replace if isinstance(self.replace, Template) else trace(self.replace)


def all_guards(*guards: Guard) -> Guard:
    """The first objection of several guards."""

    def guard(match: Match) -> str | None:
        return next((reason for g in guards if (reason := g(match)) is not None), None)

    return guard


def same_dtype(*names: str) -> Guard:
    """All named tensors share one of the dtypes that the kernels are written for; absent values object too."""

    def guard(match: Match) -> str | None:
        dtypes: dict[str, torch.dtype] = {}
        for name in names:
            value = _value(match, name)
            if value is None:
                return f"the shape and dtype of {name} are unknown"
            dtypes[name] = value.dtype
        if len(set(dtypes.values())) > 1:
            return "dtypes differ: " + ", ".join(f"{n} {short(d)}" for n, d in dtypes.items())
        dtype = next(iter(dtypes.values()))
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"no kernel for {short(dtype)}"
        return None

    return guard


def same_shape(*names: str) -> Guard:
    """All named tensors have one shape: nothing is broadcast."""

    def guard(match: Match) -> str | None:
        shapes = {name: value.shape for name in names if (value := _value(match, name)) is not None}
        first, *rest = shapes
        for name in rest:
            if not statically_known_true(sym_eq(tuple(shapes[first]), tuple(shapes[name]))):
                return f"shapes differ: {first} {list(shapes[first])}, {name} {list(shapes[name])}"
        return None

    return guard


def vectors_of_last_dim(of: str, *names: str) -> Guard:
    """Each named tensor is one vector as long as the last dimension of `of`."""

    def guard(match: Match) -> str | None:
        size = _value(match, of).shape[-1]  # type: ignore[union-attr]
        for name in names:
            shape = _value(match, name).shape  # type: ignore[union-attr]
            if len(shape) != 1 or not statically_known_true(shape[0] == size):
                return f"{name} must have shape [{size}], found {list(shape)}"
        return None

    return guard


def one_element(name: str) -> Guard:
    """The named tensor holds a single number."""

    def guard(match: Match) -> str | None:
        value = _value(match, name)
        return None if value is None or value.numel() == 1 else f"{name} must have one element, found {list(value.shape)}"

    return guard


def _value(match: Match, name: str) -> torch.Tensor | None:
    """The fake tensor of a parameter, or of a template operation of that name."""
    if name in match.binding:
        return value_of(match.binding[name])
    return next((value_of(g) for t, g in match.nodes.items() if t.name == name), None)


def short(dtype: torch.dtype) -> str:
    """A dtype's name as people write it."""
    return str(dtype).removeprefix("torch.")


def module_path(node: Node) -> str:
    """Path of the module that made a node, such as `model.layers.3.mlp`; empty where the graph does not say."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return path.split("].", 1)[-1] if "]." in path else ""
