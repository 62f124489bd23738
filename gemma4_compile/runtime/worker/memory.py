"""How the memory of the KV pools is counted and divided: bytes follow from the checkpoint's geometry, shares from lengths."""

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4_compile.geometry import Geometry, LayerGeometry

_GIB = 2**30


def token_bytes(layers: list[LayerGeometry], itemsize: int) -> int:
    """Keys and values of one token in these layers."""
    return sum(2 * layer.kv_heads * layer.head_dim * itemsize for layer in layers)


def naive_token_bytes(geometry: Geometry, itemsize: int) -> int:
    """Of one token where each layer keeps keys and values of all tokens: KV-shared layers and sliding ones too."""
    return token_bytes(list(geometry.layers), itemsize)


@dataclass(frozen=True)
class PoolSizes:
    """Pages by kind, and what they cost.

    bytes          of all pools
    requests       of `expected` tokens that fit at a time
    longest        tokens that one request alone may have
    naive          requests of that length that the naive layout holds in the same bytes
    """

    pages: dict[str, int]
    bytes: int
    requests: int
    expected: int
    longest: int
    naive: int


def pages_of(length: int, window: int, page_size: int) -> int:
    """Pages of one request of this length between two steps; a window may begin and end within a page."""
    whole = -(-length // page_size)
    return min(whole, -(-window // page_size) + 1) if window else whole


def divide(
    geometry: Geometry, windows: dict[str, int], memory: int, page_size: int, itemsize: int, expected: int, longest: int,
    requests: int, chunk: int,
) -> PoolSizes:  # fmt: skip
    """Split `memory` bytes so that as many requests as possible fit.

    expected   tokens of a usual request
    longest    tokens of the longest one: it must fit alone
    requests   running at most: what more than these need is not taken
    chunk      tokens of a step, which lie in the sliding pools until the step has run

    Raises ValueError if `memory` does not hold one request of `longest` tokens; the message says what would.
    """
    page_bytes = {kind: page_size * token_bytes(geometry.kv_owners(kind), itemsize) for kind in windows}

    def needed(length: int, count: int) -> dict[str, int]:
        """Pages for so many requests of this length, the step's own and one page each for what comes next."""
        step = -(-min(chunk, count * length) // page_size)
        return {k: count * (pages_of(length, w, page_size) + 1) + (step if w else 0) for k, w in windows.items()}

    def cost(pages: dict[str, int]) -> int:
        return sum(page_bytes[kind] * n for kind, n in pages.items())

    least = needed(longest, 1)
    if cost(least) > memory:
        fitting = bisect_right(range(longest), memory, key=lambda length: cost(needed(length, 1))) - 1
        raise ValueError(
            f"the KV pools must hold one request of max_model_len={longest} tokens, which takes {_size(cost(least))}, "
            f"got {_size(memory)}; lower max_model_len to {fitting}, lower max_batched_tokens, or give kv_bytes"
        )
    low, high = 1, requests  # requests of the expected length beside room for the longest
    while low < high:
        middle = (low + high + 1) // 2
        if cost(_most(needed(expected, middle), least)) <= memory:
            low = middle
        else:
            high = middle - 1
    pages = _most(needed(expected, low), least)
    if low == requests:  # memory is left: longer requests, and prefixes to be reused
        share = min(memory / cost(pages), requests * longest / (low * expected))
        pages = {kind: int(n * max(share, 1.0)) for kind, n in pages.items()}
    naive = cost(pages) // max(naive_token_bytes(geometry, itemsize) * expected, 1)
    return PoolSizes(pages, cost(pages), low, expected, longest, naive)


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB // 10 else f"{count / 2**20:.2f} MiB"


def _most(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {kind: max(a[kind], b[kind]) for kind in a}


def allocate(
    geometry: Geometry, pages: dict[str, int], page_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """keys.LAYER and values.LAYER, [pages, page size, Hk, D], of each layer that owns some. Zero: what no request has written
    is not read, but a NaN there would reach a sum through a weight of 0."""
    tensors = {}
    for kind, count in pages.items():
        for layer in geometry.kv_owners(kind):
            for name in ("keys", "values"):
                shape = (count, page_size, layer.kv_heads, layer.head_dim)
                tensors[f"{name}.{layer.index}"] = torch.zeros(shape, dtype=dtype, device=device)
    return tensors


@dataclass(frozen=True)
class MemoryReport:
    """What an engine's memory goes to, in bytes; prints as a table.

    steps      what steps need beside: activations, logits, CUDA graphs; 0 where that was not measured
    """

    weights: int
    steps: int
    pools: PoolSizes
    page_size: int
    token_bytes: dict[str, int]
    naive_token_bytes: int

    def __str__(self) -> str:
        pools = self.pools
        lines = [f"weights        {self.weights / _GIB:8.2f} GiB", f"steps          {self.steps / _GIB:8.2f} GiB"]
        for kind, pages in pools.pages.items():
            size = pages * self.page_size * self.token_bytes[kind]
            lines.append(
                f"{kind.removesuffix('_attention') + ' pool':15}{size / _GIB:8.2f} GiB  {pages} pages of {self.page_size} "
                f"tokens, {self.token_bytes[kind]:,} bytes a token"
            )
        per_token = sum(self.token_bytes.values())
        lines.append(
            f"room for {pools.requests} requests of {pools.expected} tokens, or one of {pools.longest}; the naive layout (KV "
            f"in every layer, for every token: {self.naive_token_bytes:,} bytes a token against at most {per_token:,}) "
            f"has room for {pools.naive}"
        )
        return "\n".join(lines)
