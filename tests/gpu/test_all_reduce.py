"""The all-reduces on several GPUs: accuracy, the same bits on all ranks, CUDA graphs, whole models (all_reduce_worker.py).

And tokens of a vocabulary that the GPUs divide."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemma4_compile.ops.distributed.all_reduce_norm import FORMS

ROOT = Path(__file__).parents[2]
GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, found {GPUS}: the all-reduces were NOT tested")
CASES = (
    "shared memory",
    *(f"form {op}" for op in FORMS),
    "1000 rounds",
    "CUDA graph",
    "CUDA graph without memory",
    "many tokens",
    "flashinfer",
    "divided vocabulary",
    "divided vocabulary in CUDA graphs",
    *("tokens e", "tokens e in CUDA graphs", "tokens moe", "tokens moe in CUDA graphs"),
)


@pytest.fixture(scope="module", params=sorted({2, min(GPUS, 8)}) if GPUS >= 2 else [2])
def report(request: pytest.FixtureRequest) -> dict[str, str]:
    """case -> its line, of one run with all ranks."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "tests.gpu.all_reduce_worker", "1000"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    sys.stdout.write(done.stdout[-4000:] + done.stderr[-8000:])
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, report: dict[str, str]) -> None:
    line = report.get(case, "")
    if line.startswith("skipped: "):
        pytest.skip(line)
    assert line == "ok"
