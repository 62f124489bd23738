"""What Hugging Face's own calls give on an optimized model: the plain model's tokens, whichever way they run, and which way."""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache, StoppingCriteria, TextStreamer
from transformers.generation import LogitsProcessor

from gemma4_compile import report
from gemma4_compile.calls.packed_call import PackedCalls
from gemma4_compile.calls.route import PACKED, UNCOMPILED, WHOLE
from gemma4_compile.hf.step_cache import CACHE
from gemma4_compile.optimized import state_of
from tests.models import prompt, tiny
from tests.passes.harness import passes_only
from tests.runtime.host_recorder import HostRecorder

KINDS = ("e", "moe", "dense")
WINDOW = 8  # of the tiny models


@cache
def pair(kind: str, graphs: bool = False) -> tuple[Any, Any]:
    """A plain model, and the same one optimized; without code generation. graphs: what is a CUDA graph on a GPU is recorded."""
    plain = tiny(kind).requires_grad_(False)
    model = passes_only(tiny(kind).requires_grad_(False))
    if graphs:
        recording(model)
    return plain, model


def calls_of(model: Any) -> PackedCalls:
    route = state_of(model)._route
    assert route is not None and route._calls is not None
    return route._calls


def recording(model: Any) -> None:
    model(prompt(1, 2))
    calls = calls_of(model)
    calls._recorder, calls.program = HostRecorder(), None
    calls._bind()


class Ways:
    """Which ways the calls of a model go meanwhile."""

    def __init__(self, model: Any):
        self._model, self._before = model, dict(report(model).calls)

    def taken(self) -> set[str]:
        return {way for way, count in report(self._model).calls.items() if count > self._before.get(way, 0)}


