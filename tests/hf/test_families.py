"""gemma4_unified, the 12B's classes: sites, geometry and tokens as of gemma4."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4_compile import optimize, report
from gemma4_compile.geometry import geometry
from gemma4_compile.hf.assistant import assistant_class
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
from gemma4_compile.hf.families import GEMMA4, UNIFIED, family_of
from gemma4_compile.hf.loading import assistant_config, checkpoint, load, text_part
from gemma4_compile.hf.parallel import plan
from gemma4_compile.hf.vision import load_vision, vision_part
from tests.models import prompt, tiny_multimodal, tiny_unified
from tests.passes.harness import passes_only


def test_sites_of_each_layer() -> None:
    """The patterns are captured from gemma4's modules, and find gemma4_unified's."""
    plain, model = (text_part(tiny_unified().requires_grad_(False)) for _ in range(2))
    model = passes_only(model)
    ids = prompt(2, 9)
    with torch.inference_mode():
        for keep in (0, 1):
            torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, plain(ids, logits_to_keep=keep).logits)
        again, wanted = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, plain))
    assert again.tolist() == wanted.tolist()
    found = report(model)
    for name in ("qkv_norm_rope", "post_attention_norms", "feed_forward_tail", "gate_up"):
        assert found.fusions[name].matched == found.fusions[name].expected == 4, name
    assert found.calls == {"packed steps": found.calls["packed steps"]}


def test_geometry_at_real_size() -> None:
    found = geometry(UNIFIED.text_config(**TEXT_CONFIGS["12B"]))
    assert len(found.layers) == 48 and not found.per_layer_input and not found.experts
    kinds = {(layer.kind, layer.kv_heads, layer.head_dim, layer.k_eq_v) for layer in found.layers}
    assert kinds == {("sliding_attention", 8, 256, False), ("full_attention", 1, 512, True)}
    assert all(not layer.shares_kv for layer in found.layers)
    # 11,959,730,224 numbers are published; the rest is what embeds images and sounds.
    with torch.device("meta"):
        model = UNIFIED.causal(UNIFIED.text_config(**TEXT_CONFIGS["12B"]))
    text = sum(p.numel() for p in model.parameters())
    assert 11.8e9 < text < 11_959_730_224
    config = assistant_config("12B")
    assert type(config) is UNIFIED.assistant_config
    with torch.device("meta"):
        assistant = assistant_class(UNIFIED)(config)
    assistant.tie_weights()
    assert round(sum(p.numel() for p in assistant.parameters()) / 1e6) == 423  # as published


@pytest.mark.parametrize("ranks", (1, 2, 4))
def test_its_heads_can_be_divided(ranks: int) -> None:
    """One KV head of full layers is the same on all ranks; all else is divided."""
    found = plan(UNIFIED.text_config(**TEXT_CONFIGS["12B"]), ranks)
    assert found == "auto" if ranks == 1 else found["model.layers.*.self_attn.k_proj"]


def test_checkpoints_are_read_whole_and_in_parts(tmp_path: Path) -> None:
    model = tiny_unified()
    model.save_pretrained(tmp_path)
    assert checkpoint(tmp_path) == (tmp_path, "gemma4_unified")
    text, _ = load(tmp_path, text_only=True)
    assert type(text) is UNIFIED.causal
    part, wanted = load_vision(tmp_path, torch.float32, torch.device("cpu")), vision_part(model)
    assert part is not None and wanted is not None
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(part.state_dict()[name], tensor), name


def test_a_checkpoint_of_a_tower_is_read_in_parts(tmp_path: Path) -> None:
    model = tiny_multimodal("e")
    model.save_pretrained(tmp_path)
    part, wanted = load_vision(tmp_path, torch.bfloat16, torch.device("cpu")), vision_part(model)
    assert part is not None and wanted is not None
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(part.state_dict()[name], tensor.bfloat16()), name
    assert part.vision_tower is not None
    rotary: Any = part.vision_tower.encoder.rotary_emb  # type: ignore[union-attr]
    assert rotary.inv_freq.dtype == torch.float32
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="the vision part must be whole"):
        load_vision(tmp_path, torch.float32, torch.device("cpu"))


def test_families_by_type() -> None:
    assert family_of("gemma4") is GEMMA4 and family_of("gemma4_unified_text") is UNIFIED and family_of("llama") is None


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="optimize.. takes Gemma4ForCausalLM"):
        optimize(torch.nn.Linear(2, 2))
