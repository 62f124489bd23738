"""Pieces: how many are unique, what makes two equal; saved, loaded by another process, and refused when broken."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4_compile import OptimizeConfig, optimize, report
from gemma4_compile.backend import Backend
from gemma4_compile.geometry import geometry
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
from gemma4_compile.hf.loading import random_model
from gemma4_compile.packed import compile, program
from gemma4_compile.packed.attention import NAME
from gemma4_compile.packed.compile import compile_program
from gemma4_compile.packed.inputs import Request
from gemma4_compile.packed.program import Program, fingerprint, load
from gemma4_compile.runtime.worker.model import PackedModel
from tests.models import tiny
from tests.runtime.served import memory, packed

# Widths are made small, for memory and time of CI: kinds of the layers and their order are the released ones. Of two models
# that share KV, one has its full depth, and of two that do not. In the others each kind of layer follows whatever it can.
NARROW: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
RELEASED: dict[str, tuple[int, int, int, dict[str, Any]]] = {  # pieces, unique ones, layers that share KV
    "E2B": (36, 9, 20, {"vocab_size_per_layer_input": 64}),
    "E4B": (13, 9, 6, {"vocab_size_per_layer_input": 64}),
    "26B-A4B": (31, 5, 0, {"num_experts": 16, "moe_intermediate_size": 64}),
    "31B": (7, 5, 0, {"num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2}),
}


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No piece is compiled, and so no program saved."""
    monkeypatch.setattr(compile, "_compile_piece", lambda piece, backend: None)
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "31B")) for name in RELEASED])
def test_unique_pieces_of_the_released_models(name: str, traced_only: None) -> None:
    """A piece more than layers, and as few unique ones as the kinds of layers and their order allow."""
    pieces, unique, shared, narrow = RELEASED[name]
    kinds = TEXT_CONFIGS[name]["layer_types"]
    if pieces <= len(kinds):
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * (pieces // 3)
    layers: dict[str, Any] = {"num_hidden_layers": len(kinds), "layer_types": kinds, "num_kv_shared_layers": shared}
    model = random_model(name, **NARROW, **narrow, **layers).requires_grad_(False)
    if model.config.enable_moe_block:
        model.set_experts_implementation("grouped_mm")
    config = OptimizeConfig()
    # At this depth PyTorch's cache pays, which conftest.py switches off.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=True):
        made = compile_program(model, Backend(config, config.enabled()), geometry(model.config))
    assert (made.spec.pieces, made.spec.unique_pieces) == (pieces, unique)
    ops = Counter(call.op for call in made.spec.calls if not call.piece)
    owners = sum(not layer.shares_kv for layer in geometry(model.config).layers)
    assert owners == pieces - 1 - shared
    assert ops == Counter(attention_qkv=owners, attention=shared)
    assert not any(call.host for call in made.spec.calls)
    assert len(made.spec.record.matched("experts")) == (30 if model.config.enable_moe_block else 0)
    assert made.spec.model == fingerprint(model), "the switches of the trace are no choice of the user's"


def test_equal_layers_share_their_piece(traced_only: None) -> None:
    """Sliding layers of the tiny model in a row: the second boundary repeats the first."""
    kinds = ["sliding_attention"] * 4 + ["full_attention"]
    model = PackedModel(optimize(tiny("dense", num_hidden_layers=5, layer_types=kinds).requires_grad_(False)))
    keys = [call.piece for call in model.program.spec.calls if call.piece]
    assert len(keys) == 6 and len({keys[1], keys[2], keys[3]}) == 1 and len(set(keys)) == 4
    other = PackedModel(
        optimize(tiny("dense", num_hidden_layers=5, layer_types=kinds, rms_norm_eps=1e-5).requires_grad_(False))
    )
    assert not set(keys) & {call.piece for call in other.program.spec.calls}, "a constant of the graph is part of the key"


@pytest.mark.parametrize("where", ["config", "environment"])
def test_without_attention_qkv(where: str, traced_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in the pieces, and every layer calls attention."""
    monkeypatch.setenv("GEMMA4_COMPILE_DISABLE", "attention_qkv" if where == "environment" else "")
    config = OptimizeConfig(disable=("attention_qkv",) if where == "config" else ())
    model = tiny("e").requires_grad_(False)
    made = compile_program(model, Backend(config, config.enabled()), geometry(model.config))
    assert [call.op for call in made.spec.calls if not call.piece] == ["attention"] * 4
    assert (made.spec.pieces, made.spec.unique_pieces) == (5, 5)


def test_report(traced_only: None) -> None:
    model = optimize(tiny("e").requires_grad_(False))
    assert report(model).fusions["attention_qkv"].expected == 0, "no packed step yet"
    PackedModel(model)
    found = report(model)
    assert found.fusions["attention_qkv"].expected == found.fusions["attention_qkv"].launches_saved == 2
    assert (found.pieces, found.unique_pieces) == (5, 5)
    assert found.graphs_compiled + found.loaded == 1
    assert all(f.matched == f.expected for f in found.fusions.values() if f.enabled)
    assert "1 packed steps" in str(found) and "5 pieces in all, 5 unique" in str(found)


# First a packed step, then a call of another model through torch.compile.
_SCRIPT = """
import json, sys, torch
from torch._dynamo.utils import counters
from gemma4_compile import OptimizeConfig, optimize, report
from gemma4_compile.packed.inputs import PlainKV, Request
from gemma4_compile.runtime.worker.model import PackedModel
from tests.models import prompt, tiny
model = optimize(tiny(sys.argv[1]).requires_grad_(False))
counters.clear()  # of the patterns, which are traced from Hugging Face's modules
step = PackedModel(model)
kv = PlainKV(step.geometry, 2, 64, torch.float32, "cpu")
requests, texts = [Request([5, 6, 7, 8, 9]), Request([20] * 13)], [[], []]
for _ in range(6):
    tokens = step(kv.inputs(requests))[0].argmax(-1).tolist()
    requests = [Request([t], r.seen + len(r.tokens)) for t, r in zip(tokens, requests)]
    texts = [text + [token] for text, token in zip(texts, tokens)]
found = report(model)
packed = {
    "texts": texts, "compiled": step.program.compiled, "traced": counters["stats"]["calls_captured"],
    "misses": counters["inductor"]["fxgraph_cache_miss"],
    "graphs": found.graphs_compiled, "loaded": found.loaded,
    "matched": {name: [f.matched, f.expected] for name, f in found.fusions.items() if f.enabled},
}
counters.clear()
model = optimize(tiny("dense"), OptimizeConfig(packed=False))
with torch.no_grad():
    model(prompt(2, 5))
fusions = report(model).fusions.values()
assert all(f.matched == f.expected for f in fusions if f.enabled), fusions
print(json.dumps([packed, counters["aot_autograd"]["autograd_cache_hit"]]))
"""


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What _SCRIPT prints in a process, and in another after it, which finds the caches warm."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, "-c", _SCRIPT, "e"]
    runs = (subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(2))
    return [json.loads(done.stdout.splitlines()[-1]) for done in runs]


@pytest.mark.slow
def test_a_second_process_compiles_nothing(in_turn: list[Any]) -> None:
    """The same tokens and the same report, without a trace, a graph or a piece compiled."""
    (first, _), (second, _) = in_turn
    assert first["compiled"] == first["misses"] > 0 and first["graphs"] == 1 and first["traced"] > 0
    assert (second["compiled"], second["misses"], second["graphs"], second["traced"]) == (0, 0, 0, 0)
    assert second["loaded"] == 1
    assert second["texts"] == first["texts"] and second["matched"] == first["matched"]


@pytest.mark.slow
def test_the_report_is_true_on_a_warm_cache(in_turn: list[Any]) -> None:
    """Each process has asserted that its report is; the second found its graph in the cache."""
    assert [hits for _, hits in in_turn] == [0, 1]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "program"
    packed("dense").program.save(folder)
    return folder


@pytest.fixture
def compiled_before(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """Whatever is compiled, it is the program of the tiny dense model, which exists. How often, in the end."""
    calls: list[Program] = []

    def compile_program(*arguments: Any) -> Program:
        calls.append(packed("dense").program)
        return calls[-1]

    packed("dense")
    monkeypatch.setattr(compile, "compile_program", compile_program)
    return calls


def test_save_and_load(saved: Path) -> None:
    """Weights are not stored: another model of the same config binds its own."""
    other = tiny("dense", seed=9).requires_grad_(False)
    loaded = load(saved, other)
    assert loaded.compiled == 0 and loaded.spec.unique_pieces == 3
    assert sorted(path.suffix for path in saved.iterdir()) == [".json", ".piece", ".piece", ".piece"]
    kv = memory("dense")
    actual = loaded(kv.inputs([Request([5, 6, 7])]))[0, 0]
    with torch.no_grad():
        expected = other(torch.tensor([[5, 6, 7]])).logits[0, -1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def break_piece(folder: Path) -> None:
    next(folder.glob("*.piece")).write_bytes(b"half")


def lose_piece(folder: Path) -> None:
    next(folder.glob("*.piece")).unlink()


def break_json(folder: Path) -> None:
    (folder / "program.json").write_text("{")


def age(folder: Path) -> None:
    text = (folder / "program.json").read_text()
    (folder / "program.json").write_text(text.replace(f'"format": {program._FORMAT}', '"format": 0'))


def rename_weight(folder: Path) -> None:
    text = (folder / "program.json").read_text()
    (folder / "program.json").write_text(text.replace("model.norm.weight", "model.other.weight"))


@pytest.mark.parametrize("harm", [break_piece, lose_piece, break_json, age, rename_weight])
def test_broken_files_are_compiled_anew(harm: Any, saved: Path, compiled_before: list[Program]) -> None:
    harm(saved)
    model = tiny("dense").requires_grad_(False)
    with pytest.raises(ValueError, match="a saved program must be whole and of this model, got .*; delete it"):
        load(saved, model)
    config = OptimizeConfig()
    with pytest.warns(UserWarning, match="compiles anew"):
        compile.open_program(model, Backend(config, config.enabled()), geometry(model.config), saved)
    assert len(compiled_before) == 1
    assert load(saved, model).compiled == 0, "whole again"


def test_other_models_have_other_files(tmp_path: Path, compiled_before: list[Program]) -> None:
    """The folder's name changes with whatever the code depends on, and with nothing else."""
    config = OptimizeConfig(cache_dir=str(tmp_path))
    for options in ({}, {"seed": 4}, {"rms_norm_eps": 1e-5}, {"dtype": torch.bfloat16}):
        PackedModel(optimize(tiny("dense", **options).requires_grad_(False), config))
    PackedModel(optimize(tiny("dense").requires_grad_(False), OptimizeConfig(cache_dir=str(tmp_path), disable=("ple_tail",))))
    assert len(list(tmp_path.iterdir())) == len(compiled_before) == 4
    hooked = tiny("dense").requires_grad_(False)
    hooked.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 2)
    PackedModel(optimize(hooked, config))  # a hook is part of the graph, and of no name: neither saved nor loaded
    assert len(list(tmp_path.iterdir())) == 4 and len(compiled_before) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "rms_norm_eps", 1e-4),
        lambda model: model.set_experts_implementation("batched_mm"),
        lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)),
        lambda model: model.model.layers[0].register_forward_hook(lambda module, inputs, output: output),
    ],
    ids=["config", "experts", "untied", "hook"],
)
def test_another_model_is_refused(change: Any, saved: Path) -> None:
    model = tiny("dense").requires_grad_(False)
    change(model)
    with pytest.raises(ValueError, match="a saved program must be whole and of this model"):
        load(saved, model)


def test_limits() -> None:
    """Rows and tokens times the widest tensor, 192 in the double-wide MLPs behind the boundary, stay within 32-bit offsets."""
    program = packed("e").program
    limits = dict(program.spec.limits)
    assert limits.pop("rows") == (2**31 - 1) // 192
    assert limits and all(2**20 < most < 2**31 for most in limits.values())
    inputs = memory("e").inputs([Request([5])])
    inputs["rows"] = torch.zeros(1, dtype=torch.int64).expand(2**24)
    with pytest.raises(ValueError, match="rows must have at most 11184810 elements, .* got 16777216; split the step"):
        program(inputs)


def test_files_that_cannot_be_written_are_a_warning(tmp_path: Path, compiled_before: list[Program]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not save the compiled program"):
        PackedModel(optimize(tiny("dense").requires_grad_(False), OptimizeConfig(cache_dir=str(tmp_path / "file"))))


def test_the_attention_function_is_registered() -> None:
    from transformers import AttentionInterface

    assert NAME in AttentionInterface().valid_keys()
