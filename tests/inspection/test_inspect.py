"""inspect(): the catalogue of real compilations on the CPU, the files, and what happens when it cannot be."""

import dataclasses
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gemma4_compile import OptimizeConfig, inspect, optimize, passes
from gemma4_compile.cli import main
from gemma4_compile.geometry import geometry
from gemma4_compile.hf.step_cache import CACHE
from gemma4_compile.inspection import data, tables
from gemma4_compile.inspection.catalogue import layers_of
from gemma4_compile.inspection.files import ENTRIES, whole_or_nothing
from gemma4_compile.patterns import post_attention_norms
from gemma4_compile.patterns.rewrite import Rewrite
from scripts import dump_inductor
from tests.models import CONFIGS, VISION, prompt, tiny, tiny_multimodal

ops = torch.ops.gemma4


slow = pytest.mark.slow
each_kind, e, moe = (
    pytest.mark.parametrize("kind", [pytest.param(kind, marks=slow) for kind in kinds])
    for kinds in (["e", "moe"], ["e"], ["moe"])
)
Compared = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """The tiny model of a kind beside plain Inductor, and the folder of it."""

    @functools.cache
    def of(kind: str) -> tuple[Any, Path]:
        out = tmp_path_factory.mktemp(kind)
        return inspect(tiny(kind), out=out, compare="plain", context=6, name=kind), out

    return of


@each_kind
def test_every_layer_has_its_kernels(compared: Compared, kind: str) -> None:
    found, _ = compared(kind)
    layers = CONFIGS[kind]["num_hidden_layers"]
    assert [layer.index for layer in found.layers] == list(range(layers))
    for variant in found.variants:
        for layer in range(layers):
            counts = Counter(kernel.kind for kernel in variant.of_layer(layer))
            assert counts["attention"] == 1 and counts["gemm"] + counts["ours"] >= 5, (variant.name, layer, counts)
        assert [kernel.index for kernel in variant.kernels] == list(range(len(variant.kernels)))
    names = Counter(kernel.fusion for kernel in found.ours.kernels if kernel.kind == "ours")
    if kind == "e":  # o and down of each layer, the first q, k, v, the PLE projection, the head; the last tail
        expected = {"norm_gate_up": layers, "norm_ple": layers, "norm_linear": layers - 1, "feed_forward_tail": 1}
        expected |= {"ple_inputs": 1, "qkv_norm_rope": layers, "linear": 2 * layers + 3}
    else:  # q, k, v, o, down and the router of each layer, the head
        expected = {"post_attention_norms": layers, "feed_forward_tail": layers, "gate_up": layers}
        expected |= {"route": 3, "experts": 3, "qkv_norm_rope": 3, "linear": 4 * layers + 1}
    assert names == expected
    assert not any(kernel.kind == "ours" for kernel in found.plain.kernels)


@e
def test_fewer_kernels_than_plain(compared: Compared, kind: str) -> None:
    found, _ = compared(kind)
    for layer in found.layers:
        assert len(found.ours.of_layer(layer.index)) < len(found.plain.of_layer(layer.index))
    tail = next(row for row in found.fusions if row.name == "norm_ple")
    assert tail.sites == 4 and tail.saved >= 8  # norm, gate, product with the input, projection: one op on a CPU


@each_kind
def test_fusions_add_up_to_both_graphs(compared: Compared, kind: str) -> None:
    found, _ = compared(kind)
    assert sum(row.plain for row in found.fusions) == found.plain.launches
    assert sum(row.now for row in found.fusions) == found.ours.launches


@each_kind
def test_kernels_say_where_they_come_from(compared: Compared, kind: str) -> None:
    """Each kernel in a layer has lines of the model, a module of that layer and bytes; a fused op has the lines of its site."""
    found, _ = compared(kind)
    for variant in found.variants:
        for kernel in variant.kernels:
            assert kernel.nodes and kernel.lines and kernel.bytes > 0 and kernel.outputs, kernel
            if kernel.layer is not None and kernel.kind in ("gemm", "attention", "ours"):
                assert f"layers.{kernel.layer}" in kernel.module
    fusion, code = ("norm_ple", "per_layer_input_gate(") if kind == "e" else ("route", "softmax(")
    for kernel in found.ours.kernels:
        if kernel.fusion == fusion:
            assert any(code in line.code and line.file.startswith("transformers/models/gemma4") for line in kernel.lines)


