"""Runs attention_qkv's kernels under Triton's interpreter and prints a line a case. Started by test_attention_qkv.py.

Each case is compared with the kernels of the two ops that it replaces, to the bit: how accurate those are has tests of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from tests.ops.interpret_attention import attempt  # isort: skip  (before all that imports Triton: it switches the interpreter on)

import torch

from gemma4_compile.ops.attention import attention
from gemma4_compile.ops.fusions.attention_qkv import attention_qkv
from gemma4_compile.ops.fusions.qkv_norm_rope import qkv_norm_rope
from tests.ops.attention_cases import NEW_MIXES, Request, check_same, raw, step
from tests.ops.kernel_cases import strided

same = partial(check_same, fused=attention_qkv.launch, norms=qkv_norm_rope.launch, attends=attention.launch)


def grid(dtype: torch.dtype) -> Iterator[tuple]:
    """Each mix; KV heads, head size (also no power of two), page, window, padding (negative slots) and v change on the way."""
    for turn, (name, group, kv_heads) in enumerate(product(NEW_MIXES, (1, 4), (1, 2))):
        made = step(
            NEW_MIXES[name], heads=group * kv_heads, kv_heads=kv_heads, dim=(16, 24, 32)[turn % 3],
            page=(16, None)[turn // 2 % 2], window=(0, 5)[turn % 2], dtype=dtype, padding=turn % 4, unwritten=0.0,
        )  # fmt: skip
        yield raw(made, v_is_k=turn % 3 == 1)


def other_pages(cache_dtype: torch.dtype) -> Iterator[tuple]:
    """fp8 too: the interpreter rounds it in a way of its own, and the same in both."""
    for v_is_k in (False, True):
        made = step(NEW_MIXES["mixed"], kv_heads=2, dtype=torch.bfloat16, cache_dtype=cache_dtype, padding=3, unwritten=0.0)
        yield raw(made, v_is_k)


def layouts() -> Iterator[tuple]:
    """Heads that are parts of one projection, a last dimension with a stride, pages of all layers in one tensor."""
    args = raw(step(NEW_MIXES["mixed"], kv_heads=2, padding=1, unwritten=0.0))
    q, k, v, *rest = args
    yield *torch.cat((q, k, v), 2).split((q.shape[2], k.shape[2], v.shape[2]), 2), *rest
    yield strided(q), strided(k), strided(v), *rest
    yield *args[:8], *torch.stack(args[8:10], 2).unbind(2), *args[10:]


def nothing() -> Iterator[tuple]:
    """Nothing but padding; no tokens."""
    yield raw(step([], padding=3, unwritten=0.0))
    yield raw(step([Request(4, 0)], unwritten=0.0))


def check(cases: Callable[[], Iterator[tuple]]) -> None:
    torch.manual_seed(0)
    for args in cases():
        same(args)


CASES: dict[str, Callable[[], None]] = {
    **{f"two launches, {d}": partial(check, partial(grid, d)) for d in (torch.float32, torch.float16, torch.bfloat16)},
    **{
        f"pages of {d}": partial(check, partial(other_pages, d))
        for d in (torch.float32, torch.float16, torch.float8_e4m3fn)
    },
    "layouts": partial(check, layouts),
    "nothing": partial(check, nothing),
}  # fmt: skip


def main() -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # matrices of 16 rows
    for name, case in CASES.items():
        attempt(name, case)


if __name__ == "__main__":
    main()
