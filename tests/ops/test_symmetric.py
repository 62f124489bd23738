"""What ranks agree on before they have memory in common."""

from __future__ import annotations

import pytest

from gemma4_compile.ops.distributed.symmetric import on_all_ranks
from tests.models import DEVICE
from tests.passes.one_process import alone


@pytest.mark.skipif(DEVICE != "cpu", reason="the group of one process is gloo's")
def test_on_all_ranks() -> None:
    def fails() -> str:
        raise RuntimeError("no peers")

    with alone():
        assert on_all_ranks("0", 16, lambda: "made") == "made"
        with pytest.warns(UserWarning, match="stay with NCCL: no peers"):
            assert on_all_ranks("0", 16, fails) is None
        with pytest.warns(UserWarning, match="more than 0 ranks"):
            assert on_all_ranks("0", 0, lambda: "made") is None