@each_kind
def test_a_kernel_has_no_more_values_than_pointers(compared: Compared, kind: str) -> None:
    """Inductor's provenance names more nodes than a kernel computes: those of the other arguments of the call that it feeds."""
    found, _ = compared(kind)
    for variant in found.variants:
        generated = [kernel for kernel in variant.kernels if kernel.kind == "inductor"]
        assert generated
        for kernel in generated:
            written = len(re.findall(r"^ +(?:const )?\w+\* (?:in_)?out_ptr\d|kernel\(\w+\* in_out_ptr", kernel.code, re.M))
            # Inductor does not say of which kernels compute the experts' mask (transformers 5.17, 2 bytes here) again.
            outputs = [value for value in kernel.outputs if value.bytes > 2]
            assert 1 <= len(outputs) <= max(written, 1), (kernel.name, written, outputs)


@moe
def test_a_product_reads_its_weight_by_name(compared: Compared, kind: str) -> None:
    found, _ = compared(kind)
    for variant in found.variants:
        (down,) = [kernel for kernel in variant.kernels if kernel.module.endswith("layers.1.mlp.down_proj")]
        weight = next(value for value in down.inputs if value.name == "model.layers.1.mlp.down_proj.weight")
        assert weight.shape == (64, 96) and weight.bytes == 64 * 96 * 4
        assert down.bytes == (64 * 96 + 64 + 96) * 4


@moe
def test_plain_and_ours_share_nodes(compared: Compared, kind: str) -> None:
    """What the page highlights: the softmax and topk of the plain graph are what our route op computes."""
    found, _ = compared(kind)
    for layer in (0, 2):  # also behind experts, whose own nodes are others in either graph
        route = next(kernel for kernel in found.ours.kernels if kernel.fusion == "route" and kernel.layer == layer)
        replaced = [kernel for kernel in found.plain.kernels if set(kernel.nodes) & set(route.nodes)]
        assert {kernel.layer for kernel in replaced} == {layer}
        assert any("softmax" in kernel.name for kernel in replaced) and any("topk" in kernel.name for kernel in replaced)


def test_layer_kinds_are_named() -> None:
    labels = [[layer.label for layer in layers_of(geometry(tiny(kind).config))] for kind in ("e", "moe")]
    assert labels[0] == ["sliding", "full", "sliding, shares KV of layer 0", "full, shares KV of layer 1"]
    assert labels[1][0] == "sliding, experts"


@e
def test_files(compared: Compared, kind: str) -> None:
    found, out = compared(kind)
    assert sorted(path.name for path in out.iterdir()) == sorted(set(ENTRIES) - {"trace.json", "trace_plain.json"})
    stages = sorted(path.name for path in (out / "graphs" / "gemma4-compile").glob("*.py"))
    assert stages[0] == "00_dynamo.py" and stages[-1].endswith("_post_grad.py")
    assert len(stages) == len(found.passes) + 2
    fused = next((out / "graphs" / "gemma4-compile").glob("*_ple_tail.diff")).read_text()
    assert "+" in fused and "torch.ops.gemma4.ple_tail" in fused
    assert "torch.ops.gemma4.norm_ple.default(" in (out / "inductor" / "gemma4-compile.py").read_text()
    assert "torch.ops.gemma4" not in (out / "inductor" / "plain.py").read_text()
    decompiled = next((out / "depyf").glob("*.py")).read_text()
    assert "__compiled_fn" in decompiled and "def " in decompiled
    assert json.loads((out / "inspection.json").read_text())["ours"]["kernels"][0]["name"] == found.ours.kernels[0].name
    assert "model.layers.3.mlp.down_proj" in (out / "catalogue.txt").read_text()
    assert "<script" in (out / "report.html").read_text()


@moe
def test_tables(compared: Compared, kind: str) -> None:
    found, _ = compared(kind)
    text = tables.summary(found, layer=2)
    assert "gemma4-compile, layer 2, full, experts" in text and "plain, layer 2, full, experts" in text
    assert "layer 1, sliding" not in text
    assert "torch.ops.gemma4.route.default" in text and "modeling_gemma4.py:" in text


