"""The packed step equals the plain model, request by request, whatever else is in the batch; with and without YOCO."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from gemma4_compile import OptimizeConfig, demo_checkpoint, optimize
from gemma4_compile.demo import DEMO_NAMES, held_out_prompts
from gemma4_compile.hf.loading import load
from gemma4_compile.packed.inputs import PlainKV, Request
from gemma4_compile.runtime.worker.model import PackedModel
from tests.accuracy_of_model import Exact
from tests.models import tiny
from tests.runtime.served import CAPACITY, REQUESTS, logits_of, memory, packed, plain, states_of, tokens_of


@dataclass(frozen=True)
class Drawn:
    """A request: `seen` tokens in an earlier step, `new` ones in this, and which of those want logits."""

    seen: int
    new: int
    rows: tuple[int, ...]


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    seen = draw(st.one_of(st.just(0), st.integers(1, 30)))
    new = draw(st.one_of(st.just(1), st.integers(1, 30)))
    rows = draw(st.one_of(st.just({new - 1}), st.sets(st.integers(0, new - 1), max_size=new)))
    return Drawn(seen, new, tuple(sorted(rows)))


batches = st.lists(drawn(), min_size=1, max_size=17).filter(lambda batch: any(request.rows for request in batch))


def check(kind: str, batch: list[Drawn], seed: int, yoco: bool, tolerance: float = 1e-5) -> None:
    """Prefill what each request has seen, then the mixed step; compare with one plain call a request."""
    model, kv = packed(kind, yoco=yoco), memory(kind)
    texts = [tokens_of(seed + i, request.seen + request.new) for i, request in enumerate(batch)]
    earlier = [i for i, request in enumerate(batch) if request.seen]
    if earlier:
        model(kv.inputs([Request(texts[i][: batch[i].seen]) for i in earlier], earlier))
    step = [Request(text[r.seen :], r.seen, r.rows) for text, r in zip(texts, batch, strict=True)]
    logits, hidden = model.run(kv.inputs(step))
    rows = [(text, [r.seen + i for i in r.rows]) for text, r in zip(texts, batch, strict=True) if r.rows]
    wanted = [logits_of(plain(kind), text)[places] for text, places in rows]
    torch.testing.assert_close(logits[0], torch.cat(wanted), rtol=0, atol=tolerance)
    states = [states_of(plain(kind), text)[places] for text, places in rows]
    torch.testing.assert_close(hidden, torch.cat(states), rtol=0, atol=tolerance)


@pytest.mark.parametrize("yoco", [True, False], ids=["yoco", "whole"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(batch=batches, seed=st.integers(0, 1000))
def test_any_batch(yoco: bool, batch: list[Drawn], seed: int) -> None:
    """1 to 17 requests of random lengths, prefill and decode mixed, arbitrary rows."""
    check("e", batch, seed, yoco)


@pytest.mark.parametrize("kind", ["moe", "dense"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(batch=batches, seed=st.integers(0, 1000))
def test_any_batch_of_models_that_share_nothing(kind: str, batch: list[Drawn], seed: int) -> None:
    check(kind, batch, seed, yoco=True, tolerance=2e-5)


def test_one_program_for_all() -> None:
    """One token, one request, the most of both: nothing is traced or compiled again."""
    model = packed("e")
    counters.clear()
    for batch in ([Drawn(0, 1, (0,))], [Drawn(0, 30, (3, 4))], [Drawn(5, 1, (0,))] * 17, [Drawn(0, 30, (29,))] * 17):
        check("e", batch, 3, yoco=True)
    assert counters["stats"]["unique_graphs"] == 0 and counters["inductor"]["fxgraph_cache_miss"] == 0
    assert model.program.spec.unique_pieces == 5


def test_yoco_works_on_the_wanted_rows() -> None:
    """Behind the boundary the queries are the wanted rows, not the tokens."""
    kv = memory("e")
    inputs = kv.inputs([Request(tokens_of(1, 20)), Request(tokens_of(2, 9), rows=[2, 8])])
    for yoco, rows in ((True, [29, 29, 3, 3]), (False, [29, 29, 29, 29])):
        program = packed("e", yoco=yoco).program
        values = program.bind(inputs)
        queries = []
        for step in program.steps:
            if step.op:
                queries.append(values[step.arguments[0]].shape[1])
            step.run(values)
        assert queries == rows


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO_NAMES)
def test_bf16_is_as_near_to_fp64_as_eager(name: str) -> None:
    """The last rows of a packed batch of held-out prompts of the demo checkpoint; the median over rows, as a few decide the
    mean where rounding picks another expert."""
    model, tokenizer = load(demo_checkpoint(name) / "target", "cpu", torch.bfloat16)
    if name == "moe":
        model.set_experts_implementation("grouped_mm")
    prompts = held_out_prompts(tokenizer, 17, 16, 120)
    with torch.no_grad():
        exact = torch.stack([Exact(model).logits(torch.tensor([p]))[0, -1] for p in prompts])
        eager = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in prompts])
    step = PackedModel(optimize(model.requires_grad_(False)))
    kv = PlainKV(step.geometry, len(prompts), 128, torch.bfloat16, "cpu")
    actual = step(kv.inputs([Request(p) for p in prompts]))[0]
    errors = [(logits.double() - exact).square().mean(-1).sqrt().median().item() for logits in (actual, eager)]
    assert errors[0] <= 1.1 * errors[1], errors


@pytest.mark.parametrize("tied", [True, False])
def test_the_states_are_what_the_head_multiplies(tied: bool) -> None:
    """Also where nothing is fused, and with a tied weight, which the embedding reads too."""
    model = tiny("dense", tie_word_embeddings=tied).requires_grad_(False)
    if not tied:
        model.lm_head.weight.data.normal_()
    expected = states_of(model, tokens_of(1, 7))
    step = PackedModel(optimize(model, OptimizeConfig(disable=("linear",) if tied else ())))
    result = step.run(memory("dense").inputs([Request(tokens_of(1, 7), rows=[0, 3, 6])]))
    torch.testing.assert_close(result.hidden, expected[[0, 3, 6]], rtol=0, atol=1e-5)
    assert result.logits.shape == (1, 3, 128)


def test_the_model_keeps_its_own_attention() -> None:
    """Tracing sets another attention for a moment; the model's own calls do not see it."""
    model = tiny("dense").requires_grad_(False)
    before = model.config._attn_implementation
    expected = logits_of(model, tokens_of(1, 7))
    PackedModel(optimize(model))
    assert model.config._attn_implementation == before
    torch.testing.assert_close(logits_of(model, tokens_of(1, 7)), expected)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "a batch must hold 1 to 20 requests, got 0"),
        ([Request([5])] * 21, "1 to 20 requests, got 21; split it"),
        ([Request([])], "request 0 must have 1 to 64 new tokens, got 0"),
        ([Request([5]), Request([5], seen=64)], "request 1 must have 1 to 0 new tokens, got 1; raise the capacity"),
        ([Request([5, 6], rows=[])], "a step must want the logits of at least one token"),
        ([Request([5, 6], rows=[2])], "request 0 wants rows among its 2 new tokens, ascending, got .2."),
        ([Request([5, 6], rows=[1, 0])], "ascending, got .1, 0."),
        ([Request([5], seen=-1)], "request 0 must have seen 0 tokens or more, got -1"),
    ],
)
def test_bad_batches(batch: list[Request], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory("e").inputs(batch)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="must be optimized first"):
        PackedModel(tiny("dense"))
    with pytest.raises(TypeError, match="takes Gemma4ForCausalLM, got Gemma4TextModel"):
        PackedModel(optimize(tiny("dense").model))
    with pytest.raises(ValueError, match="capacity must be a positive multiple of 16, got 65; use 80"):
        PlainKV(packed("e").geometry, REQUESTS, CAPACITY + 1, torch.float32, "cpu")


