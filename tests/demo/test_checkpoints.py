"""The demo checkpoints: they load, they are small, they have learnt their text, and their drafts get accepted."""

import io
import json
import tokenize

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma4_compile.demo import DEMO_NAMES, demo_checkpoint, evaluate, held_out_prompts
from gemma4_compile.hf.assistant import load_assistant

LAYER_TYPES = {"sliding_attention", "full_attention"}


@pytest.fixture(scope="module", params=DEMO_NAMES)
def demo(request):
    """(name, metrics, tokenizer, target, assistant) of one checkpoint: bf16 values, computed in fp32."""
    folder = demo_checkpoint(request.param)
    return (
        request.param,
        json.loads((folder / "metrics.json").read_text()),
        AutoTokenizer.from_pretrained(folder / "target"),
        AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32).eval(),
        load_assistant(folder / "assistant", dtype=torch.float32).eval(),
    )


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_is_small_and_bf16(name):
    folder = demo_checkpoint(name)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8_000_000
    assert AutoModelForCausalLM.from_pretrained(folder / "target").dtype == torch.bfloat16
    assert load_assistant(folder / "assistant").dtype == torch.bfloat16


def test_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="must be one of e, moe, vision, got 'dense'"):
        demo_checkpoint("dense")


def test_both_targets_share_one_tokenizer():
    first, second = (demo_checkpoint(name) / "target" for name in DEMO_NAMES)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_shapes_exercise_both_families(demo):
    name, _, _, target, assistant = demo
    config = target.config
    stored = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    assert set(stored) == LAYER_TYPES == set(assistant.config.get_text_config().layer_types)
    assert all(float(layer.layer_scalar) != 1.0 for layer in [*target.model.layers, *assistant.model.layers])
    if name == "e":
        assert set(config.layer_types[len(stored) :]) == LAYER_TYPES
        assert config.hidden_size_per_layer_input and config.use_double_wide_mlp
        ordering = assistant.masked_embedding.token_ordering
        assert torch.equal(ordering.sort().values, torch.arange(config.vocab_size))
    else:
        assert config.enable_moe_block and config.attention_k_eq_v and not config.hidden_size_per_layer_input
        assert all(layer.router.per_expert_scale.std() > 0 for layer in target.model.layers)
        assert assistant.masked_embedding is None


@torch.no_grad()
def test_experts_are_in_use_and_implementations_agree():
    folder = demo_checkpoint("moe") / "target"
    ids = torch.tensor(held_out_prompts(AutoTokenizer.from_pretrained(folder), 1, 250, 400))
    logits = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=implementation).eval()
        chosen = [set() for _ in model.model.layers]
        hooks = [
            layer.router.register_forward_hook(lambda _m, _i, out, seen=seen: seen.update(out[2].flatten().tolist()))
            for layer, seen in zip(model.model.layers, chosen, strict=True)
        ]
        logits[implementation] = model(ids).logits
        for hook in hooks:
            hook.remove()
    assert min(map(len, chosen)) >= 12  # of 16 experts, within one prompt
    for implementation in ("grouped_mm", "batched_mm"):
        torch.testing.assert_close(logits[implementation], logits["eager"], atol=1e-3, rtol=1e-3)


def test_held_out_loss_is_what_the_record_says(demo):
    _, metrics, tokenizer, target, _ = demo
    measured = evaluate.held_out_loss(target, tokenizer, window=512, max_windows=8)
    # A slice of eight short windows, and this interpreter's text: 0.5 nats of room. An untrained model is at 7.6.
    assert measured["loss"] < metrics["measured"]["held_out"]["loss"] + 0.5
    assert metrics["measured"]["held_out"]["loss"] < 2.5


def test_generation_is_greedy_by_default_and_ends_in_eos(demo):
    _, _, tokenizer, target, _ = demo
    generation = target.generation_config
    assert (generation.do_sample, generation.eos_token_id, generation.pad_token_id) == (False, 1, 0)
    ids = torch.tensor(held_out_prompts(tokenizer, 1, 40, 60))
    replies = [target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12) for _ in range(2)]
    assert torch.equal(*replies)


def test_completions_are_python_tokens(demo):
    """Nearly each line of the completions splits into Python tokens; of an untrained model's, half do."""
    _, _, tokenizer, target, _ = demo
    prompts = [prompt[:160] for prompt in held_out_prompts(tokenizer, 6, 160, 240, seed=3)]
    good = total = 0
    for reply in evaluate.greedy(target, prompts, 48):
        for line in tokenizer.decode(reply, skip_special_tokens=True).splitlines():
            total += 1
            good += splits(line.strip())
    assert total >= 25 and good / total > 0.85


def splits(line: str) -> bool:
    """Whether Python's tokenizer gets through a line; an open bracket or string at its end is no fault."""
    try:
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(line + "\n").readline)]
    except tokenize.TokenError:
        return True
    except (SyntaxError, IndentationError):
        return False
    return tokenize.ERRORTOKEN not in kinds


def test_drafts_are_accepted(demo):
    _, metrics, tokenizer, target, assistant = demo
    prompts = [prompt[:160] for prompt in held_out_prompts(tokenizer, 6, 160, 240, seed=3)]
    measured = evaluate.accepted_drafts(target, assistant, prompts, new_tokens=32)
    assert measured["rounds"] >= 30 and measured["mean"] > 1.0
    assert metrics["measured"]["accepted"]["mean"] > 1.5
    assert metrics["measured"]["accepted_in_first_8"]["mean"] > 1.0  # before greedy text can begin to repeat itself


def test_window_passed_by_long_prompts(demo):
    """A prompt of 900 tokens, seven windows long: the loss at its end is no worse than after 100 tokens."""
    _, _, tokenizer, target, _ = demo
    ids = torch.tensor([prompt[:900] for prompt in held_out_prompts(tokenizer, 3, 900, 1000, seed=1)])
    with torch.no_grad():
        logits = target(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(0)
    assert losses[600:].mean() < losses[:100].mean() + 0.2
