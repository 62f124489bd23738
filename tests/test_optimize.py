"""optimize: the same tokens as the plain model, graphs that do not multiply, and errors that leave the model alone."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma4Config, Gemma4ForConditionalGeneration, LlamaConfig, LlamaForCausalLM, StaticCache

from gemma4_compile import OptimizeConfig, optimize, report, restore
from gemma4_compile.hf.step_cache import CACHE
from gemma4_compile.optimized import state_of
from tests.models import CONFIGS, prompt, tiny
from tests.passes.harness import passes_only

WHOLE = OptimizeConfig(packed=False)  # graphs of the whole model alone


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(ids)
    if ids.shape[0] > 1:
        mask[0, :2] = 0  # left padding
    defaults = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return model.generate(ids, attention_mask=mask, **defaults | options)


def graphs(model: Any) -> int:
    return report(model).graphs_compiled


@pytest.mark.parametrize(
    ("cache", "kind"),
    [("dynamic", "e"), ("dynamic", "dense"), ("static", "e"),
     *(pytest.param(cache, "moe", marks=pytest.mark.slow) for cache in ("dynamic", "static"))],
)  # fmt: skip
def test_generates_the_same_tokens(cache: str, kind: str) -> None:
    """Through Inductor; two lengths, padded, across the end of the sliding window (8). Static keys and values of a dense model
    are those of one with experts. With no warning in such ordinary use: transformers warns of its older names, and none of
    these warnings may come from here, nor any other."""
    less = {"num_hidden_layers": 2, "layer_types": CONFIGS["dense"]["layer_types"]} if kind == "moe" else {}  # one of each
    plain, model = tiny(kind, **less), optimize(tiny(kind, **less))
    for tokens in (5, 11):
        ids = prompt(2, tokens)
        options = {"cache_implementation": cache}
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", UserWarning)
            actual = generate(model, ids, **options)
        assert torch.equal(actual, generate(plain, ids, **options))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["e", "moe"])
def test_no_graph_for_lengths_steps_or_batches(kind: str) -> None:
    """Of the whole model: one graph for prefill, one for decode; single rows have their own, as PyTorch specializes size 1."""
    plain, model = tiny(kind), passes_only(tiny(kind), WHOLE)
    for batch, tokens, new in ((2, 5, 8), (3, 6, 4), (2, 12, 14), (4, 30, 3)):
        ids = prompt(batch, tokens)
        options = {"max_new_tokens": new, "min_new_tokens": new}
        assert torch.equal(generate(model, ids, **options), generate(plain, ids, **options))
    assert graphs(model) == 2
    for tokens, new in ((5, 12), (20, 4)):
        ids = prompt(1, tokens)
        options = {"max_new_tokens": new, "min_new_tokens": new}
        assert torch.equal(generate(model, ids, **options), generate(plain, ids, **options))
    assert graphs(model) == 4


@pytest.mark.slow
def test_static_cache_decodes_in_two_graphs() -> None:
    """Before and behind the end of the window: transformers writes these differently. Plain compilation needs one a step."""
    plain, model = tiny("dense"), passes_only(tiny("dense"), WHOLE)
    ids = prompt(2, 4)
    options = {"cache_implementation": "static", "max_new_tokens": 16, "min_new_tokens": 16}
    assert torch.equal(generate(model, ids, **options), generate(plain, ids, **options))
    assert graphs(model) == 3  # prefill, decode before, decode behind


def test_sampled_tokens_are_the_same() -> None:
    plain, model = tiny("dense"), passes_only(tiny("dense"))
    outputs = []
    for candidate in (plain, model):
        torch.manual_seed(7)
        outputs.append(generate(candidate, prompt(2, 5), do_sample=True, top_k=20))
    assert torch.equal(*outputs)


@pytest.mark.slow
def test_static_cache_in_chunks() -> None:
    """Chunked prefill on a StaticCache: fills the window at once, then slides; each result as the plain model's."""
    plain, model = tiny("dense"), passes_only(tiny("dense"), WHOLE)
    caches = [StaticCache(config=plain.config, max_cache_len=40) for _ in range(2)]
    for tokens in (prompt(1, 12), prompt(1, 5, seed=2), prompt(1, 1, seed=3)):
        with torch.no_grad():
            expected = plain(tokens, **{CACHE: caches[0]}).logits
            actual = model(tokens, **{CACHE: caches[1]}).logits
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_continues_a_dynamic_cache_of_the_plain_model() -> None:
    """A cache may go back and forth: the user's object holds the state, not the graph."""
    plain, model = tiny("e"), passes_only(tiny("e"))
    first, second = prompt(2, 11), prompt(2, 3, seed=2)
    with torch.no_grad():
        cache = plain(first)[CACHE]
        whole = plain(torch.cat([first, second], 1)).logits[:, -3:]
        output = model(second, **{CACHE: cache})
    assert output[CACHE] is cache and cache.get_seq_length() == 14
    torch.testing.assert_close(output.logits, whole, rtol=1e-5, atol=1e-5)


