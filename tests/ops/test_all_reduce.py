"""The one-shot all-reduce without a GPU: processes on shared memory under the interpreter (interpret_all_reduce.py)."""

from __future__ import annotations

import pytest

from gemma4_compile.ops.distributed.all_reduce_norm import FORMS
from gemma4_compile.ops.plans import one_shot_pays, one_shot_plan, row_plan
from tests.ops.interpreted import interpreted

pytest.importorskip("triton", reason="the interpreter is Triton's own")


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreted("tests.ops.interpret_all_reduce")


@pytest.mark.slow
@pytest.mark.parametrize("op", FORMS)
def test_one_shot_is_the_op_over_the_sum(op: str, report: dict[str, str]) -> None:
    """Bit for bit on two ranks or three, with delays, other row counts each round and -0 in the rows."""
    assert report.get(op) == "ok"


def test_plan() -> None:
    assert one_shot_pays(64, 2 * 5376, 2) and one_shot_pays(1, 2 * 5376, 8)
    assert not one_shot_pays(1, 2 * 5376, 1), "nothing to add"
    assert one_shot_pays(512, 2 * 5376, 2) and one_shot_pays(256, 2 * 5376, 4), "as measured"
    assert not one_shot_pays(512, 2 * 5376, 4) and not one_shot_pays(64, 2 * 5376, 8), "too many bytes"
    assert one_shot_plan(512, 5376) == one_shot_plan(8, 5376) == row_plan(8, 5376) != row_plan(512, 5376), "not fewer warps"
