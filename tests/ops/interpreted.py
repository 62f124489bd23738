"""Runs a module of tests under Triton's interpreter, and tests on one thread: what several files of this folder share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def interpreted(module: str) -> dict[str, str]:
    """Lines `case: ok` or `case: what went wrong` that it prints, from one process: Triton reads the switch on import."""
    pytest.importorskip("triton", reason="the interpreter is Triton's own")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


@pytest.fixture(autouse=True)
def seeded_on_one_thread() -> Iterator[None]:
    """For each test of a file that imports it. Between two threads, matrices of 16 rows took up to ten times as long."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