CALLS: dict[str, Callable[[Any], Any]] = {
    "positional": lambda model: model(prompt(2, 5)).logits,
    "tuple": lambda model: model(prompt(2, 5), return_dict=False, use_cache=False)[0],
    "no cache": lambda model: model(prompt(2, 5), use_cache=False).logits,
    "last logits": lambda model: model(prompt(2, 5), logits_to_keep=1).logits,
    "chosen logits": lambda model: model(prompt(2, 5), logits_to_keep=torch.tensor([1, 3])).logits,
    "named none": lambda model: model(input_ids=None, inputs_embeds=model.model.embed_tokens(prompt(2, 5))).logits,
    "embeddings": lambda model: model(inputs_embeds=model.model.embed_tokens(prompt(2, 5))).logits,
    "hidden states": lambda model: torch.stack(model(prompt(2, 5), output_hidden_states=True).hidden_states),
    "router logits": lambda model: torch.stack(model(prompt(2, 5), output_router_logits=True).router_logits),
    "loss": lambda model: model(prompt(2, 5), labels=prompt(2, 5)).loss,
    "positions": lambda model: model(prompt(2, 5), position_ids=torch.arange(3, 8)[None]).logits,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("named none", "router logits", "tuple"))) for name in CALLS],
)
def test_calls_work_as_before(name: str) -> None:
    kinds = dict.fromkeys(("router logits", "embeddings", "named none"), "moe")
    kinds |= dict.fromkeys(("last logits", "chosen logits", "hidden states", "loss", "positions"), "dense")  # the least
    kind = kinds.get(name, "e")
    plain = tiny(kind)
    if name == "router logits" and "router_logits" not in plain(prompt(1, 2), output_router_logits=True):
        pytest.skip("this transformers returns router logits from the base model only")
    with torch.no_grad():
        expected = CALLS[name](plain)
        model = passes_only(tiny(kind))
        actual = CALLS[name](model)
    assert graphs(model) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_modes(mode: Any) -> None:
    model = passes_only(tiny("dense"))
    with mode():
        assert model(prompt(2, 5)).logits.shape == (2, 5, 128)


def test_gradients_are_refused_at_the_call() -> None:
    model = passes_only(tiny("dense"))
    with pytest.raises(ValueError, match="computes no gradients.*inference_mode"):
        model(prompt(2, 5))
    assert not model.requires_grad_(False)(prompt(2, 5)).logits.requires_grad


def test_optimizing_twice_is_harmless() -> None:
    model = passes_only(tiny("dense"))
    state = state_of(model)
    assert optimize(model) is model and state_of(model) is state
    assert state_of(optimize(model, OptimizeConfig(disable=("route",)))) is not state


