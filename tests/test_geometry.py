"""Geometry of the released checkpoints, against what their modules turn out to be."""

import argparse
from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig

from gemma4_compile.cli.common import load_model
from gemma4_compile.geometry import geometry
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS, UNIFIED_NAMES, VISION_CONFIGS
from gemma4_compile.hf.loading import cut, random_model, random_multimodal
from gemma4_compile.passes import SWITCHES
from tests.models import CONFIGS, tiny


def test_e2b() -> None:
    found = geometry(Gemma4TextConfig(**TEXT_CONFIGS["E2B"]))
    assert len(found.layers) == 35 and found.per_layer_input == 256 and found.experts == 0
    assert [layer.index for layer in found.layers if layer.shares_kv] == list(range(15, 35))
    assert found.layers[34].kv_from == 14 and found.layers[33].kv_from == 13
    assert (found.layers[0].head_dim, found.layers[4].head_dim) == (256, 512)
    assert (found.layers[14].intermediate, found.layers[15].intermediate) == (6144, 12288)
    assert {name: len(fusion.sites(found)) for name, fusion in SWITCHES.items()} == {
        "qkv_norm_rope": 35, "post_attention_norms": 35, "geglu": 35, "route": 0, "experts": 0, "feed_forward_tail": 35,
        "ple_inputs": 1, "ple_tail": 35, "gate_up": 35, "linear": 35, "yoco": 1,
        "all_reduce_norm": 0, "attention_qkv": 15, "norm_gate_up": 35, "norm_ple": 35, "norm_linear": 33,
    }  # fmt: skip


def test_26b() -> None:
    found = geometry(Gemma4TextConfig(**TEXT_CONFIGS["26B-A4B"]))
    full, sliding = found.layers[5], found.layers[0]
    assert (full.kv_heads, full.head_dim, full.k_eq_v) == (2, 512, True)
    assert (sliding.kv_heads, sliding.head_dim, sliding.k_eq_v) == (8, 256, False)
    assert (found.experts, found.top_k) == (128, 8)
    assert not any(layer.shares_kv for layer in found.layers)


@pytest.mark.parametrize("kind", CONFIGS)
def test_agrees_with_the_modules(kind: str) -> None:
    model = tiny(kind)
    for layer, module in zip(geometry(model.config).layers, model.model.layers, strict=True):
        attention = module.self_attn
        assert layer.shares_kv == attention.is_kv_shared_layer
        assert layer.head_dim == attention.head_dim
        assert layer.intermediate == module.mlp.gate_proj.out_features
        if not layer.shares_kv:
            assert layer.kv_heads == attention.k_proj.out_features // attention.head_dim
            assert layer.k_eq_v == (attention.v_proj is None)


@pytest.mark.parametrize(("layers", "least"), [(3, 4), (36, 4), (1, 4)])
def test_cut_refuses(layers: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"layers must be {least} to 35 for this config, got {layers}"):
        cut(TEXT_CONFIGS["E2B"], layers)


def test_random_models_are_repeatable_and_sized() -> None:
    first, second = (random_model("31B", 2, vocab_size=32, hidden_size=32, intermediate_size=16, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    weight = first.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.bfloat16 and abs(weight.float().std().item() - 0.02) < 2e-3
    assert first.lm_head.weight is first.model.embed_tokens.weight
    with pytest.raises(ValueError, match="a config must be one of E2B"):
        random_model("no/such/config.json")


def test_random_towers_are_sized_and_their_bounds_clip() -> None:
    """Of each released model that has a tower; where its linears are clipped, by bounds that some numbers do not pass."""
    assert VISION_CONFIGS.keys() == TEXT_CONFIGS.keys() - set(UNIFIED_NAMES)
    small: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 16}
    for name, width in (("E2B", 768), ("31B", 1152)):
        model = random_multimodal(name, 4, vision={"num_hidden_layers": 1}, **small)
        tower = model.model.vision_tower
        clipped = [module for module in tower.modules() if hasattr(module, "input_min")]
        assert tower.config.hidden_size == width and len(clipped) == (7 if name == "E2B" else 0)
        outside: list[float] = []

        def look(module: Any, args: tuple[torch.Tensor], outside: list[float] = outside) -> None:
            outside.append((args[0].abs() > module.input_max).float().mean().item())

        for module in clipped:
            module.register_forward_pre_hook(look)
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]
        with torch.no_grad():
            states = tower(torch.rand(1, 36, 768).bfloat16(), places).last_hidden_state
        assert states.shape == (4, width) and states.isfinite().all()
        assert all(0 < share < 0.05 for share in outside) and len(outside) == len(clipped)
    with pytest.raises(ValueError, match="a vision tower has one of E2B, E4B, 26B-A4B, 31B, .* got 12B without"):
        random_multimodal("12B")


def test_inspect_takes_the_tower_of_the_model_that_is_named() -> None:
    options = argparse.Namespace(model="26B-A4B", step="images", layers=2, device="cpu", dtype=None, enable="", disable="")
    model, _ = load_model(options)
    tower = model.model.vision_tower.config
    assert (tower.num_hidden_layers, tower.hidden_size, tower.head_dim) == (2, 1152, 72)
