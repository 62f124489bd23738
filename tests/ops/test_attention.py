"""The attention op: its reference against fp64, its contract, its plans, and its kernels under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from gemma4_compile import ops
from gemma4_compile.ops.attention import (
    AttentionPlan,
    attention_into,
    attention_plan,
    launch_planned,
)
from tests.ops.attention_cases import MIXES, Request, check_cache, step
from tests.ops.interpreted import interpreted, seeded_on_one_thread  # noqa: F401  (a fixture of every test here)

SHARED_MEMORY = 227 * 1024  # bytes a program may have on Hopper
OP = torch.ops.gemma4.attention.default


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("writes", (True, False))
@pytest.mark.parametrize("mix", MIXES)
def test_reference_against_fp64(mix: str, writes: bool, dtype: torch.dtype):
    for window, group, kv_heads, dim, page in product((0, 5), (1, 4, 8), (1, 2), (16, 32), (16, None)):
        made = step(
            MIXES[mix], heads=group * kv_heads, kv_heads=kv_heads, dim=dim, page=page, window=window, dtype=dtype,
            padding=3, writes=writes,
        )  # fmt: skip
        args = made.fresh()
        actual, wanted = ops.attention(*args), made.exact()
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert (actual.double() - wanted).abs().max() <= 8 * torch.finfo(dtype).eps * wanted.abs().max()
        assert not actual[0, len(made.asked) :].any()
        check_cache(made, args)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("window", (0, 5))
def test_rows_that_see_keys_behind_their_own(window: int, masked: bool):
    for mix in MIXES.values():
        made = step(mix, kv_heads=2, window=window, padding=3, masked=masked, ahead=9)
        args = made.fresh()
        torch.testing.assert_close(ops.attention(*args).double(), made.exact(), rtol=0, atol=1e-5)
        check_cache(made, args)
        causal = ops.attention(*made.fresh()[: -1 if masked else -2])
        assert mix is MIXES["one row"] or not torch.allclose(causal, ops.attention(*made.fresh())), "some row sees more"


@pytest.mark.parametrize("requests", ([Request(4, 3, ())], [], [Request(4, 0)]), ids=("no rows", "no requests", "idle"))
def test_nothing_to_attend_to(requests: list[Request]):
    """New keys are written all the same, and rows of padding are zero."""
    made = step(requests, padding=2)
    args = made.fresh()
    assert torch.equal(ops.attention(*args), torch.zeros(1, 2, 4, 16))
    check_cache(made, args)


def test_keys_in_another_dtype():
    made = step(MIXES["several"], cache_dtype=torch.bfloat16)
    torch.testing.assert_close(ops.attention(*made.fresh()), made.exact().float())


def test_keys_within_a_larger_buffer():
    """Pages of all layers in one tensor: P and page do not merge to one dimension."""
    made = step(MIXES["several"], unwritten=0.0)
    args = list(made.fresh())
    both = torch.stack(args[3:5], dim=2)
    args[3:5] = both.unbind(2)
    assert torch.equal(ops.attention(*args), ops.attention(*made.fresh()))
    check_cache(made, (*args[:3], both[:, :, 0].contiguous(), both[:, :, 1].contiguous()))


@pytest.mark.parametrize("writes", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(dtype: torch.dtype, writes: bool):
    """Schema (keys and values are written, nothing else is), fake against real, tracing with symbolic shapes."""
    made = step(MIXES["several"], window=5, dtype=dtype, padding=2, writes=writes, unwritten=0.0)
    torch.library.opcheck(OP, made.fresh())
    if writes:
        torch.library.opcheck(OP, step(MIXES["several"], window=5, dtype=dtype, unwritten=0.0, ahead=4).fresh())


def test_fake():
    args = step(MIXES["several"], heads=6, kv_heads=2, dtype=torch.bfloat16, padding=2).args
    q = args[0].transpose(1, 2).contiguous().transpose(1, 2)
    fakes = OP(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in (q, *args[1:])))
    assert (fakes.shape, fakes.dtype, fakes.stride()) == (args[0].shape, torch.bfloat16, args[0].stride())


WRONG: dict[str, tuple[int, Callable]] = {
    "q must be .1, N, Hq, D., got .4, 2., wanted .4, 1.; pack": (0, lambda q: q.expand(2, -1, -1, -1)),
    "keys must be .P, page, Hk, D.": (3, lambda keys: keys[..., :-1]),
    "values must have the shape of keys": (4, lambda values: values[:-1]),
    "Hq must be a multiple of Hk, got 1, wanted 0": (0, lambda q: q[:, :, :-1]),
    "positions must be .N., one for each query row": (7, lambda positions: positions[None]),
    "positions must be .N. for q": (7, lambda positions: positions[:-1]),
    "starts must be .R . 1. for a table of .R, pages., got .1, 1., wanted .1, 2.": (6, lambda table: table[0]),
    "starts must be .R . 1. for a table of .R, pages., got 6, wanted 7": (8, lambda starts: starts[:-1]),
    "k and v must both be given": (1, lambda k: None),
    "k must be .1, T, Hk, D.": (1, lambda k: k[:, :, :-1]),
    "v must have k's shape": (2, lambda v: v[:, :-1]),
    "slots must be .T., one for each new row": (5, lambda slots: slots[None]),
    "slots must be .T. for k": (5, lambda slots: slots[:-1]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_shape_is_one_clear_line(message: str):
    args = list(step(MIXES["several"], kv_heads=2).fresh())
    position, wrong = WRONG[message]
    args[position] = wrong(args[position])
    for call in (ops.attention, ops.attention.launch):  # what launches on CUDA, before anything is
        with pytest.raises(ValueError, match=f"^attention: {message}") as raised:
            call(*args)
        assert "\n" not in str(raised.value)


def test_wrong_until():
    args = list(step(MIXES["several"], padding=1, ahead=3).fresh())
    for wrong in (args[-1][:-1], args[-1].long()):
        for call in (ops.attention, ops.attention.launch):
            with pytest.raises(ValueError, match="^attention: until must be .N. int32"):
                call(*args[:-1], wrong)


def test_what_the_kernels_cannot_take():
    made = step([Request(3, 2)], writes=False)
    args = list(made.args)
    with pytest.raises(ValueError, match="attention: the page size must be a multiple of 16, got 8, wanted 0; "):
        ops.attention.launch(*args[:3], *(cache.view(-1, 8, 1, 16) for cache in args[3:5]), *args[5:])
    with pytest.raises(ValueError, match="attention: keys and values must have unit stride in D, got .2, 2., wanted .1, 1.; "):
        ops.attention.launch(*args[:3], *(cache.repeat_interleave(2, -1)[..., ::2] for cache in args[3:5]), *args[5:])
    with pytest.raises(ValueError, match="attention: a tile must have 16 rows or more"):
        launch_planned(args[0], *args[:9], *args[10:], AttentionPlan(2, 16, 1, 4, 2))


def test_into_a_given_tensor():
    made = step(MIXES["several"], window=5, padding=1)
    out, args = torch.full_like(made.args[0], torch.nan), made.fresh()
    attention_into(out, *args)
    assert torch.equal(out, ops.attention.reference(*made.fresh()))
    check_cache(made, args)
    for wrong, message in (
        (out[:, 1:], "out must have q's shape and dtype"),
        (out.double(), "out must have q's shape and dtype"),
        (out.transpose(1, 2).contiguous().transpose(1, 2), "out must be contiguous"),
    ):
        with pytest.raises(ValueError, match=f"attention: {message}, got"):
            attention_into(wrong, *args)


@pytest.mark.parametrize("itemsize", (2, 4))
def test_plans_fit_the_machine(itemsize: int):
    for rows, requests, kv_heads, group, dim, max_keys, window in product(
        (1, 5, 32, 100, 3000), (1, 8, 32), (1, 2, 8), (1, 2, 3, 8, 32), (16, 48, 256, 512), (16, 512, 131072), (0, 512)
    ):
        plan = attention_plan(rows, requests, kv_heads, group, dim, max_keys, window, itemsize)
        group_block = 1 << (group - 1).bit_length()
        block_m = plan.block_q * group_block
        assert block_m >= 16
        for size in (plan.block_q, plan.block_n, plan.splits, plan.warps):
            assert size & (size - 1) == 0
        assert plan.block_n >= 16
        # Of two stages one lies in shared memory: 64 keys of 512 columns in two stages ran on an H100.
        assert (block_m + 2 * max(plan.stages - 1, 1) * plan.block_n) * dim * itemsize <= SHARED_MEMORY
        seen = min(window, max_keys) if window else max_keys
        assert plan.splits <= min(64, 2 * -(-seen // 32))
        programs = requests * -(-rows // requests // plan.block_q) * kv_heads * plan.splits
        assert plan.splits == 1 or programs <= 16 * 132


def test_plans_by_shape_class():
    """Splits fill the machine where rows are few; many rows do not split."""
    assert attention_plan(1, 1, 1, 8, 256, 131072).splits == 64
    assert attention_plan(1, 1, 1, 8, 256, 131072, 512).splits == 8
    assert attention_plan(16, 16, 1, 8, 256, 131072, 512) == (2, 64, 4, 4, 3)
    assert attention_plan(1, 1, 1, 8, 256, 100, 512).splits == 2  # no more than blocks of keys
    assert attention_plan(1, 1, 8, 2, 256, 131072, 1024) == (8, 64, 8, 4, 2)
    assert attention_plan(8, 8, 8, 2, 256, 131072, 1024) == (8, 64, 2, 4, 3)
    assert attention_plan(1, 1, 1, 8, 256, 512).splits == 16
    assert attention_plan(32, 32, 8, 2, 256, 131072, 1024).splits == 1
    assert attention_plan(32, 32, 1, 8, 512, 8000).splits == 8
    assert attention_plan(80, 80, 1, 8, 256, 131072, 512).splits == 2
    assert attention_plan(1, 1, 1, 8, 512, 131072)[1:3] == (32, 32)
    assert attention_plan(128, 32, 4, 8, 512, 8000)[:3] == (4, 64, 2)
    assert attention_plan(3000, 1, 1, 8, 256, 131072)[:3] == (16, 64, 1)
    assert attention_plan(3000, 1, 2, 8, 512, 131072)[:3] == (8, 32, 1)
    assert attention_plan(100, 1, 1, 8, 512, 131072).splits == 8  # few tiles, and perhaps a long past


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreted("tests.ops.interpret_attention")


GRID = [
    f"{dtype}, window {window}, group {group}"
    for dtype, window, group in product((torch.float32, torch.bfloat16), (0, 5), (1, 4, 8))
]
OTHERS = (
    "other shapes", "fp16 cache", "fp8 cache", "whole blocks, fp32", "whole blocks, bf16", "own plans, fp32", "own plans, bf16",
    "masked, fp32", "masked, bf16", "ahead, fp32", "ahead, bf16", "nothing",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", (*GRID, *OTHERS))
def test_kernel_under_the_interpreter(case: str, report: dict[str, str]):
    assert report.get(case) == "ok"
