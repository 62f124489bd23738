"""scripts/bench_vllm.py: what is made of times and tokens, and a vLLM that does not come up."""

import sys
from pathlib import Path

import pytest

from scripts.bench_vllm import Served, describe, equal_share, summarize


def test_equal_tokens_count_up_to_the_first_that_is_not() -> None:
    assert equal_share([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == 4 / 6
    assert equal_share([[9, 2]], [[1, 2]]) == 0


@pytest.mark.parametrize(("load", "gain"), [("128/256x1", 3 / 2), ("1024/128x64", 5 / 4)])
def test_a_gain_is_of_tpot_for_one_request_and_of_the_whole_time_for_more(load: str, gain: float) -> None:
    def run(seconds: float, tpot: float) -> dict[str, object]:
        return {"seconds": seconds, "ttft_ms": 1.0, "tpot_ms": tpot, "tokens": [[1, 2]]}

    off, on = summarize(load, {"off": [run(5, 3), run(9, 9), run(5, 3)], "on": [run(4, 2)] * 3})
    assert "gain" not in off and (off["seconds"], off["tpot_ms"]) == (5, 3)
    assert on["gain"] == gain and on["equal"] == 1
    assert f"gain {gain:.3f}  equal 100%" in describe(on)


def test_the_end_of_the_log_tells_why_it_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such library >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with (
        Served("on", {}, tmp_path, tmp_path / "log", 60) as served,
        pytest.raises(RuntimeError, match="vLLM, on, ended;.*\nno such library"),
    ):
        served.started()