def padded(batch: int, tokens: int, side: str = "left") -> dict[str, Tensor]:
    ids, mask = prompt(batch, tokens), torch.ones(batch, tokens, dtype=torch.int64)
    for row in range(batch):
        hidden = slice(0, 2 * row) if side == "left" else slice(tokens - 2 * row, tokens)
        mask[row, hidden] = 0
        ids[row, hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def generate(model: Any, given: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' advice about options
        return model.generate(**({"input_ids": prompt(1, 5)} if given is None else given), **GREEDY | options)


class Never(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 11)


class Ban(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, ::3] = -torch.inf
        return scores


class Tokenizer:
    def decode(self, tokens: Any, **options: Any) -> str:
        return " ".join(str(int(token)) for token in tokens)


@cache
def assistant() -> Any:
    """Of another model's drafts few are right: most rounds crop the cache."""
    return tiny("dense", seed=7).requires_grad_(False)


def chat(model: Any) -> list[Tensor]:
    """Five turns over one cache, each with all that was said before."""
    cache_of_turns, ids, found = DynamicCache(config=model.config), prompt(1, 4), []
    for turn in range(5):
        ids = generate(model, {"input_ids": ids}, **{CACHE: cache_of_turns, "max_new_tokens": 4, "min_new_tokens": 4})
        found.append(ids)
        ids = torch.cat([ids, prompt(1, 3, seed=turn)], 1)
    return found


def cropped(model: Any) -> list[Tensor]:
    """Back within the window, and on with other tokens."""
    kept: Any = DynamicCache(config=model.config)
    model(prompt(2, 7), **{CACHE: kept})
    kept.crop(-3)
    assert kept.get_seq_length() == 4
    after = model(prompt(2, 3, seed=2), **{CACHE: kept}).logits
    return [after, model(prompt(2, 1, seed=3), **{CACHE: kept}).logits]


def recorded_and_cropped(model: Any) -> list[Tensor]:
    """Back behind the window, whose past is recorded."""
    kept: Any = DynamicCache(config=model.config)
    model(prompt(2, 20), **{CACHE: kept})
    for layer in kept.layers:
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
    model(prompt(2, 6, seed=2), **{CACHE: kept})
    kept.crop(-4)
    found = []
    for length in (5, 1):
        found.append(model(prompt(2, length, seed=3), **{CACHE: kept}).logits)
        kept.crop(0)  # what has left the window: transformers 5.17 takes no call without it
    return found


def three_of_a_prefix(model: Any) -> list[Any]:
    prefix = DynamicCache(config=model.config)
    head = prompt(1, 11)
    model(head, **{CACHE: prefix})
    found = []
    for seed in range(3):
        ids = torch.cat([head, prompt(1, 3, seed=seed)], 1)
        found.append(generate(model, {"input_ids": ids}, **{CACHE: copy.deepcopy(prefix)}))
    return [*found, prefix.get_seq_length()]


def pickled(model: Any) -> list[Tensor]:
    kept: Any = DynamicCache(config=model.config)
    model(prompt(2, 11), **{CACHE: kept})
    again = pickle.loads(pickle.dumps(kept))
    return [model(prompt(2, n, seed=n), **{CACHE: again}).logits for n in (3, 1)]


def reused_static(model: Any) -> list[Tensor]:
    kept, found = StaticCache(config=model.config, max_cache_len=40), []
    for tokens in (5, 11, 3):
        found.append(generate(model, {"input_ids": prompt(2, tokens)}, **{CACHE: kept}))
        kept.reset()
    return found


def static_of_another_batch(model: Any) -> list[Any]:
    """What plain Hugging Face says of it, and the cache goes on."""
    kept: Any = StaticCache(config=model.config, max_cache_len=40)
    found: list[Any] = [model(prompt(2, 5), **{CACHE: kept}).logits]
    try:
        model(prompt(3, 4), **{CACHE: kept})
    except Exception as error:
        found.append(type(error).__name__)
    kept.reset()
    return [*found, model(prompt(2, 4), **{CACHE: kept}).logits]


def static_in_chunks(model: Any) -> list[Tensor]:
    kept: Any = StaticCache(config=model.config, max_cache_len=40)
    return [model(prompt(1, n, seed=n), **{CACHE: kept}).logits for n in (12, 5, 1, 1)]


def selected(model: Any) -> list[Tensor]:
    """Sequences of a batch are repeated, chosen and put in another order."""
    kept: Any = DynamicCache(config=model.config)
    model(prompt(2, 11), **{CACHE: kept})
    kept.batch_repeat_interleave(2)
    found = [model(prompt(4, 2), **{CACHE: kept}).logits]
    kept.batch_select_indices(torch.tensor([0, 3]))
    found.append(model(prompt(2, 1), **{CACHE: kept}).logits)
    kept.reorder_cache(torch.tensor([1, 1]))  # type: ignore[arg-type]
    return [*found, model(prompt(2, 1, seed=4), **{CACHE: kept}).logits]


def written_by_hand(model: Any) -> list[Tensor]:
    """Views are the memory: what is written to them counts, as does a tensor put in a layer's place."""
    kept: Any = DynamicCache(config=model.config)
    model(prompt(2, 6), **{CACHE: kept})
    kept.layers[0].keys.mul_(0.5)
    found = [model(prompt(2, 1), **{CACHE: kept}).logits]
    kept.layers[1].values = kept.layers[1].values * 2
    return [*found, model(prompt(2, 2), **{CACHE: kept}).logits]


def kept_views(model: Any) -> list[Tensor]:
    """Tensors that somebody holds do not change when the cache goes on, moves or is gone."""
    kept: Any = DynamicCache(config=model.config)
    model(prompt(2, 20), **{CACHE: kept})
    held = [(layer.keys, layer.values) for layer in kept.layers if getattr(layer, "keys", None) is not None]
    for seed in range(4):
        model(prompt(2, 200, seed=seed), **{CACHE: kept})
    del kept
    generate(model, {"input_ids": prompt(2, 30)})
    return [tensor for both in held for tensor in both]


def without_config(model: Any) -> list[Tensor]:
    """Layers of a DynamicCache() keep all tokens, sliding ones too."""
    kept: Any = DynamicCache()
    return [model(prompt(2, n, seed=n), **{CACHE: kept}).logits for n in (20, 1, 4)] + [kept.layers[0].keys]


def holes(model: Any) -> list[Tensor]:
    """A right-padded prompt whose cache goes on: the padding stays in the middle."""
    given, kept = padded(3, 9, "right"), DynamicCache(config=model.config)
    first = model(**given, **{CACHE: kept}).logits[:, 0]
    mask = torch.cat([given["attention_mask"], torch.ones(3, 2, dtype=torch.int64)], 1)
    places = torch.arange(20, 22).expand(3, 2)
    return [first, model(prompt(3, 2), attention_mask=mask, position_ids=places, **{CACHE: kept}).logits]


def sequences(output: Any) -> list[Tensor]:
    return [output.sequences, *(output.scores or ()), *(output.logits or ())]


# name -> (what is done with a model, which ways its calls may take)
CASES: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "greedy": (generate, {PACKED}),
    "several": (lambda m: generate(m, {"input_ids": prompt(4, 7)}), {PACKED}),
    "longer than the window": (lambda m: generate(m, {"input_ids": prompt(2, 40)}), {PACKED}),
    "across many windows": (lambda m: generate(m, max_new_tokens=120, min_new_tokens=120), {PACKED}),
    "left padding": (lambda m: generate(m, padded(3, 9)), {PACKED}),
    "right padding": (lambda m: generate(m, padded(3, 9, "right")), {PACKED}),
    "sampling": (lambda m: generate(m, padded(3, 6), do_sample=True, top_k=20, temperature=0.8), {PACKED}),
    "several of each": (lambda m: generate(m, padded(2, 6), do_sample=True, num_return_sequences=3), {PACKED}),
    "beams": (lambda m: generate(m, padded(2, 6), num_beams=3), {PACKED}),
    "beam sampling": (lambda m: generate(m, num_beams=2, do_sample=True, top_k=20), {PACKED}),
    "prompt lookup": (lambda m: generate(m, {"input_ids": prompt(1, 4).repeat(1, 4)}, prompt_lookup_num_tokens=3), {PACKED}),
    "assistant": (lambda m: generate(m, {"input_ids": prompt(1, 20)}, assistant_model=assistant()), {PACKED}),
    "chat": (chat, {PACKED}),
    "crop": (cropped, {PACKED}),
    "crop of a recorded past": (recorded_and_cropped, {PACKED}),
    "deepcopied prefix": (three_of_a_prefix, {PACKED}),
    "pickled": (pickled, {PACKED}),
    "selected sequences": (selected, {PACKED}),
    "written by hand": (written_by_hand, {PACKED}),
    "held tensors": (kept_views, {PACKED}),
    "cache without a config": (without_config, {PACKED}),
    "padding in the middle": (holes, {PACKED}),
    "static": (lambda m: generate(m, padded(2, 6), cache_implementation="static"), {PACKED}),
    "static, past the window": (lambda m: generate(m, {"input_ids": prompt(2, 20)}, cache_implementation="static"), {PACKED}),
    "static, reused": (reused_static, {PACKED}),
    "static, another batch": (static_of_another_batch, {PACKED, UNCOMPILED}),
    "static, in chunks": (static_in_chunks, {PACKED}),
    "chunked prefill": (lambda m: generate(m, {"input_ids": prompt(2, 21)}, prefill_chunk_size=8), {PACKED}),
    "no cache": (lambda m: generate(m, use_cache=False), {PACKED}),
    "streamer": (lambda m: generate(m, streamer=TextStreamer(Tokenizer())), {PACKED}),  # type: ignore[arg-type]
    "stopping": (lambda m: generate(m, stopping_criteria=[Never()]), {PACKED}),
    "processors": (lambda m: generate(m, padded(2, 6), logits_processor=[Ban()]), {PACKED}),
    "scores": (
        lambda m: sequences(generate(m, output_scores=True, output_logits=True, return_dict_in_generate=True)), {PACKED},
    ),
    "some logits": (lambda m: m(prompt(2, 9), logits_to_keep=4).logits, {PACKED}),
    "chosen logits": (lambda m: m(prompt(2, 9), logits_to_keep=torch.tensor([7, 0, 3])).logits, {PACKED}),
    "a tuple": (lambda m: m(prompt(2, 9), return_dict=False)[0], {PACKED}),
    "positions": (lambda m: m(prompt(2, 9), position_ids=torch.arange(5, 14)[None]).logits, {PACKED}),
    "hidden states": (
        lambda m: list(generate(m, output_hidden_states=True, return_dict_in_generate=True).hidden_states[-1]), {WHOLE},
    ),
    "attentions": (
        lambda m: generate(m, output_attentions=True, return_dict_in_generate=True).sequences, {UNCOMPILED},
    ),
    "loss": (lambda m: m(prompt(2, 5), labels=prompt(2, 5)).loss, {WHOLE}),
    "a mask of four dimensions": (
        lambda m: m(prompt(2, 6), attention_mask=torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)).logits, {WHOLE},
    ),
}  # fmt: skip


