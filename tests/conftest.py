"""One Inductor cache for the whole run, so that equal graphs compile once; warnings of the libraries that say nothing here."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

# Set before Inductor reads it; the same folder for all xdist workers.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"gemma4_compile_tests_{os.getuid()}"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """No test sees graphs, or counts, of another."""
    torch._dynamo.reset()