def lacking(name: str) -> Any:
    return lambda inputs: inputs.pop(name)


def as_int32(name: str) -> Any:
    return lambda inputs: inputs.update({name: inputs[name].int()})


def shorter(name: str) -> Any:
    return lambda inputs: inputs.update({name: inputs[name][1:]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking("rows"), "a step needs the input 'rows', got input_ids"),
        (lacking("keys.0"), "a step needs the input 'keys.0', got input_ids"),
        (as_int32("rows"), "rows must have dtype torch.int64, got torch.int32; convert it"),
        (as_int32("positions"), "positions must have dtype torch.int64"),
        (shorter("positions"), "positions must have as many entries as there are tokens in input_ids, 3, got 2"),
        (shorter("slots.full_attention"), "slots.full_attention must have as many entries as there are tokens"),
        (shorter("table.sliding_attention"), "table.sliding_attention must have as many .* requests in starts, 2, got 1"),
    ],
)
def test_bad_inputs(change: Any, message: str) -> None:
    inputs = memory("e").inputs([Request([5, 6]), Request([7])])
    change(inputs)
    with pytest.raises(ValueError, match=message):
        packed("e")(inputs)


@pytest.mark.parametrize("rows", [[0], [0, 0], [0, 20]])
def test_bad_rows_of_memory(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="each of 2 requests needs a row of its own, 0 to 19"):
        memory("e").inputs([Request([5]), Request([6])], rows)


def test_each_kind_of_layer_has_its_own_table() -> None:
    """Sliding and full layers keep a request in different pages."""
    text, kv = tokens_of(1, 20), memory("e")
    for step in (Request(text[:13]), Request(text[13:], seen=13)):
        inputs = kv.inputs([step])
        inputs["table.sliding_attention"] = torch.full_like(inputs["table.sliding_attention"], 7)
        inputs["slots.sliding_attention"] = inputs["slots.sliding_attention"] + 7 * CAPACITY
        logits = packed("e")(inputs)[0, 0]
    torch.testing.assert_close(logits, logits_of(plain("e"), text)[-1], rtol=0, atol=1e-5)
    assert kv.tensors["keys.0"][7].any() and not kv.tensors["keys.0"][0].any()
    assert kv.tensors["keys.1"][0].any() and not kv.tensors["keys.1"][7].any()