def test_restore_leaves_no_trace() -> None:
    model = tiny("e")

    def everything() -> list[Any]:
        return [dict(part.__dict__) for part in model.modules()] + [model.generation_config.to_dict()]

    before = everything()
    passes_only(model)
    assert everything() != before
    assert restore(model) is model
    assert everything() == before
    restore(model)
    with pytest.raises(ValueError, match="must be optimized first"):
        report(model)


def test_text_part_of_the_multimodal_class() -> None:
    config = Gemma4Config(text_config=CONFIGS["e"], vision_config=None, audio_config=None)
    model = Gemma4ForConditionalGeneration(config).eval()
    expected = generate(model, prompt(2, 5))
    assert torch.equal(generate(passes_only(model), prompt(2, 5)), expected)
    assert report(model).fusions["ple_inputs"].matched == 1
    assert graphs(model) == 1 and report(model).calls == {"packed steps": 6}


def test_two_models_do_not_share_graphs() -> None:
    first, second = passes_only(tiny("dense")), passes_only(tiny("dense", seed=1))
    with torch.no_grad():
        assert not torch.equal(first(prompt(2, 5)).logits, second(prompt(2, 5)).logits)
    assert graphs(first) == graphs(second) == 1


def test_an_unknown_cache_runs_uncompiled_and_says_so() -> None:
    class Odd(type(StaticCache(config=tiny("dense").config, max_cache_len=4).layers[0])):  # type: ignore[misc]
        """A user's own layer."""

    plain, model = tiny("dense"), passes_only(tiny("dense"))
    cache = StaticCache(config=plain.config, max_cache_len=8)
    cache.layers[0] = Odd(max_cache_len=8, sliding_window=8)
    with torch.no_grad(), pytest.warns(UserWarning, match="does not know Odd layers"):
        actual = model(prompt(2, 5), **{CACHE: cache}).logits
    with torch.no_grad():
        torch.testing.assert_close(actual, plain(prompt(2, 5)).logits, rtol=1e-5, atol=1e-5)
    assert "Odd" in str(report(model))


def test_a_cache_by_its_older_name() -> None:
    """A release that renamed the argument takes both names, and so does the optimized model, in the same graphs."""
    plain, model = tiny("dense"), passes_only(tiny("dense"))
    whole, cache = prompt(2, 8), DynamicCache(config=plain.config)
    with torch.no_grad():
        model(whole[:, :5], past_key_values=cache)
        output = model(whole[:, 5:], past_key_values=cache)
        torch.testing.assert_close(output.logits, plain(whole).logits[:, 5:], rtol=1e-5, atol=1e-5)
        model(prompt(2, 3), **{CACHE: cache})
    assert output[CACHE] is cache and cache.get_seq_length() == 11 and graphs(model) == 1


def test_a_cache_in_an_argument_that_forward_lacks_is_an_error() -> None:
    """forward() would swallow it among its keyword arguments, and decode as if there were no cache."""
    model = passes_only(tiny("dense"))
    with torch.no_grad(), pytest.raises(TypeError, match=f"must be given as '{CACHE}' .*, got 'kv_store'"):
        model(prompt(2, 5), kv_store=DynamicCache(config=model.config))


def test_a_renamed_cache_argument_runs_uncompiled_and_says_so() -> None:
    """A future transformers: the cache comes under a name that no release known here has, and must not get lost."""
    plain, model = tiny("dense"), tiny("dense")

    def forward(input_ids: Any = None, kv_store: Any = None, **kwargs: Any) -> Any:
        return type(model).forward(model, input_ids, **{CACHE: kv_store}, **kwargs)

    model.forward = forward
    passes_only(model)
    whole, cache = prompt(2, 6), DynamicCache(config=plain.config)
    with torch.no_grad(), pytest.warns(UserWarning, match="uncompiled: it does not know a forward.. without a parameter cache"):
        model(whole[:, :5], kv_store=cache)
        actual = model(whole[:, 5:], kv_store=cache).logits
    with torch.no_grad():
        torch.testing.assert_close(actual, plain(whole).logits[:, 5:], rtol=1e-5, atol=1e-5)
    assert graphs(model) == 0


