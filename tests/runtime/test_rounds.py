"""The kernels of a round under Triton's interpreter, against plain torch: placing tokens, advancing the state."""

import pytest

from tests.ops.interpreted import interpreted


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreted("tests.runtime.interpret_rounds")


@pytest.mark.parametrize("case", ["unpack", "unpack drafts", "advance", "count and advance"])
def test_kernels(case: str, report: dict[str, str]) -> None:
    assert report.get(case) == "ok"
