"""An Engine of two GPUs: the tokens of one, with CUDA graphs and MTP; a rank that is killed or stuck (engine_worker.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, found {GPUS}: the engine of several was NOT tested")
CASES = [
    *(f"{kind} {dtype}{mtp}" for kind in ("e", "moe") for dtype in ("float32", "bfloat16") for mtp in ("", " mtp")),
    "sampled e", "sampled moe",
]  # fmt: skip


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    """case -> its line, of one run with both ranks."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "tests.gpu.engine_worker"], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
        text=True, timeout=1500, check=False,
    )  # fmt: skip
    sys.stdout.write(done.stdout[-4000:] + done.stderr[-8000:])
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, report: dict[str, str]) -> None:
    assert report.get(case) == "ok"


@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_a_rank_that_is_gone_ends_the_others(how: str) -> None:
    """Without a launcher, which would end them itself. A stuck rank is noticed by the time-out of 10 s."""
    base = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.engine_worker", how], cwd=ROOT,
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        _, said = ranks[0].communicate(timeout=240)
        ended = time.time()
    finally:
        for rank in ranks:
            rank.kill()
    out, _ = ranks[1].communicate()
    begun = next(float(line.split()[1].rstrip(":")) for line in out.splitlines() if line.endswith(how))
    print(f"rank 1 {how}: rank 0 ended {ended - begun:.1f} s later: {said.strip().splitlines()[-1]}")
    assert ranks[0].returncode == 1
    assert ("rank 1 is gone" if how == "killed" else "took longer than step_timeout=10 s") in said
    assert ended - begun < (5 if how == "killed" else 20)
