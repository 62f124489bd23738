"""StepInputs: one step of an engine. The host plans it in numpy arrays, the device sees the same fields as tensors.

T tokens of R requests; N rows whose logits are wanted, S of which a token is sampled from, P that prompts want the log
probabilities of; D requests that draft tokens are made for. KIND is a layer type. int64 where nothing else is said.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from .inputs import KINDS

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True)
class Placement(Generic[Array]):
    """Tokens of requests of which the device alone knows how many draft tokens were accepted; each [T].

    places      how far behind its request's last known position it stands; above 0 it is that draft token, 0 the token sampled
                last. -1: the host has placed it
    requests    its request's place among the R
    capacities  tokens that its request has pages for; what lies behind is nobody's token, and is stored nowhere
    """

    places: Array
    requests: Array
    capacities: Array


@dataclass(frozen=True)
class Speculation(Generic[Array]):
    """Requests whose draft tokens are verified, if they have any, and that new ones are made for; each [D].

    state_rows  of RowState
    requests    its place among the R, whose block tables the drafter reads
    first       the first of its rows among the S sampled ones, which stand together
    counts      draft tokens that its other rows stand for: the first of those in the state
    wanted      the first of its rows among the N wanted ones
    capacities  tokens that it has pages for
    """

    state_rows: Array
    requests: Array
    first: Array
    counts: Array
    wanted: Array
    capacities: Array


@dataclass(frozen=True)
class Shaping(Generic[Array]):
    """How tokens are drawn, each [S]; temperature 0 is greedy.

    temperature  fp32
    top_k        int32, 0: off
    top_p        fp32, 1: off
    min_p        fp32, 0: off
    seeds        of the requests
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    seeds: Array


@dataclass(frozen=True)
class Penalties(Generic[Array]):
    """Of tokens that a request has already, each [S] fp32."""

    repetition: Array
    presence: Array
    frequency: Array


@dataclass(frozen=True)
class Bias(Generic[Array]):
    """What is added to single logits, each [entries].

    rows    among the S
    tokens  whose logits
    values  fp32; -inf bans a token
    until   new tokens of the request from which on it is off
    """

    rows: Array
    tokens: Array
    values: Array
    until: Array


@dataclass(frozen=True)
class Sampling(Generic[Array]):
    """What makes a step's tokens others than the likeliest by the model's own logits.

    prompt_lengths  [S], of the requests
    """

    prompt_lengths: Array
    shaping: Shaping[Array] | None = None
    penalties: Penalties[Array] | None = None
    bias: Bias[Array] | None = None


@dataclass(frozen=True)
class PromptRows(Generic[Array]):
    """Rows of prompts that want the log probability of the token that follows.

    rows         [P] among the N
    next_tokens  [P]
    sampled      [S] among the N: the rows that tokens are sampled from
    """

    rows: Array
    next_tokens: Array
    sampled: Array


@dataclass(frozen=True)
class ImageTokens(Generic[Array]):
    """Tokens that images stand for.

    rows   [M] those tokens, ascending
    until  [T] int32, the last position that each token of the step sees in sliding layers
    """

    rows: Array
    until: Array


@dataclass(frozen=True)
class StepInputs(Generic[Array]):
    """
    input_ids, positions, rows, starts, slots, tables   what the model reads, see inputs.py; slots and tables by KIND. Where
                 there is a placement, positions and slots are those that the host knows: the lowest that they can have
    targets      [S] row of RowState, and of the sampler's own, that each sampled token goes to
    sources      [T] row of RowState that a token comes from, -1 where input_ids has it; None: input_ids has all
    placement    None: the host has placed all tokens
    speculation  None: nothing is drafted
    sampling     None: the likeliest tokens are wanted
    prompts      None: every wanted row is sampled from
    images       None: all tokens are text
    """

    input_ids: Array
    positions: Array
    rows: Array
    starts: Array
    slots: Mapping[str, Array]
    tables: Mapping[str, Array]
    targets: Array
    sources: Array | None = None
    placement: Placement[Array] | None = None
    speculation: Speculation[Array] | None = None
    sampling: Sampling[Array] | None = None
    prompts: PromptRows[Array] | None = None
    images: ImageTokens[Array] | None = None

    @classmethod
    def of_model(cls, inputs: Mapping[str, Array], targets: Array | None = None) -> "StepInputs[Array]":
        """From what the model reads, by the names of inputs.py; nothing is sampled unless targets are given."""
        slots, tables = ({kind: inputs[f"{name}.{kind}"] for kind in KINDS} for name in ("slots", "table"))
        targets = inputs["rows"][:0] if targets is None else targets
        return cls(inputs["input_ids"], inputs["positions"], inputs["rows"], inputs["starts"], slots, tables, targets)

    def model(self) -> dict[str, Array]:
        """What the model reads, by the names of inputs.py."""
        named = {"input_ids": self.input_ids, "positions": self.positions, "rows": self.rows, "starts": self.starts}
        for kind in KINDS:
            named |= {f"slots.{kind}": self.slots[kind], f"table.{kind}": self.tables[kind]}
        return named

    def sampled_positions(self) -> Array:
        """[S]: positions of the tokens that the sampled ones follow."""
        rows = self.rows if self.prompts is None else self.rows[self.prompts.sampled]
        return self.positions[rows[: len(self.targets)]]


def leaves(value: Any) -> dict[str, Any]:
    """The arrays of a step, or of a part of it, by their paths: "rows", "slots.full_attention", "speculation.first"."""
    found: dict[str, Any] = {}
    _collect(value, "", found)
    return found


def rebuilt(value: Any, arrays: Mapping[str, Any], path: str = "") -> Any:
    """The same step, or part, with other arrays, by their paths."""
    # A step of every engine passes here: no dataclasses.fields, which takes longer than all else.
    if type(value) is dict:
        return {name: arrays[path + name] for name in value}
    found = {}
    for name in _names(value.__class__):
        part = getattr(value, name)
        if part is not None:
            part = arrays[path + name] if isinstance(part, _ARRAYS) else rebuilt(part, arrays, f"{path}{name}.")
        found[name] = part
    return type(value)(**found)


def _collect(value: Any, path: str, found: dict[str, Any]) -> None:
    if type(value) is dict:
        for name, part in value.items():
            found[path + name] = part
        return
    for name in _names(value.__class__):
        part = getattr(value, name)
        if isinstance(part, _ARRAYS):
            found[path + name] = part
        elif part is not None:
            _collect(part, f"{path}{name}.", found)


_ARRAYS = (np.ndarray, Tensor)


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))
