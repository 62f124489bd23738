"""Dependent launches on a GPU: what a slow kernel writes last is what the next one reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma4_compile.ops import OPS, dependent
from gemma4_compile.ops.attention import attention
from gemma4_compile.ops.dependent import constants
from gemma4_compile.ops.examples import Sizes, example
from gemma4_compile.ops.fusions.attention_qkv import attention_qkv
from tests.ops.attention_cases import NEW_MIXES, Request, raw, step
from tests.ops.dependent_cases import KEPT, weights_of
from tests.ops.kernel_cases import outputs

E2B = Sizes(hidden=1536, q_heads=8, kv_heads=1, head_dim=256, intermediate=6144)
pytestmark = pytest.mark.skipif(not dependent.supported(), reason="dependent launches need a Hopper GPU or a newer one")


@triton.jit
def _late_copy_kernel(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
    """Lets the next kernel start at once, and copies tens of microseconds later."""
    tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slept = tl.inline_asm_elementwise("nanosleep.u32 50000; mov.u32 $0, 0;", "=r,r", [at], tl.int32, is_pure=False, pack=1)
    tl.store(target_ptr + at + slept, tl.load(source_ptr + at, at < count), at < count)


def late(args: tuple[Any, ...], weights: set[int]) -> tuple[list[Any], Callable[[], None], Callable[[], None]]:
    """args with buffers in place of the tensors that are no weights, what fills those late, and what spoils them."""
    buffers = {i: torch.empty_like(a) for i, a in enumerate(args) if isinstance(a, Tensor) and i not in weights}

    def fill() -> None:
        for i, buffer in buffers.items():
            words, target = args[i].contiguous().view(torch.uint8).flatten(), buffer.view(torch.uint8).flatten()
            _late_copy_kernel[(-(-words.numel() // 1024),)](words, target, words.numel(), 1024, num_warps=1)

    def spoil() -> None:
        for buffer in buffers.values():
            buffer.zero_()

    return [buffers.get(i, a) for i, a in enumerate(args)], fill, spoil


def check(launch: Callable[..., Any], args: tuple[Any, ...], weights: set[int]) -> None:
    args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
    wanted = [out.clone() for out in outputs(launch(*args))]
    given, fill, spoil = late(args, weights)
    with constants([args[i] for i in weights]):
        fill()
        launch(*given)  # compiled
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fill()
            results = outputs(launch(*given))
    for _ in range(5):
        spoil()
        graph.replay()
        assert all(map(torch.equal, results, wanted))


@pytest.mark.parametrize("name", KEPT)
def test_what_comes_late_is_waited_for(name: str) -> None:
    for tokens in (1, 6, 20, 70):
        args = example(name, E2B, tokens, torch.bfloat16, "cuda")
        check(OPS[name].launch, args, weights_of(name, args))


@pytest.mark.parametrize("mix", NEW_MIXES)
def test_attention_waits_for_keys(mix: str) -> None:
    made = step(NEW_MIXES[mix], heads=8, dim=64, dtype=torch.bfloat16, device="cuda", padding=2, unwritten=0.0)
    check(attention.launch, made.fresh(), set())
    check(attention_qkv.launch, raw(made, False), set())


@pytest.mark.parametrize(("dim", "window"), ((256, 200), (512, 0)))
def test_attention_of_many_requests_waits_for_keys(dim: int, window: int) -> None:
    """By Hopper's own kernel there, in shares and whole."""
    for requests in (30, 80):
        made = step(
            [Request(250, 1)] * requests,
            heads=8,
            dim=dim,
            page=64,
            window=window,
            dtype=torch.bfloat16,
            device="cuda",
            unwritten=0.0,
        )
        check(attention.launch, made.fresh(), set())
