"""Two servers behind nginx, with the configuration that examples/deploy has for the compose file. Skipped without nginx."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.serve.running import PATIENCE, Running, new_engine, running

CONFIGURATION = Path(__file__).parent.parent.parent / "examples" / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
pytestmark = [pytest.mark.load, pytest.mark.skipif(NGINX is None, reason="no nginx")]
COMPLETIONS = "/v1/completions"


@contextmanager
def nginx(folder: Path, servers: list[Running]) -> Iterator[str]:
    """Its URL, while it runs before these servers."""
    assert NGINX is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = CONFIGURATION.read_text()
    for old, new in (
        ("one:8000", _address(servers[0])),
        ("two:8000", _address(servers[1])),
        ("listen 8080", f"listen 127.0.0.1:{port}"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(f"pid {folder}/pid;\nerror_log stderr;\n" + text)
    arguments = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    with subprocess.Popen(arguments) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url)
            yield url
        finally:
            process.terminate()


def _address(server: Running) -> str:
    return f"127.0.0.1:{server.port}"


def _wait(url: str) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            httpx.get(f"{url}/health").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise AssertionError("nginx did not come up")


def test_two_servers_behind_nginx(tmp_path: Path) -> None:
    with ExitStack() as stack:
        engines = [new_engine() for _ in range(2)]
        servers = [stack.enter_context(running(engine)) for engine in engines]
        url = stack.enter_context(nginx(tmp_path, servers))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=PATIENCE))
        texts = {
            client.post(COMPLETIONS, json={"prompt": "def f", "max_tokens": 8}).json()["choices"][0]["text"] for _ in range(6)
        }
        assert len(texts) == 1 and all(engine.metrics.requests == 3 for engine in engines)

        long = {"prompt": "x = 1\n", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with client.stream("POST", COMPLETIONS, json=long) as response:
            lines = response.iter_lines()
            json.loads(next(lines).removeprefix("data: "))
            busy = next(server for server in servers if server.gate.inside)  # the stream goes on: nothing was held back
            busy.server.handle_exit(15, None)
            for _ in range(6):  # what the one refuses, as it shuts down, the other has
                assert client.post(COMPLETIONS, json={"prompt": "def f", "max_tokens": 8}).status_code == 200
            assert busy.gate.inside == 1 and [line for line in lines if line][-1] == "data: [DONE]"
