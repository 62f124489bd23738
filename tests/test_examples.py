"""Each program of examples/ runs, on the CPU and the demo checkpoint, and prints what it is about."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
NAMES = ("optimize", "engine", "mtp", "own_fusion", "inspect_a_step")
# All in one process: imports take seconds, and the first three share what is compiled.
RUN = """
import runpy, sys
for name, arguments in {examples!r}.items():
    sys.argv = [name, *arguments]
    print(f"=== {{name}}", flush=True)
    runpy.run_path(f"{folder}/{{name}}.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each example printed. Those that compile graphs of a whole model get one of few layers."""
    folder = tmp_path_factory.mktemp("examples")
    small = str(folder / "small")
    tiny("e").save_pretrained(small)
    short, longer = ["--max-tokens", "4"], ["--max-tokens", "6"]
    arguments = (short, short, longer, [small], [small, "--out", f"{folder}/out"])
    examples = dict(zip(NAMES, arguments, strict=True))
    code = RUN.format(examples=examples, folder=ROOT / "examples")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.split(r"^=== (\w+)\n", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_all_are_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NAMES)


def test_optimize(printed: dict[str, str]) -> None:
    assert "def __init__(self" in printed["optimize"]
    assert re.search(r"^qkv_norm_rope +8 +8 ", printed["optimize"], re.MULTILINE)
    assert "calls: 4 as packed steps" in printed["optimize"]


def test_engine(printed: dict[str, str]) -> None:
    texts = re.findall(r"^length, 4 tokens, TTFT \d+\.\d+ s: (.+)$", printed["engine"], re.MULTILINE)
    assert len(texts) == 3
    assert texts[0] == repr(printed["engine"].split(texts[-1] + "\n")[1].rpartition("\n16 tokens in ")[0])  # streamed


def test_mtp(printed: dict[str, str]) -> None:
    found = re.search(r"^6 tokens in (\d+) steps: (\d+) of (\d+) draft tokens accepted$", printed["mtp"], re.MULTILINE)
    assert found
    steps, accepted, drafted = map(int, found.groups())
    assert steps < 6
    assert 0 < accepted <= drafted


def test_own_fusion(printed: dict[str, str]) -> None:
    assert float(printed["own_fusion"].split("logits: ")[1].split()[0]) < 1e-3
    assert re.search(r"^qkv_norm_rope +4 +4 ", printed["own_fusion"], re.MULTILINE)
    assert re.search(r"^softcap +1 +1 .*the cap of the logits", printed["own_fusion"], re.MULTILINE)


def test_inspect(printed: dict[str, str]) -> None:
    assert "gemma4.norm_gate_up" in printed["inspect_a_step"]
    page = Path(printed["inspect_a_step"].rpartition("the page: ")[2].strip())
    assert "gemma4.qkv_norm_rope" in page.read_text()
