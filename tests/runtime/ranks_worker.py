"""Ranks whose steps are sums over gloo, without a launcher that would end the others when one is gone; run by test_ranks.py.

    python -m tests.runtime.ranks_worker SCENARIO ...

Forks the ranks of each scenario and prints as JSON scenario -> [exit code, what it said] of each rank; no
code where it had to be killed. A rank says `steps N` when it is through."""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gemma4_compile.hf.parallel import Division
from gemma4_compile.runtime.worker.ranks import Ranks

RANKS = 3
STEPS, TROUBLE = 6, 3  # steps of rank 0, and the one that something happens in
_PATIENCE = 40  # seconds


def step(scenario: str, rank: int, number: int) -> None:
    if number == TROUBLE and scenario.endswith(f"rank {rank}"):
        if scenario.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif scenario.startswith("stuck"):
            time.sleep(60)
        elif scenario.startswith("failing"):
            raise ValueError("no such page")
        elif scenario.startswith("interrupted"):
            raise KeyboardInterrupt
    if number == TROUBLE and not scenario.startswith(("nothing", "left", "idle", "in flight", "silent")):
        time.sleep(60)  # as on a GPU, where the host cannot leave a kernel that waits for another rank
    dist.all_reduce(torch.ones(1))


def rank_of(scenario: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    group = dist.group.WORLD
    assert group is not None
    ranks = Ranks(
        Division(dist.get_world_size(), rank, group.group_name), timeout=2 if scenario.startswith(("stuck", "silent")) else 60
    )
    assert ranks.least(10 - rank) == 10 - dist.get_world_size() + 1
    assert ranks.any_rank(rank == 1, torch.device("cpu")) and not ranks.any_rank(False, torch.device("cpu"))
    assert ranks.from_driver(torch.tensor([rank + 5])).tolist() == [5]
    with suppress(ValueError):
        ranks.check_equal({"rank": rank})
        raise AssertionError("other values were not seen")
    count = 0
    if scenario.startswith("in flight") or (scenario.startswith("silent") and rank):
        ranks.in_flight = lambda: True
    if ranks.is_driver:
        for number in range(STEPS):
            if scenario == "silent rank 0" and number == TROUBLE:
                time.sleep(5)  # while steps of the others do not end
            if scenario in ("idle rank 1", "in flight rank 1") and number == TROUBLE:
                time.sleep(1)  # in no step: rank 1 goes meanwhile
            with ranks.collective():
                ranks.broadcast("step", number)
                step(scenario, rank, number)
            count += 1
        ranks.close()
        ranks.close()
    else:
        for kind, number in ranks.messages():
            assert kind == "step"
            with ranks.collective():
                step(scenario, rank, number)
            count += 1
            if (
                scenario.endswith(f"rank {rank}")
                and scenario.startswith(("left", "idle", "in flight"))
                and number == TROUBLE - 1
            ):
                os._exit(0)
        assert list(ranks.messages()) == []
    print(f"steps {count}", flush=True)
    dist.destroy_process_group()


def run(scenario: str) -> list[list[Any]]:
    """The ranks of one scenario, to their ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        said = [Path(name) / str(rank) for rank in range(RANKS)]
        processes = [_fork(scenario, rank, port, said[rank]) for rank in range(RANKS)]
        codes: dict[int, int] = {}
        end = time.monotonic() + _PATIENCE
        while len(codes) < RANKS and time.monotonic() < end:
            for process in set(processes) - set(codes):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[process] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        for process in set(processes) - set(codes):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        return [[codes.get(process), said[rank].read_text()] for rank, process in enumerate(processes)]


def _fork(scenario: str, rank: int, port: int, said: Path) -> int:
    process = os.fork()
    if process:
        return process
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 0
    try:
        rank_of(scenario)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    print(json.dumps({scenario: run(scenario) for scenario in sys.argv[1:]}))
