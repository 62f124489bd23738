"""What a model's compiled step depends on beside the values of its weights.

    describe   as text, for the name of a saved program
    Watch      whether any of it has changed since, in some hundred microseconds

A step is compiled for the modules of a model, their hooks, the numbers and switches in their attributes and in the config, and
the tensors that hold the weights. Modules of libraries (torch.nn, transformers) keep what else they hold as it is; any
attribute of other modules may count, as the scale of an adapter does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_LIBRARIES = ("torch.nn.", "transformers.", "gemma4_compile.")
_INTERNAL = frozenset(vars(nn.Module()))
_APART = frozenset(("training", "name_or_path", "_is_hf_initialized", "_compiled_call_impl"))  # no step depends on them
_SCALARS = (bool, int, float, str, type(None), torch.dtype, torch.device)
_HELD = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


def is_foreign(module: nn.Module) -> bool:
    """Whether a module's class is neither PyTorch's nor transformers' nor ours."""
    return not type(module).__module__.startswith(_LIBRARIES)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks, but for those that transformers leaves behind when a call has asked for hidden states
    or the like: outside of such calls they do nothing."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


def describe(model: nn.Module) -> list[str] | None:
    """A line for each module: its class, and its attributes. None for a model that no text tells from others: one with hooks,
    with a forward that was put in the place of its class', or whose own modules hold objects or have no version."""
    lines = []
    for name, module in model.named_modules():
        if has_hooks(module) or "forward" in vars(module):
            return None
        kind = type(module)
        found = _scalars_of(module)
        version = ""
        if is_foreign(module):
            others = {key: value for key, value in vars(module).items() if key not in _INTERNAL | _APART | found.keys()}
            version = getattr(sys.modules.get(kind.__module__.partition(".")[0]), "__version__", "")
            if not version or not all(map(_is_plain, others.values())):
                return None
            found |= others
        text = repr(sorted((key, _ordered(value)) for key, value in found.items()))
        lines.append(f"{name} {kind.__module__}.{kind.__qualname__} {version} {text}")
    return lines


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, chain.from_iterable(value.items())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _SCALARS)


def _ordered(value: Any) -> Any:
    """The same in each process: sets have no order of their own."""
    return sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value


def address_of(tensor: Tensor) -> int:
    """Where its memory begins; 0 for what has none of its own."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # tensor subclasses
        return 0


class Watch:
    """Some models as they are now."""

    def __init__(self, *models: nn.Module):
        modules = list({id(module): module for model in models for module in model.modules()}.values())
        tensors = [t for module in modules for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        self._own = [vars(module) for module in modules]
        held: list[dict[Any, Any]] = [getattr(module, name) for module in modules for name in _HELD]
        self._held, self._empty = [each for each in held if each], [each for each in held if not each]
        self._attributes = list(self._readers(modules))
        self._placed = [tensor for tensor in tensors if type(tensor) in (Tensor, nn.Parameter)]
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._objects, self._values, self._addresses = self._now()
        self._versions = self._written()

    @staticmethod
    def _readers(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], Any]]:
        """Dictionaries, and what reads those of their values that count."""
        for module in modules:
            own = vars(module)
            yield own, _attributes if is_foreign(module) else _reader(_scalars_of(module))
        for config in {id(c): c for module in modules if (c := vars(module).get("config")) is not None}.values():
            yield vars(config), _frozen

    def _now(self) -> tuple[list[Any], list[Any], list[int]]:
        objects = [*chain.from_iterable(map(dict.values, self._held)), *(own.get("forward") for own in self._own)]
        values = [read(held) for held, read in self._attributes]
        return objects, values, list(map(Tensor.data_ptr, self._placed))

    def _written(self) -> list[int]:
        return list(map(attrgetter("_version"), self._counted))

    def is_unchanged(self) -> bool:
        """All modules, tensors, hooks and patched forwards the same objects, tensors where they were, attributes and configs
        with equal values."""
        with suppress(KeyError):  # an attribute that is gone
            objects, values, addresses = self._now()
            if any(self._empty):
                return False
            same = len(objects) == len(self._objects) and all(map(is_, objects, self._objects))
            return same and values == self._values and addresses == self._addresses
        return False

    def was_written(self) -> bool:
        """Whether tensors were written in place since this was asked for last, or since the beginning. PyTorch does not count
        what is written through `.data`, nor to inference tensors."""
        versions = self._written()
        changed = versions != self._versions
        self._versions = versions
        return changed


def _scalars_of(module: nn.Module) -> dict[str, Any]:
    """The numbers, switches and names among a module's attributes. transformers notes of a model what its last calls were like
    (the length of their static cache, that hooks are there) in private ones of its own."""
    notes = isinstance(module, PreTrainedModel) and not is_foreign(module)
    return {
        key: value for key, value in vars(module).items()
        if isinstance(value, _SCALARS) and key not in _APART and not (notes and key.startswith("_"))
    }  # fmt: skip


def _reader(found: dict[str, Any]) -> Any:
    return itemgetter(*found) if found else lambda held: ()


def _attributes(own: dict[str, Any]) -> Any:
    return _frozen({key: value for key, value in own.items() if key not in _INTERNAL | _APART})


def _frozen(value: Any) -> Any:
    """A value as it is now: of containers a copy, of other objects which one it is."""
    if isinstance(value, dict):
        return {key: _frozen(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [*map(_frozen, value)]
    return value if isinstance(value, _SCALARS) else _Identity(value)


class _Identity:
    def __init__(self, value: Any):
        self._value = value  # kept, so that no other object can take its place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._value is other._value

    __hash__ = None  # type: ignore[assignment]
