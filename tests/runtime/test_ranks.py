"""Ranks in step: what happens on all of them when one is killed, stuck, fails or leaves. No launcher ends the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_compile.hf.parallel import Division
from gemma4_compile.runtime.worker.ranks import Ranks
from gemma4_compile.torchrun import RanksError

from .ranks_worker import RANKS, STEPS

ROOT = Path(__file__).parents[2]
SCENARIOS = (
    "nothing", "killed rank 1", "killed rank 0", "stuck rank 2", "failing rank 1", "failing rank 0", "left rank 1",
    "idle rank 1", "in flight rank 1", "silent rank 0", "interrupted rank 0",
)  # fmt: skip
Ends = list[tuple[int | None, str]]


@pytest.fixture(scope="module")
def ends() -> dict[str, Ends]:
    """scenario -> exit code and what was said, of each rank."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.ranks_worker", *SCENARIOS], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
        check=True,
    )  # fmt: skip
    return {name: [(code, said) for code, said in ranks] for name, ranks in json.loads(done.stdout.splitlines()[-1]).items()}


def test_all_run_what_rank_0_tells(ends: dict[str, Ends]) -> None:
    assert ends["nothing"] == [(0, f"steps {STEPS}\n")] * RANKS


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_ends_all_others(dead: int, ends: dict[str, Ends]) -> None:
    found = ends[f"killed rank {dead}"]
    assert found[dead][0] == -9
    for rank, (code, said) in enumerate(found):
        if rank != dead:  # a third rank hears of it from rank 0
            told = "" if dead == 0 or rank == 0 else "rank 0 ended the run: "
            assert code == 1 and f"rank {rank} of {RANKS} ends: {told}rank {dead} is gone: its process died" in said


def test_a_stuck_rank_ends_all_by_the_time_out(ends: dict[str, Ends]) -> None:
    assert all(code == 1 for code, _ in ends["stuck rank 2"])
    assert any("a step took longer than step_timeout=2 s" in said for _, said in ends["stuck rank 2"])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all(rank: int, ends: dict[str, Ends]) -> None:
    found = ends[f"failing rank {rank}"]
    assert all(code == 1 for code, _ in found)
    assert all("a step failed: ValueError: no such page" in said for _, said in found)


@pytest.mark.parametrize("scenario", ["left rank 1", "idle rank 1", "in flight rank 1"])
def test_a_rank_that_left_is_noticed_at_the_next_step(scenario: str, ends: dict[str, Ends]) -> None:
    code, said = ends[scenario][0]
    assert code == 1 and "rank 1 is gone: its process died, or left before rank 0 closed the engine" in said
    if scenario.startswith("idle"):  # it was in no step: whoever owns the process may go on without the engine
        assert "RanksError: rank 0 of 3 cannot go on" in said
    if scenario.startswith("in flight"):  # a step of it waits for the other on the GPU, and the interpreter would wait for that
        assert "rank 0 of 3 ends: rank 1 is gone" in said and "Traceback" not in said


def test_a_step_that_does_not_end_on_a_gpu_is_noticed_there(ends: dict[str, Ends]) -> None:
    (code, said), *others = ends["silent rank 0"]
    assert all(code == 1 and "a step took longer than step_timeout=2 s" in said for code, said in others)
    assert code == 1 and "RanksError: rank 0 of 3 cannot go on: a step took longer" in said


def test_an_interrupt_in_a_step_ends_all(ends: dict[str, Ends]) -> None:
    (code, said), *others = ends["interrupted rank 0"]
    assert code == 1 and said.rstrip().endswith("KeyboardInterrupt")
    assert all(code == 1 and "a step failed: KeyboardInterrupt" in said for code, said in others)


def test_alone_there_is_nobody_to_wait_for() -> None:
    ranks = Ranks(Division(), 1.0)
    with pytest.raises(ZeroDivisionError), ranks.collective():
        raise ZeroDivisionError
    assert ranks.is_driver and ranks.least(3) == 3
    ranks.close()
    ranks.broadcast("step")
    assert issubclass(RanksError, RuntimeError)
