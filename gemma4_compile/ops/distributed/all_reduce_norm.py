"""all_reduce_*: a fused op behind a tensor-parallel product, over the sum of its first input on all ranks of a group.

For each op of FORMS, gemma4::all_reduce_<op> takes the same arguments and the name of a process group:
    all_reduce_<op>(x, ..., group) = <op>(sum of x over the ranks, ...)
The moe forms add up two inputs, the dense branch's and the experts'. Each has its own sum: their norms are not linear, so
norm(sum of dense) + norm(sum of experts) is nothing that could be had from the sum of both. What is joined is the way there,
one meeting of the ranks for the two. The group "" is this process alone.

Source: RowwiseParallel and MoeExpertsParallel (transformers) in front of what the ops' own files name. The parts are added in
the order of the ranks, in fp32, and the sum is rounded once: all ranks get the same bits. Where NCCL adds (many tokens, several
hosts) the order and the roundings are its own; the bits are equal on all ranks there too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma4_compile.ops.examples import Draw
from gemma4_compile.ops.fusions.feed_forward_tail import finish_tail
from gemma4_compile.ops.fusions.post_attention_norms import finish_norms
from gemma4_compile.ops.library import OPS, as_rows, fresh, jit, op, pinned, tl
from gemma4_compile.ops.plans import one_shot_pays, one_shot_plan
from gemma4_compile.ops.rows import chunk_size, load_row

from .symmetric import MOST_ROWS, Workspace, receive, send, sendable, workspace

PREFIX = "all_reduce_"


def ranks_in(group: str) -> int:
    """Size of a process group by its name; "" is this process alone."""
    if not group:
        return 1
    return torch.distributed.distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type]


def sum_over_ranks(x: Tensor, group: str) -> Tensor:
    """The reference: the ranks' parts in order, added in fp32, rounded once."""
    ranks = ranks_in(group)
    if ranks == 1 or not x.numel():
        return x
    collectives = torch.ops._c10d_functional
    gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), ranks, group))
    total, *parts = gathered.view(ranks, *x.shape).float().unbind()
    for part in parts:
        total = total + part
    return total.to(x.dtype)