# What differs between kinds of models: layers that own keys, their sizes, experts.
OF_EACH = (
    "greedy", "longer than the window", "left padding", "beams", "chat", "crop of a recorded past", "static, past the window",
    "hidden states",
)  # fmt: skip


# Each compiles a graph of the whole model.
SLOW = ("hidden states", "loss", "a mask of four dimensions")


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(n, k, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES for k in KINDS if k == "e" or n in OF_EACH],
)
@pytest.mark.filterwarnings("ignore:gemma4_compile runs this call")
def test_as_hugging_face(name: str, kind: str) -> None:
    call, ways = CASES[name]
    plain, model = pair(kind)
    before = Ways(model)
    assert_same(call(model), call(plain))
    assert before.taken() == ways
    assert report(model).packed_steps <= 1, "no call is a change of the model"


@pytest.mark.parametrize("name", [name for name, (_, ways) in CASES.items() if ways == {PACKED}])
@pytest.mark.filterwarnings("ignore:gemma4_compile runs this call")
def test_as_hugging_face_from_graphs(name: str) -> None:
    """As on a GPU: decode steps and prompts that come often are replayed."""
    call, ways = CASES[name]
    plain, model = pair("e", graphs=True)
    expected, before = call(plain), Ways(model)
    for _ in range(2):
        calls_of(model)._uses.update(dict.fromkeys(calls_of(model)._uses, 2))  # prompts of these sizes have come often
        assert_same(call(model), expected)
    assert before.taken() == ways
    calls = calls_of(model)
    assert calls.graphs is not None and not calls.graphs.refused and (calls.prompts is None or not calls.prompts.refused)


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for mine, other in zip(actual, expected, strict=True):
            assert_same(mine, other)
    elif isinstance(expected, Tensor) and expected.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


@pytest.mark.filterwarnings("ignore:gemma4_compile runs this call")
def test_embeddings_as_inputs() -> None:
    """Of a model without PLE; with it, transformers wants the ids too."""
    plain, model = pair("dense")
    before, found = Ways(model), []
    for each in (model, plain):
        given = {"inputs_embeds": each.model.embed_tokens(prompt(2, 6))}
        found.append([generate(each, given), each(**given).logits])
    assert_same(*found)
    assert before.taken() == {WHOLE, PACKED}  # the prompt's embeddings, then tokens


def test_nothing_is_compiled_for_lengths_and_batches() -> None:
    """One packed step serves all; nothing of the whole model is traced."""
    _, model = pair("e")
    for batch in range(1, 9):
        for tokens in (1, 2, 7, 8, 9, 300 // batch):
            model(prompt(batch, tokens), logits_to_keep=1)
    assert report(model).graphs_compiled == 1 or report(model).packed_steps == 1
    assert all(record.sites for record in state_of(model).backend.records)
