"""vLLM itself with the plug-in, on a CPU: `make test-vllm`. Each run is a process; all share the folder of vLLM's caches."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gemma4_compile.demo import demo_checkpoint, held_out_prompts
from tests.vllm import small
from tests.vllm.quantized import quantized

pytestmark = pytest.mark.vllm
reads_demo = pytest.mark.skipif(small.vllm_version().startswith("0.26"), reason="vLLM 0.26 cannot read the demo checkpoints")
ROOT = Path(__file__).parents[2]
MODES = ("own", "piecewise")
NORMS = "qkv_norm_rope {0}/{0}, post_attention_norms {0}/{0}"
REST = "feed_forward_tail {0}/{0}, gate_up {0}/{0}, linear {0}/{0} sites fused"


def sites(kind: str, layers: int) -> str:
    """What the log says of a model whose sites are all fused."""
    ple = "ple_inputs 1/1, ple_tail {0}/{0}" if kind == "e" else "ple_inputs 0/0, ple_tail 0/0"
    return "backbone: " + f"{NORMS}, {ple}, {REST}".format(layers)


@dataclass(frozen=True)
class Run:
    """tokens  of each prompt"""

    tokens: list[list[int]]
    log: str

    @property
    def lines(self) -> list[str]:
        """Of the plug-in."""
        return re.findall(r"(?m)(?:^|\] )(gemma4-compile.*)", self.log)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def serve(folder: Path) -> Any:
    """Continue the prompts; the second time with the same arguments the first answer."""

    @functools.cache
    def served(model: Path, dtype: str, mode: str, switch: str, again: int = 0, more: str = "{}") -> Run:
        out = folder / "tokens.json"
        options = {"model": str(model), "out": str(out), "dtype": dtype, "mode": mode, "ids": prompts(model)} | json.loads(more)
        cache = folder / ("packed" if options.get("packed") else "cache")  # which products run is no part of vLLM's keys
        environment = os.environ | {
            "GEMMA4_COMPILE_VLLM": switch, "VLLM_CACHE_ROOT": str(cache), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.vllm.host", json.dumps(options)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return Run(json.loads(out.read_text()), done.stdout + done.stderr)

    return served


def prompts(model: Path) -> list[list[int]]:
    """Text that the demo models never saw; a config alone brings its own ids."""
    if not (model / "tokenizer.json").exists():
        return []
    return held_out_prompts(AutoTokenizer.from_pretrained(model), 6, 64, 96)


def agreeing(one: Run, exact: Run) -> int:
    """Tokens that are those of `exact`, of each prompt up to the first that is not."""
    pairs = (zip(mine, theirs, strict=True) for mine, theirs in zip(one.tokens, exact.tokens, strict=True))
    return sum(len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], tokens))) for tokens in pairs)


def target(name: str) -> Path:
    return demo_checkpoint(name) / "target"


@reads_demo
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["e", "moe"])
def test_sites_and_tokens(serve: Any, name: str, mode: str, dtype: str) -> None:
    on = serve(target(name), dtype, mode, "1")
    assert len(on.lines) == 1 and sites(name, 8 if name == "e" else 6) in on.lines[0]
    off, eager = serve(target(name), dtype, mode, "0"), serve(target(name), dtype, "eager", "0")
    assert not off.lines and not eager.lines
    if dtype == "float32":
        assert on.tokens == off.tokens == eager.tokens
    else:  # vLLM's own two ways have other tokens there: ours go with fp32 as far as they do
        exact = serve(target(name), "float32", "eager", "0")
        assert agreeing(on, exact) >= min(agreeing(off, exact), agreeing(eager, exact))


@pytest.mark.parametrize("kind", ["e", "moe"])
@pytest.mark.parametrize("mode", MODES)
def test_random_weights(serve: Any, tmp_path: Path, kind: str, mode: str) -> None:
    """On each version of vLLM."""
    told = json.dumps(small.run(kind, tmp_path))
    on, off = (serve(tmp_path, "float32", mode, switch, 0, told) for switch in "10")
    assert len(on.lines) == 1 and sites(kind, 3) in on.lines[0]
    assert on.tokens == off.tokens


def compiled(folder: Path) -> set[Path]:
    return {path for path in (folder / "cache" / "torch_compile_cache").glob("*/*") if path.is_dir()}


@reads_demo
@pytest.mark.parametrize("mode", MODES)
def test_off_on_off(serve: Any, folder: Path, mode: str) -> None:
    """What was compiled with the passes is not run without them, nor the other way round: each has a folder of its own."""
    model = target("e")
    before = compiled(folder)
    off = serve(model, "float32", mode, "0", 1)
    between = compiled(folder)
    on = serve(model, "float32", mode, "1", 1)
    after = compiled(folder)
    last = serve(model, "float32", mode, "0", 2)
    assert compiled(folder) == after
    assert off.tokens == on.tokens == last.tokens
    assert not off.lines and not last.lines
    reports = {path.parent for path in (folder / "cache").rglob("gemma4_compile.*.json")}
    assert reports and not any(parent.is_relative_to(path) for parent in reports for path in between - before)


@reads_demo
def test_a_saved_graph_is_loaded_and_still_fused(serve: Any) -> None:
    first, second = (serve(target("e"), "float32", "piecewise", "1", again) for again in (0, 3))
    assert second.tokens == first.tokens and len(second.lines) <= 1


@reads_demo
def test_products_of_the_cpu_are_left(serve: Any) -> None:
    """They are packed for oneDNN: the norms around them fuse."""
    on = serve(target("e"), "float32", "piecewise", "1", 0, json.dumps({"packed": True}))
    assert "post_attention_norms 8/8" in on.lines[0] and "ple_tail 0/8, feed_forward_tail 8/8, gate_up 0/8" in on.lines[0]
    assert any("ple_tail at 8 sites left: expected linear" in line for line in on.lines)
    assert on.tokens == serve(target("e"), "float32", "piecewise", "0").tokens


@reads_demo
@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_checkpoint(serve: Any, folder: Path, mode: str) -> None:
    """Norms fuse, and the plain products within the per-layer inputs; those that are quantized are left."""
    model = quantized(target("e"), folder / "quantized")
    on, off = (serve(model, "float32", mode, switch) for switch in "10")
    assert "ple_tail 8/8, feed_forward_tail 8/8, gate_up off, linear off" in on.lines[0]
    assert on.tokens == off.tokens


@reads_demo
def test_another_version_is_left(serve: Any) -> None:
    other = serve(target("e"), "float32", "piecewise", "1", 0, json.dumps({"version": "0.31.0"}))
    assert len(other.lines) == 1 and "knows vLLM 0.26, 0.32, found 0.31.0" in other.lines[0]
    assert other.tokens == serve(target("e"), "float32", "piecewise", "0").tokens
