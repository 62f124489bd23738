"""Steps of packed requests for the attention tests, and their results in fp64 from the requests themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma4_compile.ops.attention import AttentionPlan, attention, launch_planned
from gemma4_compile.ops.attention_hopper import HopperPlan
from tests.ops.accuracy import assert_as_accurate


class Request(NamedTuple):
    """`past` keys in place and `new` ones behind them; rows: which of the new ones ask, None for all."""

    past: int
    new: int
    rows: tuple[int, ...] | None = None


@dataclass
class Step:
    args: tuple  # of the op
    keys: list[Tensor]  # of each request, [length, Hk, D]
    values: list[Tensor]
    asked: list[tuple[int, int]]  # request and position of each row that is no padding
    cache: tuple[Tensor, Tensor]  # what keys and values must hold afterwards

    def fresh(self) -> tuple:
        """args with keys and values that the op may write to."""
        args = list(self.args)
        args[3:5] = (cache.clone() for cache in args[3:5])
        return tuple(args)

    def exact(self) -> Tensor:
        """Dense attention in fp64: no pages, no packing."""
        q, window, scale, *more = self.args[0].double(), *self.args[10:]
        visible, until = (*more, None, None)[:2]
        out = torch.zeros_like(q)
        group = q.shape[2] // self.args[3].shape[2]
        for request, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            mine = [row for row, (asking, _) in enumerate(self.asked) if asking == request]
            position = torch.tensor([self.asked[row][1] for row in mine], device=q.device)[:, None]
            key = torch.arange(len(keys), device=q.device)
            last = position if until is None else until[mine][:, None]
            hidden = (key > last) | ((position - key >= window) if window else key < 0)
            if visible is not None:
                hidden |= ~visible[request, : len(keys)]
            for head in range(q.shape[2]):
                scores = scale * q[0, mine, head] @ keys[:, head // group].double().T
                weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
                out[0, mine, head] = weights @ values[:, head // group].double()
        return out


def step(
    requests: Sequence[Request], *, heads: int = 4, kv_heads: int = 1, dim: int = 16, page: int | None = 16, window: int = 0,
    dtype: torch.dtype = torch.float32, cache_dtype: torch.dtype | None = None, device: str = "cpu", padding: int = 0,
    writes: bool = True, unwritten: float = torch.nan, scale: float | None = None, masked: bool = False,
    ahead: int = 0,
) -> Step:  # fmt: skip
    """Rows of all requests, and `padding` more. page None: one page holds a request. writes False: nothing is new, k is None.

    masked: a third of the keys is hidden, but for those at the positions that ask.
    ahead: each row sees up to so many keys behind its own.

    Pages are shuffled. What no key was written to holds `unwritten`, and so does page 0, which tables end with.
    """
    cache_dtype = cache_dtype or dtype
    lengths = [request.past + request.new for request in requests]
    longest = max(lengths, default=1)
    page = page or -(-longest // 16) * 16
    width = -(-longest // page) + 1
    needed = [-(-length // page) for length in lengths]
    free = (torch.randperm(sum(needed)) + 1).tolist()
    shape = (1 + sum(needed), page, kv_heads, dim)
    before = [torch.full(shape, unwritten).to(cache_dtype) for _ in range(2)]
    after = [cache.clone() for cache in before]
    history: tuple[list[Tensor], list[Tensor]] = [], []
    table = torch.zeros(len(requests), width, dtype=torch.int32)
    new: tuple[list[Tensor], list[Tensor]] = [], []
    slots, asked, starts = [], [], [0]
    for index, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        pages = torch.tensor([free.pop() for _ in range(needed[index])], dtype=torch.int64)
        table[index, : len(pages)] = pages
        place = pages[torch.arange(length) // page] * page + torch.arange(length) % page
        seen = request.past if writes else length
        for which in range(2):
            made = torch.randn(length, kv_heads, dim).to(dtype)
            history[which].append(made.to(cache_dtype).to(device))
            new[which].append(made[seen:])
            for cache, stop in ((before, seen), (after, length)):
                cache[which].view(-1, kv_heads, dim)[place[:stop]] = made[:stop].to(cache_dtype)
        slots += place[seen:].tolist()
        rows = range(request.new) if request.rows is None else request.rows
        asked += [(index, request.past + row) for row in rows]
        starts.append(len(asked))
    wasted = padding if writes else 0
    k, v = (torch.cat([*rows, torch.randn(wasted, kv_heads, dim).to(dtype)])[None].to(device) for rows in new)
    args = (
        torch.randn(1, len(asked) + padding, heads, dim).to(device, dtype), *((k, v) if writes else (None, None)),
        *(cache.to(device) for cache in before), torch.tensor(slots + [-1] * wasted, dtype=torch.int64, device=device),
        table.to(device), torch.tensor([position for _, position in asked] + [0] * padding, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device), 0, window, 2 * dim**-0.5 if scale is None else scale,
    )  # fmt: skip
    if masked:
        visible = torch.rand(len(requests), longest + 3) > 1 / 3
        for index, position in asked:
            visible[index, position] = True
        args = (*args, visible.to(device))
    if ahead:
        last = [min(position + int(torch.randint(ahead + 1, ())), lengths[index] - 1) for index, position in asked]
        until = torch.tensor(last + [0] * padding, dtype=torch.int32, device=device)
        args = (*args, *(() if masked else (None,)), until)
    return Step(args, *history, asked, (after[0].to(device), after[1].to(device)))


def check_steps(steps: Iterable[tuple[Step, AttentionPlan | HopperPlan | None]], factor: float = 1.5) -> None:
    """The kernel by its own plan or another: its error against fp64, zeros for padding, and the written keys and values.

    Errors are those of all steps together: of a few fp32 numbers the largest error is a matter of luck.
    """
    results = []
    for wanted, plan in steps:
        eager_args, args = wanted.fresh(), wanted.fresh()
        eager = attention.reference(*eager_args)
        if plan is None:
            actual = attention.launch(*args)
        else:
            actual = torch.full_like(args[0], torch.nan, memory_format=torch.contiguous_format)
            launch_planned(*(actual, *args[:9], *args[10:12], plan, *args[12:]))  # visible and until come last in both
        results.append([result.flatten() for result in (actual, eager, wanted.exact())])
        assert not actual[0, len(wanted.asked) :].any()
        check_cache(wanted, args)
        check_cache(wanted, eager_args)
    actual, eager, exact = (torch.cat(parts) for parts in zip(*results, strict=True))
    assert_as_accurate(actual, eager, exact, factor)


def check_cache(wanted: Step, args: tuple) -> None:
    """keys and values of args hold the new rows, and all else that they held before, to the bit."""
    for cache, right in zip(args[3:5], wanted.cache, strict=True):
        assert torch.equal(cache.view(torch.uint8), right.view(torch.uint8))


# Past keys and new rows, one request and several: first tokens, across pages, alone on a page, idle; rows left out.
MIXES = {
    "one row": [Request(35, 1)],  # a window of 5 begins at the last key of a page
    "several": [Request(0, 8), Request(37, 1), Request(0, 0), Request(15, 2), Request(16, 5), Request(3, 4)],
    "rows left out": [Request(0, 40, (3, 9, 39)), Request(30, 8, (7,)), Request(5, 20, (0, 1, 2, 3, 17, 19))],
}


def raw(made: Step, v_is_k: bool = False) -> tuple:
    """Arguments of attention_qkv from those of a step whose rows are all new and all ask: its q, k and v are the projections.

    What the step says of the pages afterwards holds no more: keys are normed and rotated now.
    """
    q, k, v, *rest = made.fresh()
    dim, tokens = q.shape[-1], q.shape[1]
    weights = [(1 + 0.1 * torch.randn(dim)).to(q) for _ in range(2)]
    angle = 3 * torch.randn(1, tokens, dim // 2).repeat(1, 1, 2)
    return q, k, k if v_is_k else v, *weights, angle.cos().to(q), angle.sin().to(q), 1e-6, *rest


def check_same(args: tuple, fused: Callable[..., Tensor], norms: Callable[..., Any], attends: Callable[..., Tensor]) -> None:
    """attention_qkv equals the two ops to the bit: its result, and all that the pages hold.

    On a GPU, pages of another dtype may lay the heads over the threads in another way, so that a norm is added in another
    order: then one element in a thousand of the pages may be a rounding away."""
    keys, values = (cache.clone() for cache in args[8:10])
    wanted = attends(*norms(*args[:8]), keys, values, *args[10:])
    actual = fused(*args)
    assert actual.dtype == wanted.dtype and actual.is_contiguous()
    if keys.dtype == wanted.dtype or not wanted.is_cuda:
        assert torch.equal(actual, wanted)
    else:
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0.01 * wanted.abs().max().item())
    for cache, right in zip(args[8:10], (keys, values), strict=True):
        different = (cache.view(torch.uint8) != right.view(torch.uint8)).double().mean().item()
        assert different <= (0 if keys.dtype == wanted.dtype or not wanted.is_cuda else 1e-3)


# Steps whose rows are all new and all ask, as attention_qkv has them.
NEW_MIXES = {
    "decode": [Request(35, 1), Request(0, 1), Request(16, 1)],
    "mixed": [Request(0, 8), Request(37, 1), Request(0, 0), Request(15, 2), Request(16, 5), Request(3, 4)],
}
