"""A packed batch: the tokens of many requests in one row, and where their keys and values lie.

A step's inputs are tensors by name, so that a graph can be bound to them and static buffers can stand in for them:

    input_ids    [1, T] int64      the new tokens of all requests, one request after the other
    positions    [T] int64         of each token within its request
    starts       [R + 1] int32     tokens of request r are starts[r] to starts[r + 1]; further tokens are padding
    rows         [N] int64         ascending: the tokens whose logits are wanted
    slots.KIND   [T] int64         where each token's key and value go, negative for padding; KIND is a layer type
    table.KIND   [R, pages] int32  the pages of each request
    keys.LAYER   [P, page, Hk, D]  of each layer that owns KV, written in place; so is values.LAYER

and, where Hugging Face's own inputs say more than these:

    position_ids [T] int64         of each token as RoPE counts; `positions` unless given
    visible      [R, keys] bool    which of each request's keys may be seen at all, by position; [R, 0], all, unless given

A step with images reads these too, and is a program of its own:

    image_tokens [T] bool          tokens that an image stands for; their input_ids are the pad token's
    images       [T, H]            their embeddings in the model's dtype; other rows are not read
    until        [T] int32         the last position that each token sees in sliding layers; only where image tokens see
                                   those behind them, see `bidirectional`
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma4_compile.geometry import Geometry

KINDS = ("sliding_attention", "full_attention")
_INT32 = ("starts", *(f"table.{kind}" for kind in KINDS))
# Inputs that each step has anew, other than keys and values.
STEP_INPUTS = ("input_ids", "positions", "rows", "starts", *(f"{name}.{kind}" for name in ("slots", "table") for kind in KINDS))
OPTIONAL = ("position_ids", "visible")
IMAGE_INPUTS = ("image_tokens", "images")


def bidirectional(config: Any) -> bool:
    """Whether image tokens see each other in both directions, in sliding layers.

    config   of the text part"""
    return getattr(config, "use_bidirectional_attention", None) == "vision"


def image_inputs(config: Any) -> tuple[str, ...]:
    """The inputs that a step with images has beside STEP_INPUTS."""
    return (*IMAGE_INPUTS, *(("until",) if bidirectional(config) else ()))


def step_input(inputs: Mapping[str, Tensor], name: str) -> Tensor:
    """One of a step's inputs, or what stands for it where it was not given."""
    if name in inputs or name not in OPTIONAL:
        return inputs[name]
    if name == "position_ids":
        return inputs["positions"]
    table = inputs[f"table.{KINDS[1]}"]
    return table.new_empty((table.shape[0], 0), dtype=torch.bool)


def varying_dim(name: str) -> int:
    """The dimension of a step's input that counts its tokens, rows or requests."""
    return 1 if name == "input_ids" else 0


def require(inputs: dict[str, Tensor], names: Iterable[str]) -> None:
    """Raises ValueError for an input that is missing."""
    for name in names:
        if name not in inputs:
            raise ValueError(f"a step needs the input {name!r}, got {', '.join(inputs)}; see packed/inputs.py")


def check_inputs(inputs: dict[str, Tensor]) -> None:
    """Raises ValueError for inputs that are missing, have another dtype, or disagree in the number of tokens or requests.

    Values stay unread: rows that do not ascend and slots or pages that do not exist are the caller's to avoid."""
    require(inputs, STEP_INPUTS)
    for name in STEP_INPUTS:
        wanted = torch.int32 if name in _INT32 else torch.int64
        if inputs[name].dtype != wanted:
            raise ValueError(f"{name} must have dtype {wanted}, got {inputs[name].dtype}; convert it")
    tokens, requests = inputs["input_ids"].shape[-1], inputs["starts"].shape[0] - 1
    sizes = {"positions": tokens} | {f"slots.{k}": tokens for k in KINDS} | {f"table.{k}": requests for k in KINDS}
    for name, size in sizes.items():
        if inputs[name].shape[0] != size:
            what = "requests in starts" if name.startswith("table.") else "tokens in input_ids"
            raise ValueError(f"{name} must have as many entries as there are {what}, {size}, got {inputs[name].shape[0]}")


@dataclass(frozen=True)
class Request:
    """The new tokens of one request, behind `seen` earlier ones whose keys and values are in place.

    rows    which of the new tokens want logits, ascending; None: the last one
    """

    tokens: Sequence[int]
    seen: int = 0
    rows: Sequence[int] | None = None


class PlainKV:
    """Keys and values without pages: each request has one row of `capacity` positions, which is a page as long as that.

    For tests, measurements and as the simplest owner of a step's memory; request i of a batch uses row rows[i].
    """

    def __init__(self, model_geometry: Geometry, requests: int, capacity: int, dtype: torch.dtype, device: str | torch.device):
        """Raises ValueError for a capacity that the attention kernel cannot tile."""
        if capacity % 16 or capacity < 16:
            raise ValueError(
                f"capacity must be a positive multiple of 16, got {capacity}; use {max(16, -(-capacity // 16) * 16)}"
            )
        self.capacity, self.requests, self.device = capacity, requests, torch.device(device)
        self.tensors: dict[str, Tensor] = {}
        for layer in model_geometry.layers:
            if not layer.shares_kv:
                for name in ("keys", "values"):
                    shape = (requests, capacity, layer.kv_heads, layer.head_dim)
                    self.tensors[f"{name}.{layer.index}"] = torch.zeros(shape, dtype=dtype, device=device)

    def inputs(self, batch: Sequence[Request], rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The inputs of a step over these requests, the i-th in row rows[i] of the memory (i unless given).

        Raises ValueError for an empty batch, for a request without new tokens, too long, or wanting rows that it does not have,
        and if no logits are wanted.
        """
        rows = list(range(len(batch))) if rows is None else list(rows)
        if not batch or len(batch) > self.requests:
            raise ValueError(f"a batch must hold 1 to {self.requests} requests, got {len(batch)}; split it")
        if len(rows) != len(batch) or len(set(rows)) != len(rows) or not set(rows) <= set(range(self.requests)):
            raise ValueError(f"each of {len(batch)} requests needs a row of its own, 0 to {self.requests - 1}, got {rows}")
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        starts = [0]
        for index, (row, request) in enumerate(zip(rows, batch, strict=True)):
            length = len(request.tokens)
            if request.seen < 0:
                raise ValueError(f"request {index} must have seen 0 tokens or more, got {request.seen}")
            if not 0 < length <= self.capacity - request.seen:
                raise ValueError(
                    f"request {index} must have 1 to {self.capacity - request.seen} new tokens, got {length}; "
                    "raise the capacity or shorten the prompt"
                )
            places = range(request.seen, request.seen + length)
            rows_of = [length - 1] if request.rows is None else list(request.rows)
            if rows_of != sorted(set(rows_of)) or not set(rows_of) <= set(range(length)):
                raise ValueError(
                    f"request {index} wants rows among its {length} new tokens, ascending, got {rows_of}; count from 0"
                )
            wanted += [starts[-1] + i for i in rows_of]
            ids += request.tokens
            positions += places
            slots += [row * self.capacity + place for place in places]
            starts.append(starts[-1] + length)

        if not wanted:
            raise ValueError("a step must want the logits of at least one token, got none; give a request rows")

        def tensor(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        step = {"input_ids": tensor(ids)[None], "positions": tensor(positions), "rows": tensor(wanted)}
        step["starts"] = tensor(starts, torch.int32)
        for kind in KINDS:
            step |= {f"slots.{kind}": tensor(slots), f"table.{kind}": tensor(rows, torch.int32)[:, None]}
        return step | self.tensors
