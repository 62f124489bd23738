"""Runs the kernels of verify under Triton's interpreter and prints a line a case. Started by test_verify.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.ops.interpret import attempt  # isort: skip  (before all that imports Triton: it switches the interpreter on)
from tests.ops import interpret_attention  # noqa: F401  isort: skip  (loops over loaded bounds, in Triton 3.6)

import torch

from gemma4_compile.ops.sample import SamplePlan
from gemma4_compile.ops.verify import VerifyPlan, launch_verify, verify_reference
from tests.ops.verify_cases import awkward_requests, mixture

SMALL = SamplePlan(tile=64, group=2, capacity=64, block=64)


def check(args: list[Any], plan: VerifyPlan | None = None, sample_plan: SamplePlan | None = SMALL) -> None:
    """Both forms."""
    reference: Any = verify_reference
    launch: Any = launch_verify
    for block in (False, True):
        accepted, token = reference(*args, block)
        got = launch(*args, block, plan=plan, sample_plan=sample_plan)
        wrong = ((got[0] != accepted) | (got[1] != token)).nonzero()[:, 0]
        assert not len(wrong), f"{len(wrong)} requests differ, block={block}, the first {wrong[0]} of counts {args[2][wrong[0]]}"


def mixtures(candidates: int | None, plan: VerifyPlan | None) -> None:
    check(mixture(9, 3, 90, candidates, greedy=5), plan)


def dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        logits, *rest = mixture(3, 2, 60, 30, greedy=0)
        check([logits.to(dtype), *rest])


def widths() -> None:
    for width, candidates in ((1, None), (2, 1), (5, 5), (129, 16), (70, None)):
        check(mixture(3, 1, width, candidates))


def strides() -> None:
    args = mixture(4, 2, 60, 20)
    wide = torch.randn(len(args[0]), 133)
    wide[:, 7:67] = args[0]
    views = [torch.stack((t, t), dim=-1)[..., 0] for t in args[1:]]
    check([wide[:, 7:67], *views])


CASES: dict[str, Callable[[], None]] = {
    "dense": partial(mixtures, None, None),
    "dense tiles": partial(mixtures, None, VerifyPlan(tile=64, single=64)),
    "sparse": partial(mixtures, 40, None),
    "sparse tiles": partial(mixtures, 40, VerifyPlan(tile=16, single=16)),
    "own plan": lambda: check(mixture(4, 2, 90, 20), None, None),
    "no numbers": lambda: check(awkward_requests(40, 1)),
    "dtypes": dtypes,
    "widths": widths,
    "strides": strides,
}


def main() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for name, case in CASES.items():
        print(__import__("time").time())
        attempt(name, case)


if __name__ == "__main__":
    main()
