"""Runs the kernels of ordered_argmax under Triton's interpreter and prints a line a case. Started by test_ordered_argmax.py."""

from functools import partial

from tests.ops.interpret import run  # isort: skip  (before all that imports Triton: it switches the interpreter on)
from tests.ops.ordered_argmax_cases import CASES

if __name__ == "__main__":
    run({name: partial(check, "cpu") for name, check in CASES.items()})
