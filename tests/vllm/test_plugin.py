"""The plug-in without vLLM: its switch, its versions, its wrappers around modules that stand in for vLLM's."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig

from gemma4_compile.cli import main
from gemma4_compile.vllm import VARIABLE
from gemma4_compile.vllm.entry import register
from gemma4_compile.vllm.plugin import SUPPORTED, InductorPass, is_supported
from tests.vllm.recorded import load

CONFIG = Gemma4TextConfig(
    hidden_size=64, num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "full_attention"],
    num_kv_shared_layers=1, hidden_size_per_layer_input=32,
)  # fmt: skip


class Fake:
    """vLLM's modules, as far as the plug-in touches them. `log` has the lines written; `calls` the graphs compiled."""

    def __init__(self, version: str, folder: Path):
        self.log: list[tuple[str, str]] = []
        self.calls: list[Any] = []
        calls = self.calls

        class VllmBackend:
            prefix, is_encoder = "backbone", False

            def __init__(self, vllm_config: Any):
                self.vllm_config = vllm_config

            def __call__(self, graph: Any, example_inputs: Any) -> str:
                calls.append(graph)
                return "compiled"

        class CompilationConfig(SimpleNamespace):
            def init_backend(self, vllm_config: Any, prefix: str = "") -> Any:
                return self.backend if self.backend == "inductor" else VllmBackend(vllm_config)

        def line(level: str) -> Any:
            return lambda text, *values: self.log.append((level, text % values))

        logger = SimpleNamespace(info=line("info"), warning=line("warning"))
        self.backend, self.compilation = VllmBackend, CompilationConfig
        self.envs = self._module("vllm.envs", compile_factors=lambda: {"VLLM_A": 1})
        self.modules = {
            "vllm": self._module("vllm", __version__=version, envs=self.envs),
            "vllm.envs": self.envs,
            "vllm.compilation": self._module("vllm.compilation"),
            "vllm.compilation.backends": self._module("vllm.compilation.backends", VllmBackend=VllmBackend),
            "vllm.config": self._module("vllm.config", CompilationConfig=CompilationConfig),
            "vllm.logger": self._module("vllm.logger", init_logger=lambda name: logger),
        }
        self.config = SimpleNamespace(
            model_config=SimpleNamespace(hf_text_config=CONFIG),
            quant_config=None,
            compilation_config=CompilationConfig(
                backend="vllm",
                cache_dir="",
                inductor_compile_config={},
                local_cache_dir=str(folder),
                pass_config=SimpleNamespace(fuse_norm_quant=True, fuse_allreduce_rms=False),
            ),
        )

    @staticmethod
    def _module(name: str, **content: Any) -> ModuleType:
        module = ModuleType(name)
        module.__dict__.update(content)
        return module

    @property
    def warnings(self) -> list[str]:
        return [text for level, text in self.log if level == "warning"]

    def compile(self, name: str = "0.32-e") -> list[str]:
        """As vLLM does it; the names of what is in the graph that its backend got."""
        backend = self.config.compilation_config.init_backend(self.config)
        recorded = load(name)
        assert backend(recorded.module, recorded.inputs(6, torch.bfloat16)) == "compiled"
        return [str(node.target) for node in self.calls[-1].graph.nodes]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def installed(version: str = "0.32.0", switch: str = "1") -> Fake:
        found = Fake(version, tmp_path)
        for name, module in found.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setenv(VARIABLE, switch)
        register()
        return found

    return installed


def test_off_costs_nothing() -> None:
    """vLLM calls it in each process, also of those who have the package for other things."""
    code = "import sys; from gemma4_compile.vllm.entry import register; register(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.split() == ["False"], done.stderr


def test_versions() -> None:
    assert all(is_supported(f"{version}.1+cpu") for version in SUPPORTED)
    assert not any(map(is_supported, ("0.25.1", "0.27.0", "0.3.2", "1.32.0", "0.320", "dev")))


@pytest.mark.parametrize(
    ("version", "switch", "warning"),
    [("0.31.0", "1", "knows vLLM 0.26, 0.32, found 0.31.0"), ("0.32.0", "yes", "must be 1 or 0")],
)
def test_what_is_not_known_is_left(fake: Any, version: str, switch: str, warning: str) -> None:
    found = fake(version, switch)
    assert len(found.warnings) == 1 and warning in found.warnings[0]
    assert found.envs.compile_factors() == {"VLLM_A": 1}
    assert not any(name.startswith("gemma4.") for name in found.compile())


def test_switched_off_nothing_is_patched(fake: Any) -> None:
    found = fake(switch="0")
    assert not found.log and found.envs.compile_factors() == {"VLLM_A": 1}