def broken_search(x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    hidden = ops.rms_norm(x, weight, eps) + residual  # the wrong way round
    return hidden, ops.rms_norm(hidden, next_weight, eps)


def test_a_broken_pattern_shows_up_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    form = post_attention_norms.rewrites()[1]
    broken = Rewrite(form.name, broken_search, form.replace, form.inputs, form.guard)
    fusions = [
        dataclasses.replace(fusion, rewrites=lambda: (broken,)) if fusion.name == "post_attention_norms" else fusion
        for fusion in passes._FUSED
    ]
    monkeypatch.setattr(passes, "_FUSED", tuple(fusions))
    found = inspect(tiny("dense"), context=6)
    row = next(row for row in found.passes if row.name == "post_attention_norms")
    assert (row.expected, row.matched) == (2, 0)
    assert [miss.site for miss in row.unmatched] == ["layers.0", "layers.1"]
    for miss in row.unmatched:
        assert "expected rms_norm" in miss.reason
        assert "test_inspect.py:" in miss.pattern
    printed = tables.passes_table(found)
    assert "post_attention_norms did not match at layers.1: expected rms_norm" in printed and "test_inspect.py:" in printed


@slow
def test_an_optimized_model_stays_as_it_is_and_a_warm_cache_hides_nothing() -> None:
    model: Any = tiny("dense")
    optimize(model, OptimizeConfig(disable=("qkv_norm_rope",)))
    ids = prompt(1, 6)
    with torch.inference_mode():
        expected = model(ids).logits  # fills Inductor's cache with this very graph
    installed = model._compiled_call_impl
    first, second = (inspect(model, {"input_ids": ids}) for _ in range(2))
    assert [k.name for k in first.ours.kernels] == [k.name for k in second.ours.kernels] != []
    assert not any(kernel.fusion == "qkv_norm_rope" for kernel in first.ours.kernels)
    assert any(kernel.fusion == "norm_gate_up" for kernel in first.ours.kernels)
    assert model._compiled_call_impl is installed
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected)


@slow
def test_the_callers_cache_is_not_touched() -> None:
    """Both variants, and each repetition, run the same step."""
    model: Any = tiny("dense")
    cache: Any = DynamicCache(config=model.config)
    for layer, (heads, dim) in enumerate(((2, 16), (1, 32))):
        cache.update(torch.randn(1, heads, 3, dim), torch.randn(1, heads, 3, dim), layer)
    found = inspect(model, {"input_ids": prompt(1, 6), CACHE: cache}, compare="plain")
    assert cache.get_seq_length() == 3
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, 3]
    for variant in found.variants:
        for kernel in variant.kernels:
            if kernel.kind == "attention":
                sizes = {size for value in kernel.inputs for size in value.shape}
                assert 9 in sizes and 15 not in sizes


@slow
def test_a_full_window_is_rolled() -> None:
    """The default step of the real models: the static sliding cache is full, and moves whole."""
    model = tiny("dense")
    found = inspect(model, context=20)
    copies = [k for k in found.ours.kernels if any("copy" in op for op in k.ops) and k.layer == 0]
    window = 2 * 8 * 16 * 4  # heads, rows, head dim, fp32
    assert copies and all(any(value.bytes == window for value in kernel.outputs) for kernel in copies)
    assert all(kernel.bytes <= 40 * window for kernel in found.ours.kernels if kernel.kind == "inductor")


@slow
def test_fusions_that_are_off_promise_nothing() -> None:
    found = inspect(tiny("moe"), context=6, config=OptimizeConfig(disable=("route",)), compare="plain")
    rows = {row.name: row for row in found.passes}
    assert rows["route"].expected is None and rows["geglu"].expected is None
    assert not any(row.unmatched for row in found.passes)
    assert rows["post_attention_norms"].expected == rows["post_attention_norms"].matched == 3
    assert "route" not in {row.name for row in found.fusions}


@pytest.mark.parametrize("static_cache", [pytest.param(True, marks=slow), False])
@pytest.mark.parametrize("step", ["decode", pytest.param("prefill", marks=slow)])
def test_other_steps(step: str, static_cache: bool) -> None:
    if step == "prefill" and not static_cache:
        pytest.skip("a prefill starts from an empty cache of either kind")
    found = inspect(tiny("dense"), step=step, batch=2, context=5, static_cache=static_cache)
    assert found.step.startswith(f"{step}, batch 2, context 5, float32")
    rows = 1 if step == "decode" else 5
    attention = next(kernel for kernel in found.ours.kernels if kernel.kind == "attention")
    assert attention.outputs[0].shape[:1] == (2,) and attention.outputs[0].shape[2] == rows


def test_images_in_the_vision_tower() -> None:
    found = inspect(tiny_multimodal("dense"), step="images", batch=2, context=6, name="dense")
    assert found.step == "images, batch 2, 6 soft tokens of 9 patches each, float32"
    layers = VISION["num_hidden_layers"]
    assert [layer.label for layer in found.layers] == ["vision"] * layers
    rows = {row.name: (row.expected, row.matched) for row in found.passes}
    fused = {name: counts for name, counts in rows.items() if name in passes.FUSIONS and counts[1] and name != "geglu"}
    assert fused == {
        "qkv_norm_rope": (layers, layers), "post_attention_norms": (layers, 2 * layers - 1), "feed_forward_tail": (1, 1),
        "gate_up": (layers, layers), "linear": (layers, 3 * layers), "norm_gate_up": (layers, layers),
    }  # fmt: skip
    assert not any(row.unmatched for row in found.passes)
    for layer in range(layers):
        counts = Counter(kernel.kind for kernel in found.ours.of_layer(layer))
        assert counts["attention"] == 1 and counts["ours"] == 6
    assert "gemma4-compile, layer 1, vision" in tables.summary(found, layer=1)


