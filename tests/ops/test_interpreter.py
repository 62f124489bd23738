"""The kernels themselves without a GPU, under Triton's interpreter in a process of its own (interpret.py)."""

from __future__ import annotations

import pytest

from gemma4_compile.ops import OPS
from tests.ops.interpreted import interpreted
from tests.ops.kernel_cases import CASES

pytest.importorskip("triton", reason="the interpreter is Triton's own")


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreted("tests.ops.interpret")


@pytest.mark.parametrize("name", OPS)
def test_kernel_is_as_accurate_as_eager(name: str, report: dict[str, str]):
    assert report.get(name) == "ok"


@pytest.mark.parametrize("case", CASES)
def test_kernel_special_case(case: str, report: dict[str, str]):
    assert report.get(case) == "ok"
