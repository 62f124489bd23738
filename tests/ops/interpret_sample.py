"""Runs the sampler's kernels under Triton's interpreter and prints a line a case. Started by test_sample.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.ops.interpret import run  # isort: skip  (before all that imports Triton: it switches the interpreter on)
from tests.ops import interpret_attention  # noqa: F401  isort: skip  (loops over loaded bounds, in Triton 3.6)

import torch
import triton
import triton.language as tl

from gemma4_compile.ops.sampling.bitwise import gumbel, gumbel_kernel, philox, philox_kernel, weights, weights_kernel
from gemma4_compile.ops.sampling.sample import SamplePlan, sample
from tests.ops.sample_cases import MIXES, awkward, mixture, parameters

CANDIDATES = SamplePlan(tile=256, group=2, capacity=1024, block=512)
WHOLE_ROWS = SamplePlan(tile=256, group=2, capacity=4, block=1024)


def check(args: tuple[Any, ...], plan: SamplePlan | None) -> None:
    wanted, actual = sample.reference(*args), sample.launch(*args, plan=plan)
    wrong = (wanted != actual).nonzero()[:, 0]
    assert not len(wrong), f"{len(wrong)} rows differ, the first {[a[wrong[0]].tolist() for a in args[1:]]}"


def mixtures(plan: SamplePlan | None) -> Callable[[], None]:
    return lambda: check(mixture(18, 1000), plan)


def ties() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        logits, *rest = mixture(8, 600, greedy=0, scale=2.0)
        check((logits.to(dtype), *rest), SamplePlan(tile=64, group=4, capacity=600, block=1024))


def awkward_rows() -> None:
    """Each with another mix of parameters, one of them none, one of them greedy."""
    logits = awkward(300)
    for first in (0, 30):
        check((logits, *parameters(MIXES[first : first + 5] * 3)), SamplePlan(tile=128, group=2, capacity=64, block=512))
    for greedy in (0, 1):
        check((logits, *parameters([(1, 1.0, 0.0)] * len(logits), greedy)), None)


def neighbours() -> None:
    """Values with no fp32 between them: a threshold that is off by one keeps one more."""
    logits = 1.0 + torch.stack([torch.randperm(200) - 100 for _ in range(9)]) * 2.0**-23
    mixes = [(3, 1.0, 0.0), (10, 0.5, 0.0), (0, 0.02, 0.0)] * 3
    temperature, *rest = parameters(mixes)
    check((logits, torch.ones_like(temperature), *rest), None)


def widths() -> None:
    for width in (1, 2, 5, 129):
        check(mixture(5, width), None)


def strides() -> None:
    logits, *rest = mixture(6, 200)
    wide = torch.randn(6, 333)
    wide[:, 7:207] = logits
    every_other = tuple(torch.stack((t, t), dim=1)[:, 0] for t in rest)
    check((wide[:, 7:207], *every_other), None)
    check((logits.t().contiguous().t(), *rest), None)
    check((logits[:1].expand(6, -1), *rest), None)


@triton.jit
def _bitwise_kernel(seeds_ptr, offsets_ptr, x_ptr, words_ptr, gumbel_ptr, weights_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    quad = tl.arange(0, BLOCK)
    words = philox_kernel(tl.load(seeds_ptr + row), tl.load(offsets_ptr + row), quad)
    for i in tl.static_range(4):
        place = (row * BLOCK + quad) * 4 + i
        tl.store(words_ptr + place, words[i].to(tl.int64))
        tl.store(gumbel_ptr + place, gumbel_kernel(words[i]))
        tl.store(weights_ptr + place, weights_kernel(tl.load(x_ptr + place)))


def bitwise() -> None:
    """Integers, noise and weights are the reference's to the bit."""
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822])
    offsets = torch.tensor([0, 7, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1])
    rows, block = len(seeds), 256
    x = -30.5 * torch.rand(rows, 4 * block)
    x[:, 0] = 0.0
    words, noise, weighed = torch.empty(rows, 4 * block, dtype=torch.int64), torch.empty_like(x), torch.empty_like(x)
    _bitwise_kernel[(rows,)](seeds, offsets, x, words, noise, weighed, block)
    quad = torch.arange(block)[None]
    wanted = philox(seeds[:, None], quad, quad * 0, offsets[:, None] & 0xFFFFFFFF, offsets[:, None] >> 32)
    assert torch.equal(words, torch.stack(wanted, dim=-1).flatten(1))
    assert torch.equal(noise, gumbel(seeds, offsets, 4 * block))
    assert torch.equal(weighed, weights(x))


CASES: dict[str, Callable[[], None]] = {
    "bitwise": bitwise,
    "candidates": mixtures(CANDIDATES),
    "whole rows": mixtures(WHOLE_ROWS),
    "own plan": mixtures(None),
    "ties": ties,
    "awkward rows": awkward_rows,
    "neighbours": neighbours,
    "widths": widths,
    "strides": strides,
}


if __name__ == "__main__":
    run(CASES)
