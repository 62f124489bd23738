"""Pass tests of experts: exact counts, numerics, near misses, dynamic shapes; and the switch of the implementation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

import gemma4_compile
from gemma4_compile import OptimizeConfig
from gemma4_compile.hf.experts import PREFIX, fused_experts, objection
from tests.models import DEVICE, prompt, tiny
from tests.passes.harness import Run, assert_same, compile_passes, passes_only

FUSION = "experts"


def passed(model: Any, *lengths: int, enabled: bool = True) -> tuple[Run, list[Tensor]]:
    """The passes over a model whose experts are ours, and its logits for prompts of some lengths."""
    model.requires_grad_(False)
    done = compile_passes(lambda ids: model(ids, use_cache=False).logits, {FUSION} if enabled else ())
    logits = []
    with torch.no_grad(), fused_experts(model.config, enabled):
        for length in lengths or (6,):
            ids = prompt(2, length)
            torch._dynamo.mark_dynamic(ids, 1) if lengths else None
            logits.append(done.call(ids))
    return done, logits


def plain(model: Any, length: int = 6) -> Tensor:
    with torch.no_grad():
        return model(prompt(2, length), use_cache=False).logits


def reasons(done: Run) -> list[str]:
    (record,) = done.records
    assert not record.matched(FUSION) and not done.ops["experts"] and not done.ops["leave_experts"]
    return [miss.reason for miss in record.misses if miss.fusion == FUSION]


def test_exact_count() -> None:
    done, _ = passed(tiny("moe"))
    assert done.ops["experts"] == 3
    assert [site.path for site in done.records[0].matched(FUSION)] == [f"model.layers.{i}.experts" for i in range(3)]
    assert not any("grouped" in str(node.target) for node in done.graphs[0].nodes)
    for kind in ("e", "dense"):
        done, _ = passed(tiny(kind))
        assert not done.ops["experts"] and not any(miss.fusion == FUSION for miss in done.records[0].misses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_unfused(dtype: torch.dtype) -> None:
    model = tiny("moe", dtype)
    done, (logits,) = passed(model)
    assert done.ops["experts"] == 3
    assert_same(logits, plain(model))


@pytest.mark.slow
def test_dynamic_shape() -> None:
    model = tiny("moe")
    done, logits = passed(model, 6, 9, 3)
    assert done.ops["experts"] == 3
    for length, actual in zip((6, 9, 3), logits, strict=True):
        assert_same(actual, plain(model, length))


def other_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.experts.act_fn = ACT2FN["silu"]


def hooked_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.experts.act_fn.register_forward_hook(lambda module, inputs, output: output * 2)


def narrower_weights(model: Any) -> None:
    """Weights in another dtype than the states, as in quantized experts; cast where they are read."""
    for layer in model.model.layers:
        layer.experts.down_proj = nn.Parameter(layer.experts.down_proj.to(torch.bfloat16), requires_grad=False)


class Subclass(Tensor):
    """A tensor that would compute something of its own, as torchao's are."""


def subclassed_weights(model: Any) -> None:
    for layer in model.model.layers:
        layer.experts.gate_up_proj = nn.Parameter(layer.experts.gate_up_proj.detach().as_subclass(Subclass))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_activation, "the activation must be gelu_pytorch_tanh, found gelu_pytorch_tanh as SiLU"),
        (hooked_activation, "act_fn has hooks"),
    ],
)
def test_near_miss(change: Callable[[Any], None], reason: str) -> None:
    model = tiny("moe")
    change(model)
    done, (logits,) = passed(model)
    found = reasons(done)
    assert len(found) == 3 and all(reason in one for one in found), found
    assert_same(logits, plain(model))


@pytest.mark.parametrize(("change", "reason"), [(narrower_weights, "dtypes differ"), (subclassed_weights, "Subclass")])
def test_weights_that_the_op_does_not_know(change: Callable[[Any], None], reason: str) -> None:
    model = tiny("moe")
    change(model)
    assert reason in objection(model.model.layers[0].experts, torch.ones(2, 64, device=DEVICE))


def test_no_kernel_for_double() -> None:
    experts = tiny("moe").double().model.layers[0].experts
    assert "no kernel for torch.float64" in objection(experts, torch.ones(2, 64, device=DEVICE).double())


class Derived(Gemma4TextExperts):
    """May compute anything."""


def test_other_experts() -> None:
    experts = Derived(tiny("moe").config).to(DEVICE)
    assert "found Derived" in objection(experts, torch.ones(2, 64, device=DEVICE))


def test_the_users_own_implementation_is_kept() -> None:
    def mine(module: nn.Module, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return states * weights.sum(-1, keepdim=True).to(states.dtype)

    ALL_EXPERTS_FUNCTIONS["mine"] = mine
    try:
        model = tiny("moe")
        model.set_experts_implementation("mine")
        done, (logits,) = passed(model)
        assert len(reasons(done)) == 3 and "none of grouped_mm, batched_mm" in reasons(done)[0]
        assert_same(logits, plain(model))
    finally:
        del ALL_EXPERTS_FUNCTIONS["mine"]


def test_hooks_of_the_experts_run() -> None:
    model = tiny("moe")
    for layer in model.model.layers:
        layer.experts.register_forward_hook(lambda module, inputs, output: output * 2)
    done, (logits,) = passed(model)
    assert done.ops["experts"] == 3
    assert_same(logits, plain(model))


def test_switched_off_the_graph_is_hugging_faces() -> None:
    done, (logits,) = passed(tiny("moe"), enabled=False)
    assert not done.ops["experts"] and any("grouped_mm" in str(node.target) for node in done.graphs[0].nodes)
    assert_same(logits, plain(tiny("moe")))


def test_the_config_says_what_the_user_chose() -> None:
    """Also while two calls are under way, and after one that failed."""
    config = tiny("moe").config
    chosen = config._experts_implementation
    with pytest.raises(RuntimeError), fused_experts(config, True):
        with fused_experts(config, True):
            pass
        assert config._experts_implementation == PREFIX + chosen
        raise RuntimeError
    assert config._experts_implementation == chosen
    with fused_experts(config, False):
        assert config._experts_implementation == chosen


@pytest.mark.slow
def test_report_and_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = passes_only(tiny("moe").requires_grad_(False))
    plain(model)
    fusion = gemma4_compile.report(model).fusions[FUSION]
    assert (fusion.expected, fusion.matched) == (3, 3)
    gemma4_compile.restore(model)
    model = passes_only(model, OptimizeConfig(disable=(FUSION,)))
    plain(model)
    assert not gemma4_compile.report(model).fusions[FUSION].enabled
    monkeypatch.setenv("GEMMA4_COMPILE_DISABLE", FUSION)
    assert FUSION not in OptimizeConfig().enabled()


@pytest.mark.slow
def test_in_a_torch_compile_of_the_users_own() -> None:
    """By the name of the implementation; the passes count it."""
    model = tiny("moe").requires_grad_(False)
    expected = plain(model)
    model.set_experts_implementation(PREFIX + model.config._experts_implementation)
    options = gemma4_compile.inductor_options()
    compiled = torch.compile(model, options=options, fullgraph=True)
    with torch.no_grad():
        actual = compiled(prompt(2, 6), use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert all(len(record.matched(FUSION)) == 3 for record in options["pre_grad_custom_pass"].records)
