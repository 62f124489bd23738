"""Checks of the kernels that hold under the interpreter as on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from gemma4_compile.ops import OPS
from gemma4_compile.ops.dependent import constants
from gemma4_compile.ops.examples import SMALL, Sizes, example
from gemma4_compile.ops.fusions.experts import run_plan, sorted_pairs
from gemma4_compile.ops.fusions.linear import launch_products
from gemma4_compile.ops.fusions.linear_hopper import sum_shares
from gemma4_compile.ops.fusions.ple_tail import launch_planned
from gemma4_compile.ops.plans import DotPlan, HopperTilesPlan, PairPlan, PleDotPlan, TiledPlan, TilePlan, VectorPlan, head_plan
from tests.ops.accuracy import assert_as_accurate
from tests.ops.exact import exact, ple

NORMED = ("norm_gate_up", "norm_linear", "norm_linear_pair", "norm_linear_triple")
PRODUCTS = ("linear", "linear_pair", "linear_triple", "gate_up", *NORMED)


def outputs(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def check_op(name: str, args: tuple, **options: Any) -> None:
    """The kernel on args: dtypes and shapes of the reference, and its error against fp64."""
    actual, eager = outputs(OPS[name].launch(*args, **options)), outputs(OPS[name].reference(*args))
    assert len(actual) == len(eager)
    for a, e, x in zip(actual, eager, exact(name, args), strict=True):
        assert a.dtype == e.dtype
        assert a.is_contiguous()
        if a.is_floating_point():
            assert_as_accurate(a, e, x)
        else:
            assert torch.equal(a, e)


def ties(device: str) -> None:
    """Equal logits: the lowest index first, and weights that do not depend on the order."""
    logits = torch.zeros(3, 10, device=device, dtype=torch.bfloat16)
    logits[1, 7] = 2
    logits[2, 3:6] = 1
    weights, indices = OPS["route"].launch(logits, torch.ones(10, device=device), 4)
    assert indices.tolist() == [[0, 1, 2, 3], [7, 0, 1, 2], [3, 4, 5, 0]]
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, device=device))


def strides(device: str) -> None:
    """Inputs that are views: transposed, sliced, with a strided last dimension."""
    for name in OPS:
        args = example(name, SMALL, 4, torch.float32, device, batch=2)
        wanted = outputs(OPS[name].launch(*args))
        views = [strided(a) if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in args]
        if name in ("rope", "rope_2d"):
            views[1] = args[1]  # cos and sin with different strides
        for a, w in zip(outputs(OPS[name].launch(*views)), wanted, strict=True):
            if name in PRODUCTS:  # those of strided weights are cuBLAS's, which adds in another order
                torch.testing.assert_close(a, w)
            else:
                assert torch.equal(a, w), name


def strided(x: torch.Tensor) -> torch.Tensor:
    """The values of x in a view whose rows lie apart and whose last dimension has stride 2."""
    wide = x.new_zeros((*x.shape[:-2], x.shape[-2] + 3, 2 * x.shape[-1]))
    view = wide[..., 1:-2, ::2]
    view.copy_(x)
    return view


def no_tokens(device: str) -> None:
    for name in OPS:
        results = outputs(OPS[name].launch(*example(name, SMALL, 0, torch.bfloat16, device)))
        assert all(r.numel() == 0 for r in results), name


def shared_k_and_v(device: str) -> None:
    args = example("qkv_norm_rope", replace(SMALL, shared_kv=True), 3, torch.bfloat16, device, batch=2)
    assert args[1] is args[2]
    check_op("qkv_norm_rope", args)


def clipped(device: str) -> None:
    """Heads that fill no block, whose padding no bound may lift off 0; bounds of one value; NaN, which a clamp lets through."""
    name, tokens = "qkv_norm_rope_2d_clipped", 3
    args = example(name, replace(SMALL, head_dim=24), tokens, torch.bfloat16, device, batch=2)
    check_op(name, args)
    same = [torch.full((), value, device=device, dtype=torch.bfloat16) for value in (0.5, 0.5, -2.0, -1.0, 1.0, 4.0)]
    check_op(name, (*args[:-1], same))
    args[0][1, 2, 1, 5] = torch.nan
    for actual, eager in zip(OPS[name].launch(*args), OPS[name].reference(*args), strict=True):
        assert torch.equal(actual.isnan(), eager.isnan())
    assert OPS[name].launch(*args)[0].isnan().sum() == 24


def many_heads(device: str) -> None:
    """The plans of thousands of image patches, on programs that are filled in part."""
    for dim, plan in ((8, head_plan(32769, 64)), (12, head_plan(32769, 72))):
        for name in ("qkv_norm_rope_2d", "qkv_norm_rope_2d_clipped"):
            with patch.object(sys.modules["gemma4_compile.ops.fusions.qkv_norm_rope"], "head_plan", lambda *_, plan=plan: plan):
                check_op(name, example(name, replace(SMALL, head_dim=dim), 7, torch.bfloat16, device, batch=2))


def wide_rows(device: str) -> None:
    """Rows of several chunks, the last one partial."""
    for hidden in (1536, 2900):
        for name in ("post_attention_norms", "moe_feed_forward_tail_norm"):
            check_op(name, example(name, replace(SMALL, hidden=hidden), 1, torch.bfloat16, device))


def products(device: str) -> None:
    """Each kind of plan, with rows, outputs and columns that fill no block."""
    plans = VectorPlan(2, 256, 2, 4), VectorPlan(4, 16, 3, 1), DotPlan(16, 16, 32, 4, 4, 2), DotPlan(32, 64, 16, 1, 4, 3)
    for plan in plans:
        for rows, counts, gated in ((2, (21,), False), (1, (7, 9), False), (2, (40, 3, 50), False), (2, (37, 37), True)):
            check_products(plan, rows, counts, 72, gated, device)


def check_products(
    plan: Any, rows: int, counts: tuple[int, ...], width: int, gated: bool, device: str, dependent: bool = False
) -> None:  # fmt: skip
    x = torch.randn(rows, width, device=device).bfloat16()
    weights = tuple((0.1 * torch.randn(n, width, device=device)).bfloat16() for n in counts)
    with constants(weights) if dependent else nullcontext():
        results = launch_products(x, weights, gated, plan)
    check_sums(results, [x.double() @ weight.double().T for weight in weights], [F.linear(x, w) for w in weights], gated)


def check_sums(results: list[torch.Tensor], exact: list[torch.Tensor], eager: list[torch.Tensor], gated: bool) -> None:
    if gated:
        exact, eager = ([F.gelu(gate, approximate="tanh") * up] for gate, up in (exact, eager))
    for actual, plain, wanted in zip(results, eager, exact, strict=True):
        assert_as_accurate(actual, plain, wanted)


def shares_of_products(device: str) -> None:
    """What Hopper's programs leave for each other, in tiles of 16 columns, or 8 of the gate's and 8 of up's."""
    for counts, gated in (((300,), False), ((21, 16, 7), False), ((21, 21), True)):
        of_tile = 8 if gated else 16
        padded = [-(-count // of_tile) * of_tile for count in counts]
        shares = [torch.randn(5, 3, size, device=device) for size in padded]
        if gated:
            laid = torch.stack([share.unflatten(-1, (-1, of_tile)) for share in shares], dim=-2).flatten(-3)
        else:
            laid = torch.cat(shares, dim=-1)
        sums = [share[..., :count] for share, count in zip(shares, counts, strict=True)]
        results = [torch.empty(3, count, device=device, dtype=torch.bfloat16) for count in (counts[:1] if gated else counts)]
        sum_shares(laid.contiguous(), results, gated, 16)
        check_sums(results, [s.double().sum(0) for s in sums], [s.sum(0).bfloat16() for s in sums], gated)


def normed_products(device: str) -> None:
    """By one kernel: one and two rows, rows of several groups of loads with a part of a block at the end, whose weights lie
    together or apart; and rows that are no whole blocks of the gate of norm_ple."""
    for plan in (VectorPlan(4, 16, 2, 1), VectorPlan(8, 32, 3, 4)):
        for tokens in (1, 2):
            for name in ("norm_gate_up", "norm_linear_triple"):
                check_op(name, example(name, replace(SMALL, hidden=72), tokens, torch.bfloat16, device), plan=plan)
    for tokens in (1, 2, 4):
        check_op("norm_ple", example("norm_ple", replace(SMALL, hidden=600, ple=21), tokens, torch.bfloat16, device))


def ple_dots(device: str) -> None:
    """Each kind of plan, with tokens, inputs and columns that fill no block, also of rows that lie apart; and what each
    number of tokens is given."""
    for tokens in (3, 5, 16, 17, 33, 80, 128):
        check_op("ple_tail", example("ple_tail", replace(SMALL, hidden=64, ple=16), tokens, torch.bfloat16, device))
    plans = (
        PleDotPlan(8, 16, 8, 8, 4, 4),
        PleDotPlan(8, 8, 4, 8, 1, 2),
        PleDotPlan(16, 8, 8, 16, 2, 1),
        PleDotPlan(16, 4, 2, 16, 4, 4),
    )
    for plan in plans:
        for rows, hidden, p, dtype in ((19, 40, 37, torch.bfloat16), (5, 550, 16, torch.float16), (3, 40, 150, torch.bfloat16)):
            x, inputs = (torch.randn(rows, 3, n, device=device).to(dtype)[:, 1] for n in (hidden, p))
            gate, projection = ((0.1 * torch.randn(*size, device=device)).to(dtype) for size in ((p, hidden), (hidden, p)))
            eager = F.linear(F.gelu(F.linear(x, gate), approximate="tanh") * inputs, projection)
            wanted = ple(x.double(), inputs.double(), gate.double(), projection.double())
            actual = launch_planned(x, inputs, gate, projection, plan)
            assert_as_accurate(actual, eager, wanted)
            if rows == 3:
                assert torch.equal(actual, launch_planned(x.contiguous(), inputs.contiguous(), gate, projection, plan))


def expert_plans(device: str) -> None:
    """Each kind of plan of the experts, with sizes that fill no block: odd top_k, experts that no token asks for, all tokens on
    one expert, experts that are elsewhere, routing weights of the input's dtype."""
    plans: tuple[PairPlan | TiledPlan, ...] = (
        PairPlan(VectorPlan(4, 16, 2, 1), VectorPlan(8, 8, 3, 1)),
        TiledPlan(16, TilePlan(32, 16, 4, 2), TilePlan(16, 32, 4, 2)),
        TiledPlan(32, TilePlan(64, 32, 4, 3), TilePlan(64, 16, 4, 3)),
    )
    sizes = Sizes(hidden=24, q_heads=1, kv_heads=1, head_dim=16, expert_intermediate=13, experts=6, top_k=3)
    check_experts(plans, sizes, 5, device)


def check_experts(plans: Iterable[PairPlan | TiledPlan | HopperTilesPlan], sizes: Sizes, tokens: int, device: str) -> None:
    x, indices, weights, *matrices = example("experts", sizes, tokens, torch.bfloat16, device)
    together = torch.tensor([[4, 1, 5]], device=device).expand(tokens, 3)
    for routes, routing in (
        (indices, weights),
        (indices.int(), weights.bfloat16()),
        (together, weights),
        (torch.where(indices == 2, 6, indices), weights),
        (indices.clamp(max=3), weights),  # one expert twice: nothing forbids it
    ):
        args: tuple = (x, routes, routing, *matrices)
        eager, (wanted,) = OPS["experts"].reference(*args), exact("experts", args)
        for plan in plans:
            assert_as_accurate(run_plan(plan, *args), eager, wanted)


def experts_by_vendor(device: str) -> None:
    """torch's grouped products between our sort and our sum; it takes rows of multiples of 16 bytes."""
    sizes = Sizes(hidden=24, q_heads=1, kv_heads=1, head_dim=16, expert_intermediate=16, experts=6, top_k=3)
    x, indices, *rest = example("experts", sizes, 19, torch.bfloat16, device)
    for routes in (indices, torch.where(indices == 2, 6, indices)):
        args: tuple = (x, routes, *rest)
        assert_as_accurate(run_plan(None, *args), OPS["experts"].reference(*args), exact("experts", args)[0])


def pairs_sorted(device: str) -> None:
    """Stable, with each pair once, and tiles that cover each expert's pairs and no others."""
    for tokens, top_k, experts, rows in ((1, 1, 1, 16), (19, 3, 6, 16), (700, 2, 5, 32), (2200, 4, 130, 16)):
        indices = torch.randint(-1, experts + 1, (tokens, top_k), device=device)
        order, place, ends, tiles = (t.cpu() for t in sorted_pairs(indices, experts, rows))
        flat = indices.flatten().cpu()
        here = (flat >= 0) & (flat < experts)
        wanted = [pair for pair in flat.argsort(stable=True).tolist() if here[pair]]
        assert order[: len(wanted)].tolist() == wanted
        assert (place[~here] == -1).all() and order[place[here].long()].tolist() == here.nonzero().flatten().tolist()
        assert ends.tolist() == torch.bincount(flat[here], minlength=experts).cumsum(0).tolist()
        begins = [0, *ends.tolist()]
        covered = [(e, first) for e in range(experts) for first in range(begins[e], begins[e + 1], rows)]
        assert [tuple(tile) for tile in tiles.T.tolist() if tile[0] >= 0] == covered


CASES: dict[str, Callable[[str], None]] = {
    "ties": ties,
    "strides": strides,
    "no tokens": no_tokens,
    "shared k and v": shared_k_and_v,
    "clipped": clipped,
    "many heads": many_heads,
    "wide rows": wide_rows,
    "products": products,
    "shares of products": shares_of_products,
    "normed products": normed_products,
    "PLE dots": ple_dots,
    "expert plans": expert_plans,
    "experts by vendor": experts_by_vendor,
    "pairs sorted": pairs_sorted,
}
