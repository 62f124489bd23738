"""The kernels themselves without a GPU, under Triton's interpreter in a process of its own (interpret.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_compile.ops import OPS

pytest.importorskip("triton", reason="the interpreter is Triton's own")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    """Lines `op: ok` or `op: what went wrong` for every case, from one process: Triton reads the switch on import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.ops.interpret"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


@pytest.mark.xdist_group("kernels under the interpreter")
@pytest.mark.parametrize("name", OPS)
def test_kernel_is_as_accurate_as_eager(name: str, report: dict[str, str]):
    assert report.get(name) == "ok"


@pytest.mark.parametrize("case", ("ties", "strides", "no tokens", "shared k and v", "wide rows", "products"))
def test_kernel_special_case(case: str, report: dict[str, str]):
    assert report.get(case) == "ok"
