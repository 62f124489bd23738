"""Runs the attention kernels under Triton's interpreter and prints a line a case. Started by test_attention.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

from tests.ops.interpret import attempt  # isort: skip  (before all that imports Triton: it switches the interpreter on)

import torch
import triton.runtime.interpreter as interpreter

from gemma4_compile.ops.attention import AttentionPlan
from tests.ops.attention_cases import MIXES, Request, Step, check_steps, step

patch_tensor = interpreter._patch_lang_tensor


def _patch(tensor: Any, scope: Any) -> None:
    """Triton 3.6 takes int() of an array of one element for a loop's bounds, which numpy 2.4 refuses."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch


def grid(dtype: torch.dtype, window: int, group: int) -> Iterator[tuple[Step, AttentionPlan]]:
    """Each mix whole or in four shares; head size, page, block, padding and KV heads change from one to the next.

    Every other of these six, so that two cases which differ in one of dtype, window and group have all of them, but for groups
    of 1 and 8."""
    odd = ((dtype == torch.bfloat16) + (window > 0) + (group == 4)) % 2
    for turn, (splits, name) in [*enumerate(product((1, 4), MIXES))][odd::2]:
        kv_heads, page = (1, 2, 1)[turn % 3], (16, None)[turn // 2 % 2]
        made = step(
            MIXES[name], heads=group * kv_heads, kv_heads=kv_heads, dim=(16, 32)[turn % 2], page=page, window=window,
            dtype=dtype, padding=turn % 4, writes=turn not in (1, 5),
        )  # fmt: skip
        yield made, AttentionPlan(max(1, 16 // group) * (1, 4, 2)[turn % 3], (16, 32)[turn % 2], splits, 4, 2)


def other_shapes() -> Iterator[tuple[Step, AttentionPlan]]:
    """A head size and a group that are no power of two; more requests than one load of starts; strides."""
    yield step(MIXES["several"], heads=6, kv_heads=2, dim=48, window=5), AttentionPlan(4, 16, 2, 4, 2)
    yield step([Request(i % 3, i % 2) for i in range(140)], heads=2, padding=3), AttentionPlan(8, 16, 1, 4, 2)
    made = step(MIXES["several"], kv_heads=2)
    q, k, v, *rest = made.args
    made.args = (q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(0, 3).contiguous().transpose(0, 3), v, *rest)
    yield made, AttentionPlan(8, 16, 2, 4, 2)


def other_cache(dtype: torch.dtype) -> Iterator[tuple[Step, AttentionPlan]]:
    for writes in (False, True) if dtype == torch.float16 else (False,):  # the interpreter's own rounding to fp8 is off
        made = step(MIXES["several"], dtype=torch.bfloat16, cache_dtype=dtype, writes=writes)
        yield made, AttentionPlan(4, 16, 2, 4, 2)


def whole_blocks(dtype: torch.dtype) -> Iterator[tuple[Step, AttentionPlan]]:
    """Tiles of 64: most blocks are seen whole, those at the ends are not, by one key for the first rows and for the last."""
    for window, splits in ((0, 1), (0, 2), (45, 1), (77, 2)):
        made = step([Request(46, 70), Request(0, 20)], page=(None, 16)[splits - 1], window=window, dtype=dtype, padding=5)
        yield made, AttentionPlan(16, 16, splits, 4, 2)


def own_plans(dtype: torch.dtype) -> Iterator[tuple[Step, None]]:
    """The plan of the shapes, of few rows and of many."""
    yield step([Request(100, 1), Request(30, 1)], heads=8, dim=32, window=50, dtype=dtype, padding=2), None
    yield step([Request(9, 70)], heads=8, dim=32, dtype=dtype), None


def masked(dtype: torch.dtype) -> Iterator[tuple[Step, AttentionPlan | None]]:
    """Keys that no row of a request may see: in one share of them, in several, with large tiles, in a window."""
    for name, window, splits in (("several", 0, 1), ("rows left out", 5, 4)):
        yield step(MIXES[name], window=window, dtype=dtype, padding=2, masked=True), AttentionPlan(4, 16, splits, 4, 2)
    yield step([Request(46, 70), Request(0, 20)], page=16, dtype=dtype, masked=True), AttentionPlan(16, 16, 1, 4, 2)
    yield step([Request(100, 1), Request(30, 1)], heads=8, dim=32, dtype=dtype, masked=True), None


def ahead(dtype: torch.dtype) -> Iterator[tuple[Step, AttentionPlan | None]]:
    """Rows that see keys behind their own: across blocks and pages, in a window, in several shares, with large tiles."""
    for name, window, splits in (("several", 0, 1), ("rows left out", 5, 4)):
        yield step(MIXES[name], window=window, dtype=dtype, padding=2, ahead=20), AttentionPlan(4, 16, splits, 4, 2)
    made = step([Request(46, 70), Request(0, 20)], page=16, window=45, dtype=dtype, ahead=40)
    yield made, AttentionPlan(16, 16, 1, 4, 2)
    yield step([Request(9, 70)], heads=8, dim=32, window=8, dtype=dtype, masked=True, ahead=30), None


def nothing() -> Iterator[tuple[Step, None]]:
    """No rows but keys to write; no requests; nothing but padding."""
    yield step([Request(4, 3, ())]), None
    yield step([], padding=3), None
    yield step([Request(4, 0)], padding=3), None


CASES: dict[str, Callable[[], Iterator[tuple[Step, Any]]]] = {
    f"{dtype}, window {window}, group {group}": partial(grid, dtype, window, group)
    for dtype, window, group in product((torch.float32, torch.bfloat16), (0, 5), (1, 4, 8))
} | {
    "other shapes": other_shapes,
    "fp16 cache": partial(other_cache, torch.float16),
    "fp8 cache": partial(other_cache, torch.float8_e4m3fn),
    "whole blocks, fp32": partial(whole_blocks, torch.float32),
    "whole blocks, bf16": partial(whole_blocks, torch.bfloat16),
    "own plans, fp32": partial(own_plans, torch.float32),
    "own plans, bf16": partial(own_plans, torch.bfloat16),
    "masked, fp32": partial(masked, torch.float32),
    "masked, bf16": partial(masked, torch.bfloat16),
    "ahead, fp32": partial(ahead, torch.float32),
    "ahead, bf16": partial(ahead, torch.bfloat16),
    "nothing": nothing,
}


def check(case: Callable[[], Iterator[tuple[Step, Any]]]) -> None:
    # Not 0: of 14,592 fp32 numbers one is then twice as far off as any of eager's, on CPUs without AVX-512; rms errors agree.
    torch.manual_seed(1)
    check_steps(case())


def main() -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # matrices of 16 rows
    for name, case in CASES.items():
        attempt(name, partial(check, case))


if __name__ == "__main__":
    main()