# --- bad input -----------------------------------------------------------------------------------------------------------


def test_a_graph_break_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    model: Any = tiny("dense")
    model.model.layers[1].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(ValueError, match="must compile to one graph, but Dynamo stops") as caught:
        inspect(model, out=tmp_path / "new" / "out", context=6)
    assert "\n" not in str(caught.value) and "; remove what it cannot trace" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_runs_uncompiled_is_refused(tmp_path: Path) -> None:
    model: Any = tiny("dense")
    cache: Any = DynamicCache(config=model.config)
    cache.layers[0].record_past = True
    with pytest.raises(ValueError, match="must compile, but it ran as Hugging Face wrote it.*DynamicSlidingWindowLayer"):
        inspect(model, {"input_ids": prompt(1, 4), CACHE: cache}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders(tmp_path: Path) -> None:
    model = tiny("dense")
    other = tmp_path / "mine.txt"
    other.write_text("keep me")
    with pytest.raises(ValueError, match="must be empty, got .* with files in it; use force"):
        inspect(model, out=tmp_path)
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        inspect(model, out=other)
    with pytest.raises(ValueError, match="must be writable"):
        inspect(model, out="/proc/no/place")
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "graphs" / "stale").mkdir(parents=True)
    inspect(model, out=tmp_path, context=6, force=True)
    assert other.read_text() == "keep me" and (tmp_path / "report.html").read_text() != "old"
    assert not (tmp_path / "graphs" / "stale").exists()


def test_what_was_there_stays_when_an_inspection_fails(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "link").mkdir()
    (tmp_path / "graphs").symlink_to(tmp_path / "link")
    with pytest.raises(RuntimeError), whole_or_nothing(tmp_path) as draft:
        (draft / "report.html").write_text("new")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graphs", "link", "report.html"]
    assert (tmp_path / "report.html").read_text() == "old"
    with whole_or_nothing(tmp_path) as draft:
        (draft / "graphs").mkdir()
    assert not (tmp_path / "graphs").is_symlink() and not (tmp_path / "report.html").exists()


def test_an_error_is_not_hidden_by_another_writer(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_or_nothing(tmp_path / "out") as draft:
        (draft.parent / "other.txt").write_text("of another")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example_inputs": {"input_ids": torch.ones(1, 2), "pixel_values": torch.ones(1)}}, "takes tokens or embeddings"),
        ({"step": "verify"}, "step must be one of decode, prefill, images, got 'verify'"),
        ({"batch": 0}, "batch and context must be at least 1, got 0"),
        ({"compare": "eager"}, 'compare must be "plain" or None'),
        ({"example_inputs": "text"}, "example_inputs must be token ids or a mapping"),
        ({"step": "images"}, "needs a model with a vision tower, got Gemma4ForCausalLM without"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        inspect(tiny("dense"), **arguments)


def test_models() -> None:
    with pytest.raises(TypeError, match="takes Gemma4ForCausalLM"):
        inspect(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="eval mode"):
        inspect(tiny("dense").train())
    with pytest.raises(ValueError, match="inspected with its own config"):
        inspect(optimize(tiny("dense")), config=OptimizeConfig(disable=("route",)))


@slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["moe"]))
    out = tmp_path / "out"
    common = ["inspect", str(config), "--out", str(out), "--device", "cpu", "--context", "6"]
    assert main([*common, "--layer", "3"]) == 1
    err = capsys.readouterr().err
    assert "the layer must be 0 to 2 for this model, got 3; choose one of them" in err and not out.exists()
    assert main([*common, "--layer", "1"]) == 0
    printed = capsys.readouterr().out
    assert "gemma4-compile, layer 1, full, experts" in printed and "report.html" in printed
    assert main(common) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*common, "--force", "--json", "--layer", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {field.name for field in dataclasses.fields(data.Inspection)} == set(found)
    assert {kernel["layer"] for kernel in found["ours"]["kernels"]} == {2}


@slow
@pytest.mark.parametrize("plain", [False, True])
def test_raw_dump(plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["dense"]))
    out = tmp_path / "out"
    arguments = ["dump_inductor", str(config), "--out", str(out), "--device", "cpu", "--context", "6"]
    monkeypatch.setattr(sys, "argv", arguments + ["--plain"] * plain)
    assert dump_inductor.main() == 0
    assert [path.name for path in out.iterdir()] == ["torchinductor"]
    code = next(out.rglob("output_code.py")).read_text()
    assert ("torch.ops.gemma4" in code) is not plain
    assert next(out.rglob("ir_post_fusion.txt")).stat().st_size > 0
    assert dump_inductor.main() == 1  # the folder is not empty