def test_the_whole_graph_is_passed_over(fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fake()
    names = found.compile()
    assert {"gemma4.post_attention_norm", "gemma4.ple_tail_norm", "gemma4.gate_up", "gemma4.linear"} <= set(names)
    (line,) = [text for _, text in found.log]
    for part in (
        "post_attention_norms 3/3",
        "ple_inputs 1/1",
        "ple_tail 3/3",
        "feed_forward_tail 3/3",
        "gate_up 3/3",
        "linear 3/3",
    ):
        assert part in line
    # A graph that vLLM has saved is fused already.
    backend = found.backend(found.config)
    assert backend(found.calls[-1], ()) == "compiled" and len(found.log) == 1

    register()  # vLLM may call it twice
    found.compile()
    assert len(found.log) == 2

    assert main(["vllm-report", "--cache", str(tmp_path)]) == 0
    assert "backbone" in (out := capsys.readouterr().out) and "ple_tail" in out
    assert main(["vllm-report", "--cache", str(tmp_path), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["report"]["fusions"]["ple_tail"] == report["report"]["fusions"]["ple_tail"] | {"expected": 3, "matched": 3}


def test_sites_that_are_left_are_told(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA4_COMPILE_DISABLE", "ple_tail,gate_up")
    found = fake()
    found.config.quant_config = object()
    names = found.compile()
    assert not {"gemma4.ple_tail_norm", "gemma4.gate_up", "gemma4.linear"} & set(names)
    for name in ("ple_tail", "gate_up", "linear"):
        assert f"{name} off" in found.log[0][1]


def test_rotations_that_vllm_fuses_are_left(fake: Any) -> None:
    found = fake()
    found.config.compilation_config.pass_config.enable_qk_norm_rope_fusion = True
    assert "gemma4.qkv_norm_rope" not in found.compile() and "qkv_norm_rope off" in found.log[0][1]


def test_other_models_are_left(fake: Any) -> None:
    found = fake()
    found.config.model_config.hf_text_config = SimpleNamespace(model_type="llama")
    assert not any(name.startswith("gemma4.") for name in found.compile()) and not found.log


def test_encoders_are_left(fake: Any) -> None:
    found = fake()
    found.backend.is_encoder = True
    assert not any(name.startswith("gemma4.") for name in found.compile()) and not found.log


def test_drafters_promise_nothing(fake: Any) -> None:
    found = fake()
    found.backend.prefix = "eagle_head"
    found.compile()
    assert "eagle_head" in found.log[0][1] and "ple_tail 0/0" in found.log[0][1]


def test_caches_are_kept_apart(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our sources and by the fusions that are on, and from those of vLLM alone."""
    keys = set()
    for disabled in ("", "gate_up"):
        monkeypatch.setenv("GEMMA4_COMPILE_DISABLE", disabled)
        factors = fake().envs.compile_factors()
        assert factors.keys() == {"VLLM_A", VARIABLE}
        keys.add(factors[VARIABLE])
    assert len(keys) == 2


def test_a_chosen_folder_is_not_shared(fake: Any) -> None:
    found = fake()
    compilation = found.config.compilation_config
    for chosen, own in (("/chosen", True), ("/root/torch_compile_cache/1a2b", False), ("", False)):
        compilation.cache_dir = chosen
        found.compile()
        found.compile()  # the second graph of a model, as a drafter's
        assert (compilation.cache_dir != chosen) == own
        assert compilation.cache_dir.startswith(chosen) and compilation.cache_dir.count("gemma4_compile") == own


def test_without_vllms_backend_inductor_calls_our_pass(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma4_compile.vllm import native, norms

    monkeypatch.setattr(native, "RAISE", norms.RaiseNorms())
    monkeypatch.setattr(native, "LOWER", norms.LowerNorms())
    found = fake()
    config = found.config.compilation_config
    config.backend = "inductor"
    assert config.init_backend(found.config) == "inductor"
    ours = config.inductor_compile_config["pre_grad_custom_pass"]
    assert isinstance(ours, InductorPass) and ours.uuid() == found.envs.compile_factors()[VARIABLE]
    recorded = load("0.32-e")
    ours(recorded.graph)
    assert "ple_tail 3/3" in found.log[0][1]

    config.inductor_compile_config["pre_grad_custom_pass"] = other = object()
    config.init_backend(found.config)
    assert config.inductor_compile_config["pre_grad_custom_pass"] is other and "taken already" in found.log[-1][1]


def test_no_report_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-report", "--cache", str(tmp_path)]) == 1
    assert "no report" in capsys.readouterr().err
