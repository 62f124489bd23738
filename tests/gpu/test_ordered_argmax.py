"""gemma4::ordered_argmax on the GPU: its cases, E2B's sizes against the reference, and the time of Inductor's own code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gemma4_compile.ops import ordered_argmax
from tests.gpu.times import microseconds
from tests.ops.ordered_argmax_cases import CASES

VOCABULARY, CLUSTERS, HIDDEN, TOP_K = 262144, 2048, 256, 32


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    CASES[case]("cuda")


@pytest.mark.parametrize("rows", [1, 8, 32, 80, 256])
def test_real_size(rows: int) -> None:
    """Random scores of fp32: no two clusters are equal at the border. Prints microseconds beside Inductor's."""
    generator = torch.Generator("cuda").manual_seed(rows)
    weight = torch.randn((VOCABULARY, HIDDEN), device="cuda", generator=generator).bfloat16()
    ordering = torch.randperm(VOCABULARY, device="cuda", generator=generator)
    states = torch.randn((rows, HIDDEN), device="cuda", generator=generator).bfloat16()
    scores = torch.randn((rows, CLUSTERS), device="cuda", generator=generator)
    assert torch.equal(
        ordered_argmax(states, scores, ordering, weight, TOP_K),
        ordered_argmax.reference(states, scores, ordering, weight, TOP_K),
    )
    compiled = torch.compile(ordered_argmax.reference, dynamic=False)
    times = []
    for function in (ordered_argmax, compiled):

        def run(function: Callable[..., Tensor] = function) -> Tensor:
            return function(states, scores.bfloat16(), ordering, weight, TOP_K)

        times.append(microseconds(run))
    print(f"\n{rows} rows: {times[0]:.1f} us, Inductor {times[1]:.1f}")
