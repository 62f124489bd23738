"""Runs the kernels of verify under Triton's interpreter and prints a line a case. Started by test_verify.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.ops.interpret import run  # isort: skip  (before all that imports Triton: it switches the interpreter on)
from tests.ops import interpret_attention  # noqa: F401  isort: skip  (loops over loaded bounds, in Triton 3.6)

import torch

from gemma4_compile import ops
from gemma4_compile.ops.sampling.sample import SamplePlan
from tests.ops.verify_cases import awkward_requests, mixture

MODULE: Any = importlib.import_module("gemma4_compile.ops.sampling.verify")  # in the package the function has its name
verify: Any = ops.verify  # mypy takes each starred list for all arguments
SMALL = SamplePlan(tile=128, group=1, capacity=128, block=128)


# Top-k and top-p take most of the time here, and are test_sample.py's.
EASY = [(0, 1.0, 0.0)] * 3 + [(0, 1.0, 0.02)]


def check(args: list[Any], tile: int = 1024, plan: SamplePlan | None = SMALL) -> None:
    """Both forms."""
    MODULE.TILE = tile
    for block in (False, True):
        wanted, got = verify.reference(*args, block), verify.launch(*args, block, plan=plan)
        wrong = ((got[0] != wanted[0]) | (got[1] != wanted[1])).nonzero()[:, 0]
        assert not len(wrong), f"{len(wrong)} requests differ, block={block}, the first {[a[wrong[0]] for a in args[6:]]}"


def easy(requests: int, candidates: int | None, tile: int) -> None:
    args = mixture(requests, 3, 90, candidates, greedy=8, mixes=EASY)
    check(args, tile)
    accepted, _ = verify.reference(*args, True)
    assert len(accepted.unique()) > 1 and (accepted < args[2]).any()


def awkward_rows() -> None:
    """Every other request: of an odd number of rows each still has a part."""
    logits, first, *rest = awkward_requests(40, 1, greedy=8, mixes=EASY)
    first = first[::2]
    logits = torch.stack((logits[first], logits[first + 1]), dim=1).flatten(0, 1)
    check([logits, torch.arange(len(first)) * 2, *(None if a is None else a[::2] for a in rest)])


def dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        logits, *rest = mixture(2, 2, 60, 30, greedy=0, mixes=EASY)
        check([logits.to(dtype), *rest])


def widths() -> None:
    for width, candidates in ((1, None), (2, 1), (129, 16), (70, None)):
        check(mixture(2, 1, width, candidates, mixes=EASY))


def strides() -> None:
    args = mixture(4, 2, 60, 20, mixes=EASY)
    wide = torch.randn(len(args[0]), 133)
    wide[:, 7:67] = args[0]
    views = [torch.stack((t, t), dim=-1)[..., 0] for t in args[1:]]
    check([wide[:, 7:67], *views])


CASES: dict[str, Callable[[], None]] = {
    "dense": partial(easy, 7, None, 64),
    "sparse": partial(easy, 7, 40, 32),
    "all shapes": lambda: check(mixture(5, 2, 90, 40), 1024, SamplePlan(tile=64, group=1, capacity=64, block=64)),
    "no numbers": awkward_rows,
    "dtypes": dtypes,
    "widths": widths,
    "strides": strides,
}


if __name__ == "__main__":
    run(CASES)
