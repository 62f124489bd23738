"""report: true counts, true reasons. On a warm cache too: see runtime/test_program.py."""

from typing import Any

import pytest
import torch

from gemma4_compile import OptimizeConfig, optimize, report
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
from gemma4_compile.hf.loading import random_model
from gemma4_compile.passes import FUSIONS
from gemma4_compile.patterns import rms_norm
from tests.models import prompt, tiny
from tests.test_optimize import generate, passes_only

ALL = OptimizeConfig(enable=tuple(FUSIONS), packed=False)


# What no pattern looks at is made small: memory and time of CI. Head dims and kinds of layers are the real ones.
SMALL: dict[str, dict[str, Any]] = {
    "E2B": {"vocab_size_per_layer_input": 64, "intermediate_size": 512},
    "E4B": {"vocab_size_per_layer_input": 64, "intermediate_size": 512},
    "26B-A4B": {"num_experts": 16, "moe_intermediate_size": 64, "intermediate_size": 512},
    "12B": {"intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 1},
    "31B": {"intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2},
}


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.oldest), torch.bfloat16])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "31B")) for name in SMALL])
def test_every_site_of_the_released_models(name: str, dtype: torch.dtype) -> None:
    """Prefill and decode, lengths that change, a batch of 4, and of 1 in the dtype of the releases; all fusions on."""
    assert SMALL.keys() == TEXT_CONFIGS.keys()
    layers = 4 if TEXT_CONFIGS[name].get("num_kv_shared_layers") else 2
    model = random_model(name, layers=layers, dtype=dtype, vocab_size=64, **SMALL[name])
    moe = getattr(model.config, "enable_moe_block", False)
    if moe:
        model.set_experts_implementation("grouped_mm")
    passes_only(model, ALL)
    batches = (1, 4) if dtype == torch.bfloat16 else (4,)
    for batch in batches:
        for tokens in (5, 7):
            generate(model, prompt(batch, tokens) % 60 + 3, max_new_tokens=3, min_new_tokens=3)
    result = report(model)
    for fusion in result.fusions.values():
        assert fusion.matched == fusion.expected, str(result)
    assert result.graphs_compiled == 2 * len(batches)
    assert result.fusions["qkv_norm_rope"].expected == layers
    assert result.fusions["route"].expected == (layers if moe else 0)


def test_a_fusion_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA4_COMPILE_DISABLE", "ple_tail, route")
    model = passes_only(tiny("e"), OptimizeConfig(disable=("qkv_norm_rope",)))
    monkeypatch.delenv("GEMMA4_COMPILE_DISABLE")
    with torch.no_grad():
        model(prompt(2, 5))
    result = report(model)
    assert not result.fusions["ple_tail"].enabled and "GEMMA4_COMPILE_DISABLE" in result.fusions["ple_tail"].note
    assert "disabled in the config" in str(result)
    assert result.fusions["post_attention_norms"].matched == 4


def test_nothing_compiled_yet() -> None:
    result = report(optimize(tiny("dense")))
    assert result.graphs_compiled == 0 and result.fusions["qkv_norm_rope"].matched == 0
    assert "call the model once" in str(result)


def test_a_failing_guard_is_a_reason() -> None:
    """Norm weights of another dtype: no kernel for mixed dtypes, so the site stays with Inductor, and the report says why."""
    model = tiny("dense").bfloat16()
    layer = model.model.layers[1]
    layer.post_attention_layernorm.weight.data = layer.post_attention_layernorm.weight.data.float()
    with torch.no_grad():
        passes_only(model)(prompt(2, 5))
    fusion = report(model).fusions["post_attention_norms"]
    assert (fusion.expected, fusion.matched) == (2, 1)
    (unmatched,) = fusion.unmatched
    assert unmatched.site == "layers.1" and "dtypes differ" in unmatched.reason and "weight float32" in unmatched.reason


def test_a_pattern_broken_on_purpose_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = passes_only(tiny("dense"))
    monkeypatch.setattr(rms_norm, "rewrites", tuple)
    import gemma4_compile.passes as passes
    from gemma4_compile.passes.base import PatternPass

    broken = PatternPass("rms_norm", lambda: rms_norm.rewrites())
    monkeypatch.setattr(passes, "RAISE_RMS_NORM", broken)
    with torch.no_grad():
        model(prompt(2, 5))
    fusion = report(model).fusions["post_attention_norms"]
    assert fusion.matched == 0 and len(fusion.unmatched) == 2
    assert "expected rms_norm" in fusion.unmatched[0].reason
