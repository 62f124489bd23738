"""vLLM, where it is installed: its server in a process of its own, and our client against it."""

import json
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAME = "benched"
_PATIENCE = 900  # seconds that a start may take


@contextmanager
def served(folder: Path, command: str, max_model_len: int, max_requests: int, dummy: bool = False) -> Iterator[tuple[str, str]]:
    """(url, name of the model) while its server runs.

    folder   of a checkpoint; with `dummy` its config alone is read, and weights are random
    command  what starts a server, "vllm serve" or one that takes the same arguments

    Raises ImportError if there is no such program, OSError if the server does not come up."""
    program, *more = shlex.split(command)
    if shutil.which(program) is None:
        raise ImportError(f"--against vllm needs {program}, got none; pip install vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        program, *more, str(folder), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", _NAME,
        "--max-model-len", str(max_model_len), "--max-num-seqs", str(max_requests),
        *(["--load-format", "dummy", "--skip-tokenizer-init"] if dummy else []),
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, f"{url}/health", log)
            yield url, _NAME
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def config_folder(config: Any, folder: Path) -> Path:
    """A folder with a model's config alone, for `dummy`."""
    found = config.to_dict() | {"architectures": ["Gemma4ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(found, default=str))
    return folder


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Any) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    log.seek(0)
    last = log.read().decode(errors="replace").strip().splitlines()[-1:]
    raise OSError(f"a server must come up within {_PATIENCE} s, got {last or 'nothing'} as its last line; start it by hand")
