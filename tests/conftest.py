"""One Inductor cache for the whole run, so that equal graphs compile once; warnings of the libraries that say nothing here."""

import os
import tempfile
from pathlib import Path

# Workers share the cores: with more threads than these each waits for the others. Read when torch is imported.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest  # noqa: E402
import torch  # noqa: E402

# Set before Inductor reads it; the same folder for all xdist workers.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"gemma4_compile_tests_{os.getuid()}"))
# Kernels of scalar loops, here and in processes started from here: of what compiling one takes, vectorized headers are a third.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
# What an operation makes of shapes is computed each time, in processes started from here too: for small models whose sizes are
# symbols, PyTorch's cache of it takes longer, some 30% of a trace and of Inductor's work. Read when Dynamo is imported.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# What takes longest, longest first: of files that are handed out whole (--dist loadfile) none may be left for the end.
LONGEST = (
    "test_optimize.py", "inspection/test_inspect.py", "test_parallel.py", "runtime/test_engine.py", "runtime/test_program.py",
    "runtime/test_mtp.py", "test_demo_models.py", "passes/test_yoco.py", "test_report.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """No test sees graphs, or counts, of another."""
    torch._dynamo.reset()