@jit
def _part(chunks, FIRST: tl.constexpr, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out += (chunks[FIRST + i],)  # type: ignore[assignment]
    return out


@jit
def _one_shot_tail_kernel(
    x_ptr, experts_ptr, residual_ptr, dense_weight_ptr, expert_weight_ptr, weight_ptr, scalar_ptr, next_weight_ptr,
    hidden_ptr, normed_ptr, addresses_ptr, turns_ptr, x_stride, experts_stride, residual_stride, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):  # fmt: skip
    """_tail_kernel behind the sum over the ranks; without a residual, the norm alone."""
    row = tl.program_id(0).to(tl.int64)
    eps = pinned(eps)
    experts, residual = None, None
    CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    turn = tl.load(turns_ptr + row)

    rows = sendable(load_row(x_ptr + row * x_stride, WIDTH, CHUNK))
    if experts_ptr is not None:
        rows = rows + sendable(load_row(experts_ptr + row * experts_stride, WIDTH, CHUNK))
    send(rows, addresses_ptr, turn, row, RANK, RANKS, SLOT, WIDTH, CHUNK)
    if residual_ptr is not None:  # before the wait, which hides it
        residual = load_row(residual_ptr + row * residual_stride, WIDTH, CHUNK)
    scalar = tl.load(scalar_ptr).to(tl.float32) if scalar_ptr is not None else None
    weight = load_row(weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST else None
    dense_weight = load_row(dense_weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST and dense_weight_ptr is not None else None
    expert_weight = load_row(expert_weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST and expert_weight_ptr is not None else None
    next_weight = load_row(next_weight_ptr, WIDTH, CHUNK) if WEIGHTS_FIRST and next_weight_ptr is not None else None
    sums = receive(rows, addresses_ptr, turns_ptr, turn, row, RANK, RANKS, SLOT, WIDTH, CHUNK)

    x = _part(sums, 0, CHUNKS)
    if experts_ptr is not None:
        experts = _part(sums, CHUNKS, CHUNKS)
    finish_tail(
        x, experts, residual, weight, dense_weight, expert_weight, next_weight,
        weight_ptr, dense_weight_ptr, expert_weight_ptr, next_weight_ptr, scalar, hidden_ptr, normed_ptr,
        row, WIDTH, CHUNK, eps,
    )  # fmt: skip


@jit
def _one_shot_norms_kernel(
    x_ptr, residual_ptr, weight_ptr, feed_forward_weight_ptr, router_scale_ptr, expert_weight_ptr,
    hidden_ptr, feed_forward_ptr, router_ptr, expert_ptr, addresses_ptr, turns_ptr,
    x_stride, residual_stride, router_root, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """_post_attention_norms_kernel behind the sum over the ranks."""
    row = tl.program_id(0).to(tl.int64)
    eps = pinned(eps)
    router_root = pinned(router_root)
    turn = tl.load(turns_ptr + row)

    rows = sendable(load_row(x_ptr + row * x_stride, WIDTH, CHUNK))
    send(rows, addresses_ptr, turn, row, RANK, RANKS, SLOT, WIDTH, CHUNK)
    residual = load_row(residual_ptr + row * residual_stride, WIDTH, CHUNK)
    weight = load_row(weight_ptr, WIDTH, CHUNK)
    x = receive(rows, addresses_ptr, turns_ptr, turn, row, RANK, RANKS, SLOT, WIDTH, CHUNK)
    finish_norms(
        x, residual, weight, None, None, None,
        weight_ptr, feed_forward_weight_ptr, router_scale_ptr, expert_weight_ptr,
        hidden_ptr, feed_forward_ptr, router_ptr, expert_ptr, router_root, row, WIDTH, CHUNK, eps,
    )  # fmt: skip


def one_shot_tail(
    space: Workspace,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    experts: Tensor | None = None,
    dense_weight: Tensor | None = None,
    expert_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One launch: launch_tail over the sums of x and of experts. Arguments are checked, and the rows fit the workspace."""
    hidden, normed = fresh(x), None if next_weight is None else fresh(x)
    x_rows, (rows, width) = as_rows(x), as_rows(x).shape
    residual_rows, expert_rows = (None if t is None else as_rows(t) for t in (residual, experts))
    warps, weights_first = one_shot_plan(rows, width)
    weights = (t if t is None else t.contiguous() for t in (dense_weight, expert_weight, weight))
    _one_shot_tail_kernel[(rows,)](
        x_rows, expert_rows, residual_rows, *weights, layer_scalar,
        next_weight if next_weight is None else next_weight.contiguous(), hidden, normed, space.addresses, space.turns,
        *(0 if t is None else t.stride(0) for t in (x_rows, expert_rows, residual_rows)), eps,
        space.rank, space.ranks, space.slot, width, chunk_size(width, warps), weights_first, num_warps=warps,
    )  # fmt: skip
    return hidden, normed


def one_shot_norms(
    space: Workspace,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    feed_forward_weight: Tensor,
    router_scale: Tensor,
    router_root: float,
    expert_weight: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """One launch: post_attention_norms.launch over the sum of x. Arguments are checked, and the rows fit the workspace."""
    outputs = fresh(x), fresh(x), fresh(x), fresh(x)
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    rows, width = x_rows.shape
    warps, _ = one_shot_plan(rows, width)
    weights = (t.contiguous() for t in (weight, feed_forward_weight, router_scale, expert_weight))
    _one_shot_norms_kernel[(rows,)](
        x_rows, residual_rows, *weights, *outputs, space.addresses, space.turns, x_rows.stride(0), residual_rows.stride(0),
        router_root, eps, space.rank, space.ranks, space.slot, width, chunk_size(width, warps), num_warps=warps,
    )  # fmt: skip
    return outputs


class Form(NamedTuple):
    """One op behind an all-reduce: how many of its first arguments are sums over the ranks, and its one-shot launcher.

    one_shot  workspace, the op's arguments -> its results
    """

    sums: int
    one_shot: Callable[..., Any]


FORMS: dict[str, Form] = {
    "rms_norm": Form(1, lambda space, x, weight, eps: one_shot_tail(space, x, None, weight, None, None, eps)[0]),
    "post_attention_norm": Form(
        1, lambda space, x, residual, weight, following, eps: one_shot_tail(space, x, residual, weight, None, following, eps)
    ),
    "post_attention_norms": Form(1, one_shot_norms),
    "feed_forward_tail": Form(
        1, lambda space, x, residual, weight, scalar, eps: one_shot_tail(space, x, residual, weight, scalar, None, eps)[0]
    ),
    "feed_forward_tail_norm": Form(1, one_shot_tail),
    "moe_feed_forward_tail": Form(
        2,
        lambda space, dense, experts, residual, dense_weight, expert_weight, weight, scalar, eps: one_shot_tail(
            space, dense, residual, weight, scalar, None, eps, experts, dense_weight, expert_weight
        )[0],
    ),
    "moe_feed_forward_tail_norm": Form(
        2,
        lambda space, dense, experts, residual, dense_weight, expert_weight, weight, scalar, following, eps: one_shot_tail(
            space, dense, residual, weight, scalar, following, eps, experts, dense_weight, expert_weight
        ),
    ),
}


def slot_bytes(x: Tensor, sums: int) -> int:
    """Bytes that one row takes in a workspace."""
    return sums * (-(-x.shape[-1] * x.element_size() // 256) * 256)


def by_nccl(op: str, *arguments: Any) -> Any:
    """The way of many tokens: NCCL's all-reduce, of two inputs in one call, and the fused op."""
    *rest, group = arguments
    sums, collectives = FORMS[op].sums, torch.ops._c10d_functional
    parts = [t.contiguous() for t in rest[:sums]]
    if sums == 1:
        totals = [collectives.wait_tensor(collectives.all_reduce(parts[0], "sum", group))]
    else:
        totals = [collectives.wait_tensor(t) for t in collectives.all_reduce_coalesced(parts, "sum", group)]
    return OPS[op].launch(*totals, *rest[sums:])


def by_one_shot(op: str, *arguments: Any) -> Any:
    """The way of few tokens: one launch. None for more rows than the memory has, other than 16 and 32 bits, or where
    all ranks have no memory in common."""
    *rest, group = arguments
    form, x = FORMS[op], rest[0]
    if x.numel() > MOST_ROWS * x.shape[-1] or x.element_size() not in (2, 4):
        return None
    space = workspace(group, x.device, slot_bytes(x, form.sums), x.element_size())
    if space is None:
        return None
    OPS[op].check(*rest)
    return form.one_shot(space, *rest)


def _define(name: str) -> None:
    """The op `name` with the group behind its arguments."""
    alone, sums = OPS[name], FORMS[name].sums

    def reference(*arguments: Any) -> Any:
        *rest, group = arguments
        return alone.reference(*(sum_over_ranks(t, group) for t in rest[:sums]), *rest[sums:])

    def launch(*arguments: Any) -> Any:
        *rest, group = arguments
        x, ranks = rest[0], ranks_in(group)
        if ranks == 1 or not x.numel():
            return alone.launch(*rest)
        if one_shot_pays(x.numel() // x.shape[-1], slot_bytes(x, sums), ranks):
            result = by_one_shot(name, *arguments)
            if result is not None:
                return result
        return by_nccl(name, *arguments)

    def fake(*arguments: Any) -> Any:
        return getattr(torch.ops.gemma4, name).default(*arguments[:-1])

    def example(d: Draw) -> tuple[Any, ...]:
        """Of one process alone: what more of them compute is tested where there are more."""
        return *alone.example(d), ""  # type: ignore[misc]

    signature = inspect.signature(alone, eval_str=True)
    group = inspect.Parameter("group", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str)
    reference.__signature__ = signature.replace(parameters=[*signature.parameters.values(), group])  # type: ignore[attr-defined]
    reference.__name__, reference.__doc__ = PREFIX + name, f"{name} over the sum of its first inputs on all ranks of a group."
    op(launch=launch, fake=fake, example=example)(reference)


for _name in FORMS:
    _define(_name)


def all_reduce_norm(op: str, *arguments: Any, group: str) -> Any:
    """One op of FORMS over the sum of its first argument, or of its first two in the moe forms, on all ranks.

    op         such as "post_attention_norm", whose arguments these are, each rank's own x in the first place
    arguments  x [..., H]  fp32, fp16 or bf16; all others equal on all ranks
    group      name of a process group, as group.group_name gives it; "" for this process alone
    returns    what the op returns, the same bits on all ranks

    Collective: all ranks call it, in one order, and each from one stream at a time.
    """
    return getattr(torch.ops.gemma4, PREFIX + op)(*arguments, group)