def test_a_second_argument_with_a_cache_runs_uncompiled_and_says_so() -> None:
    """Also a rename: forward() keeps the old parameter beside the new one."""
    plain, model = tiny("dense"), tiny("dense")

    def forward(input_ids: Any = None, kv_store: Any = None, **kwargs: Any) -> Any:
        return type(model).forward(model, input_ids, **{CACHE: kv_store}, **kwargs)

    own = inspect.Parameter(CACHE, inspect.Parameter.KEYWORD_ONLY, default=None)
    signature = inspect.signature(forward)
    *others, kwargs = signature.parameters.values()
    forward.__signature__ = signature.replace(parameters=[*others, own, kwargs])  # type: ignore[attr-defined]
    model.forward = forward
    passes_only(model)
    whole, cache = prompt(2, 6), DynamicCache(config=plain.config)
    with torch.no_grad(), pytest.warns(UserWarning, match="does not know the argument kv_store, which holds a cache"):
        model(whole[:, :5], kv_store=cache)
        actual = model(whole[:, 5:], kv_store=cache).logits
    with torch.no_grad():
        torch.testing.assert_close(actual, plain(whole).logits[:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_a_model_that_leaves_its_cache_unused_is_an_error(static: bool) -> None:
    """Whatever the names are: a compiled step that wrote no keys and values must not pass for one that did."""
    model = tiny("dense")
    plain_forward = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs[CACHE] = None
        return plain_forward(*args, **kwargs)

    model.model.forward = forward
    passes_only(model)
    cache: Any = StaticCache(config=model.config, max_cache_len=5) if static else DynamicCache(config=model.config)
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"does not read the cache from '{CACHE}'"):
        model(prompt(2, 5), **{CACHE: cache})
    assert cache.get_seq_length() == 0


def test_too_many_kinds_of_calls_run_uncompiled() -> None:
    """At max_graphs the model goes on, uncompiled, and says what to do; what is compiled stays in use."""
    plain, model = tiny("dense"), passes_only(tiny("dense"), OptimizeConfig(max_graphs=2, packed=False))
    with torch.no_grad():
        cache = model(prompt(2, 5))[CACHE]
        model(prompt(2, 1), **{CACHE: cache})
        with pytest.warns(UserWarning, match="max_graphs=2 are in use; raise it"):
            output = model(prompt(1, 5))
        torch.testing.assert_close(output.logits, plain(prompt(1, 5)).logits, rtol=1e-5, atol=1e-5)
        assert output[CACHE].get_seq_length() == 5
        torch.testing.assert_close(model(prompt(2, 7)).logits, plain(prompt(2, 7)).logits, rtol=1e-5, atol=1e-5)
    assert graphs(model) == 2


def untouched(model: Any, error: type[Exception], match: str, config: OptimizeConfig | None = None) -> None:
    before = dict(model.__dict__)
    with pytest.raises(error, match=match) as caught:
        optimize(model, config)
    assert "\n" not in str(caught.value)
    assert dict(model.__dict__) == before


def test_bad_models_are_left_as_they_were() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    untouched(llama, TypeError, "takes Gemma4ForCausalLM.*got LlamaForCausalLM")
    untouched(tiny("dense").train(), ValueError, r"eval mode.*model.eval\(\)")
    eager = tiny("moe")
    eager.set_experts_implementation("eager")
    untouched(eager, ValueError, "experts_implementation='eager'.*grouped_mm")
    untouched(tiny("dense"), ValueError, "must be on cuda.*got cpu", OptimizeConfig(device="cuda"))


def test_training_mode_after_optimize_is_refused() -> None:
    model = passes_only(tiny("dense"))
    model.train()
    with pytest.raises(ValueError, match="for inference, got training mode"):
        model(prompt(2, 5))


def test_missing_input_is_hugging_faces_own_error() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        passes_only(tiny("dense"))()
