"""Which way calls go: what is no packed step runs as before, and nothing ends in an error of a compiler."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import lowering
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from gemma4_compile import OptimizeConfig, optimize, report, restore
from gemma4_compile.calls.route import PACKED, UNCOMPILED, WHOLE
from gemma4_compile.ops import library
from gemma4_compile.optimized import state_of
from tests.hf.test_generate import generate
from tests.models import CONFIGS, prompt, tiny
from tests.passes.harness import passes_only


def test_inductor_knows_every_op() -> None:
    """Registered by hand. Up to torch 2.11 Inductor would write down, for each op that it does not know, all that the op's
    arguments are computed of: twice as much with each layer, so that a model of 35 layers never compiled."""
    optimize(tiny("dense"))
    names = [name for name in dir(torch.ops.gemma4) if not name.startswith("_")]
    assert {"linear", "attention", "attention_qkv", "ple_tail", "experts"} <= set(library._DEFINED)
    missing = [name for name in library._DEFINED if getattr(torch.ops.gemma4, name).default not in lowering.lowerings]
    assert not missing and names


@pytest.mark.oldest
def test_a_model_of_full_depth_compiles_once() -> None:
    """As many layers as E2B has, by Inductor itself. It knows each op by the lowering that it was told: one that it had to make
    up itself, while it compiled, would have taken it hours on torch 2.11."""
    layers = 35
    kinds = (["sliding_attention"] * 4 + ["full_attention"]) * 7
    model = tiny("e", torch.bfloat16, num_hidden_layers=layers, layer_types=kinds, num_kv_shared_layers=20)
    optimize(model.requires_grad_(False))
    ops = [getattr(torch.ops.gemma4, name).default for name in library._DEFINED]
    before = {op: lowering.lowerings[op] for op in ops}
    for new in (1, 2, 8):
        generate(model, max_new_tokens=new, min_new_tokens=new)
    assert {op: lowering.lowerings[op] for op in ops} == before
    found = report(model)
    assert set(found.calls) == {PACKED} and found.packed_steps == 1 and found.graphs_compiled == 1
    assert "36 pieces in all, 9 unique" in str(found)


def test_each_reason_is_told_once() -> None:
    model = passes_only(tiny("dense").requires_grad_(False))
    with pytest.warns(UserWarning, match="as one graph, slower than packed steps: the argument labels"):
        model(prompt(2, 5), labels=prompt(2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(prompt(2, 6), labels=prompt(2, 6))
        model(prompt(2, 6))
    found = report(model)
    assert found.calls == {WHOLE: 2, PACKED: 1} and found.reasons == {WHOLE: ("the argument labels",)}
    assert "2 as whole graph" in str(found) and "the argument labels" in str(found)


def test_hooks_are_called_from_the_next_prompt_on() -> None:
    plain, model = tiny("dense").requires_grad_(False), passes_only(tiny("dense").requires_grad_(False))
    model(prompt(2, 5))
    for each in (plain, model):
        each.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match="hooks on a Gemma4TextMLP"):
        actual = model(prompt(2, 5)).logits
    torch.testing.assert_close(actual, plain(prompt(2, 5)).logits, rtol=2e-5, atol=2e-5)


def test_hooks_that_transformers_leaves_behind_are_none() -> None:
    """A call that asks for hidden states installs them for good; calls after it are packed steps all the same."""
    model = passes_only(tiny("dense").requires_grad_(False))
    first = model(prompt(2, 5)).logits
    with pytest.warns(UserWarning, match="output_hidden_states"):
        model(prompt(2, 5), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(prompt(2, 5)).logits, first)
    assert report(model).calls == {PACKED: 2, WHOLE: 1} and report(model).packed_steps == 1


def test_other_weights_are_taken_in() -> None:
    """Tensors put in the place of parameters, and a module in that of another."""
    plain, model = tiny("dense", seed=5).requires_grad_(False), passes_only(tiny("dense").requires_grad_(False))
    model(prompt(2, 5))
    model.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(model(prompt(2, 5)).logits, plain(prompt(2, 5)).logits, rtol=2e-5, atol=2e-5)
    for each in (plain, model):
        torch.manual_seed(0)
        each.lm_head = nn.Linear(64, 128, bias=False).requires_grad_(False)
    torch.testing.assert_close(model(prompt(2, 5)).logits, plain(prompt(2, 5)).logits, rtol=2e-5, atol=2e-5)
    assert set(report(model).calls) == {PACKED}


def test_modules_of_others_are_left_to_the_whole_graph() -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    plain, model = tiny("dense").requires_grad_(False), passes_only(tiny("dense").requires_grad_(False))
    model(prompt(2, 5))
    for each in (plain, model):
        old = each.model.layers[0].mlp.up_proj
        each.model.layers[0].mlp.up_proj = adapter = Adapter(64, 96, bias=False).requires_grad_(False)
        adapter.weight = old.weight
    with pytest.warns(UserWarning, match="a module of .*Adapter"):
        actual = model(prompt(2, 5)).logits
    torch.testing.assert_close(actual, plain(prompt(2, 5)).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_what_does_not_compile_runs(packed: bool) -> None:
    """A compiler that fails at everything: the plain result, the reason in a line, once."""

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler here\nand many lines more")

    plain, model = (
        tiny("dense").requires_grad_(False),
        optimize(tiny("dense").requires_grad_(False), OptimizeConfig(packed=packed)),
    )
    backend = state_of(model).backend
    backend.compile = backend.compile_piece = broken
    with pytest.warns(UserWarning) as caught:
        actual = [model(prompt(2, tokens)).logits for tokens in (5, 6)]
    for mine, tokens in zip(actual, (5, 6), strict=True):
        assert torch.equal(mine, plain(prompt(2, tokens)).logits)
    assert set(report(model).calls) == {UNCOMPILED}
    told = [str(warning.message) for warning in caught if "gemma4_compile" in str(warning.message)]
    assert len(told) == 1 and "RuntimeError: no compiler here" in told[0] and "\n" not in told[0]


def test_a_wrong_call_is_hugging_faces_error_and_compiles_go_on() -> None:
    plain, model = tiny("dense").requires_grad_(False), passes_only(tiny("dense").requires_grad_(False))
    wrong = {"inputs_embeds": torch.zeros(1, 3, 65)}
    with pytest.raises(Exception) as expected:
        plain(**wrong)
    with pytest.raises(type(expected.value)):
        model(**wrong)
    assert not state_of(model).whole.broken
    torch.testing.assert_close(model(prompt(1, 3)).logits, plain(prompt(1, 3)).logits, rtol=2e-5, atol=2e-5)


PLACEHOLDERS: dict[str, Any] = {"image_token_id": 7, "video_token_id": 8, "audio_token_id": 9}


def test_text_of_a_multimodal_model() -> None:
    """Image tokens without an image are embedded as padding; whatever has embeddings goes its own way; and nothing is left."""
    made = [
        Gemma4ForConditionalGeneration(
            Gemma4Config(text_config=CONFIGS["e"], vision_config=None, audio_config=None, **PLACEHOLDERS)
        ).eval().requires_grad_(False)
        for _ in range(2)
    ]  # fmt: skip
    plain, model = made
    model.load_state_dict(plain.state_dict())
    before = dict(model.__dict__)
    passes_only(model)
    ids = prompt(2, 9)
    ids[0, 3] = 7
    assert torch.equal(generate(model, {"input_ids": ids}), generate(plain, {"input_ids": ids}))
    assert set(report(model).calls) == {PACKED} and state_of(model).cache_memory > 0
    with pytest.warns(UserWarning, match="inputs_embeds in place of input_ids"):
        embeds = plain.get_input_embeddings()(prompt(2, 4))
        actual = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(actual, plain(inputs_embeds=embeds).logits, rtol=2e-5, atol=2e-5)
    assert set(restore(model).__dict__) == set(before)


def test_without_cuda_graphs_and_with_whole_graphs_alone() -> None:
    model = passes_only(tiny("dense").requires_grad_(False), OptimizeConfig(packed=False))
    model(prompt(2, 5))
    assert report(model).calls == {WHOLE: 1} and not report(model).packed_steps
