"""yoco: which rows reach the layers that share KV, and each reason for which all of them do."""

from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from gemma4_compile import OptimizeConfig, optimize, report
from gemma4_compile.passes import Record, pipeline, run
from tests.models import DEVICE, prompt, tiny
from tests.passes.harness import Run, compile_passes
from tests.test_optimize import generate, passes_only

ROWS = torch.tensor([1, 4], device=DEVICE)
SLICES = hasattr(type(tiny("e").model), "_maybe_slice_kv_shared_inputs")  # transformers 5.2x, for a number of last rows
MOE: dict[str, Any] = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}


WHOLE = OptimizeConfig(packed=False)  # the graph of a call, not a packed step


def keep(model: Any, rows: Any = ROWS, **options: Any) -> Any:
    """The model's call as a function of token ids, for Dynamo."""
    return lambda ids: model(ids, use_cache=False, logits_to_keep=rows, **options)


def yoco_of(done: Run) -> Record:
    (record,) = done.records
    return record


def dynamic(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    ids = prompt(batch, tokens, seed)
    torch._dynamo.mark_dynamic(ids, 1)
    return ids


def query_rows(graph: Graph) -> list[Any]:
    """Rows of the query of each attention call, in order."""
    calls: list[Node] = [n for n in graph.nodes if n.target is torch.nn.functional.scaled_dot_product_attention]
    return [call.args[0].meta["example_value"].shape[2] for call in calls]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["e", "dense", "moe"])
def test_exact_count(kind: str) -> None:
    """One boundary where KV is shared, none elsewhere; behind it attention has the wanted rows only."""
    done = compile_passes(keep(tiny(kind).requires_grad_(False)), {"yoco"})
    with torch.no_grad():
        done.call(dynamic(2, 7))
    assert [site.path for site in yoco_of(done).matched("yoco")] == (["layers.2"] if kind == "e" else [])
    rows = query_rows(done.graphs[0])
    if kind == "e":
        assert [isinstance(size, int) and size == 2 for size in rows] == [False, False, True, True]


@pytest.mark.parametrize("overrides", [{}, pytest.param(MOE, marks=pytest.mark.slow)], ids=["dense", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_numerics(dtype: torch.dtype, overrides: dict[str, Any]) -> None:
    """With experts too, which no released model with shared KV has."""
    model = tiny("e", dtype, **overrides).requires_grad_(False)
    if overrides:
        model.set_experts_implementation("batched_mm")
    done = compile_passes(keep(model), {"yoco"})
    ids = dynamic(3, 9)
    with torch.no_grad():
        actual, expected = done.call(ids).logits, model(ids, use_cache=False).logits[:, ROWS]
    assert yoco_of(done).matched("yoco")
    difference = (actual.float() - expected.float()).abs().max().item()
    assert difference <= (1e-5 if dtype == torch.float32 else 0.05 * expected.float().abs().max().item())


def test_dynamic_shapes() -> None:
    """One graph for any number of tokens and of wanted rows."""
    model = tiny("e").requires_grad_(False)
    done = compile_passes(lambda ids, rows: model(ids, use_cache=False, logits_to_keep=rows).logits, {"yoco"})
    for tokens, rows in ((7, [1, 4]), (12, [0, 5, 11]), (5, [0, 1, 2, 3, 4])):
        wanted = torch.tensor(rows, device=DEVICE)
        torch._dynamo.mark_dynamic(wanted, 0)
        ids = dynamic(2, tokens)
        with torch.no_grad():
            actual, expected = done.call(ids, wanted), model(ids, use_cache=False).logits[:, wanted]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert len(done.graphs) == 1 and yoco_of(done).matched("yoco")


@pytest.mark.slow
def test_the_last_row_of_generate() -> None:
    """generate() asks for the last row. transformers 5.2x leaves the others out itself; with 5.17 the pass does."""
    plain, model = tiny("e"), passes_only(tiny("e"), WHOLE)
    ids = prompt(2, 9)
    assert torch.equal(generate(model, ids), generate(plain, ids))
    found = report(model).fusions["yoco"]
    assert (found.expected, found.matched) == (1, 1)
    assert any("transformers leaves the other rows out" in left for left in found.left) == SLICES
    assert any("one row" in left or "transformers" in left for left in found.left)  # decode


def reason_of(model: Any, ids: torch.Tensor, **options: Any) -> str:
    """Run one call; it must equal the plain model's, and the report says why yoco is off."""
    with torch.no_grad():
        actual = model(ids, use_cache=False, **options)
        expected = model._call_impl(ids, use_cache=False, **options)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    result = report(model)
    assert result.fusions["yoco"].matched == 0
    (unmatched,) = result.fusions["yoco"].unmatched
    assert unmatched.reason in str(result)
    return unmatched.reason


@pytest.mark.slow
def test_off_for_full_sequence_logits() -> None:
    model = passes_only(tiny("e"), WHOLE)
    assert "full-sequence logits" in reason_of(model, prompt(2, 7))


@pytest.mark.slow
def test_off_for_hidden_states() -> None:
    model = passes_only(tiny("e"), WHOLE)
    assert "asks for hidden states" in reason_of(model, prompt(2, 7), logits_to_keep=ROWS, output_hidden_states=True)


@pytest.mark.slow
def test_off_for_attentions() -> None:
    model = tiny("e")
    model.set_attn_implementation("eager")
    reason = reason_of(passes_only(model, WHOLE), prompt(2, 7), logits_to_keep=ROWS, output_attentions=True)
    assert "asks for attentions" in reason


@pytest.mark.slow
def test_off_for_router_logits() -> None:
    model = tiny("e", **MOE)
    model.set_experts_implementation("batched_mm")
    if getattr(model(prompt(2, 7), output_router_logits=True), "router_logits", None) is None:
        pytest.skip("this transformers returns no router logits")
    reason = reason_of(passes_only(model, WHOLE), prompt(2, 7), logits_to_keep=ROWS, output_router_logits=True)
    assert "asks for router logits" in reason


@pytest.mark.slow
def test_off_where_attention_is_written_out() -> None:
    model = tiny("e")
    model.set_attn_implementation("eager")
    assert "attn_implementation='sdpa'" in reason_of(passes_only(model, WHOLE), prompt(2, 7), logits_to_keep=ROWS)


@pytest.mark.skipif(SLICES, reason="transformers leaves these rows out itself")
def test_off_for_several_last_rows() -> None:
    assert "logits_to_keep must be 1 or a tensor" in reason_of(passes_only(tiny("e"), WHOLE), prompt(2, 7), logits_to_keep=3)


def test_off_for_a_constant_number_of_rows() -> None:
    model = tiny("e").requires_grad_(False)
    done = compile_passes(keep(model), {"yoco"})
    with torch.no_grad():
        done.call(prompt(2, 7))  # not marked: 7 is a constant
    (miss,) = [miss for miss in yoco_of(done).misses if miss.fusion == "yoco"]
    assert "7, is a constant" in miss.reason


def test_off_for_an_operation_that_may_mix_rows() -> None:
    """A cumulative sum over the tokens between the layers and the head."""

    def function(ids: torch.Tensor) -> torch.Tensor:
        states = model.model(ids, use_cache=False).last_hidden_state.cumsum(1)
        return torch.nn.functional.linear(states[:, ROWS, :], head)

    model = tiny("e").requires_grad_(False)
    head = model.lm_head.weight
    done = compile_passes(function, {"yoco"})
    with torch.no_grad():
        torch.testing.assert_close(done.call(dynamic(2, 7)), function(prompt(2, 7)))
    (miss,) = [miss for miss in yoco_of(done).misses if miss.fusion == "yoco"]
    assert "cumsum" in miss.reason and "rows one by one" in miss.reason


def missed(function: Any, *inputs: torch.Tensor) -> str:
    """The reason of the only miss; the function computes the same."""
    done = compile_passes(function, {"yoco"})
    with torch.no_grad():
        torch.testing.assert_close(done.call(*inputs), function(*inputs))
    (miss,) = [miss for miss in yoco_of(done).misses if miss.fusion == "yoco"]
    return miss.reason


def test_off_without_a_mask() -> None:
    """SDPA with is_causal counts queries from the first: fewer of them would see other keys."""
    model = tiny("e").requires_grad_(False)
    masks = {"full_attention": None, "sliding_attention": None}
    reason = missed(lambda ids: model(ids, attention_mask=masks, use_cache=False, logits_to_keep=ROWS).logits, dynamic(2, 7))
    assert "scaled_dot_product_attention" in reason and "rows one by one" in reason


def test_off_for_rows_computed_behind_the_layers() -> None:
    def function(ids: torch.Tensor) -> torch.Tensor:
        states = model.model(ids, use_cache=False).last_hidden_state
        rows = torch.arange(2, device=ids.device) + 1
        return torch.nn.functional.linear(states[:, rows, :], model.lm_head.weight)

    model = tiny("e").requires_grad_(False)
    assert "are computed behind" in missed(function, dynamic(2, 7))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [torch.tensor([], dtype=torch.int64), torch.tensor([True, False] * 3)], ids=["none", "boolean"]
)
def test_other_kinds_of_rows_compile_as_before(rows: torch.Tensor) -> None:
    model = passes_only(tiny("e"), WHOLE)
    reason = reason_of(model, prompt(2, 6), logits_to_keep=rows.to(DEVICE))
    assert "logits_to_keep must be 1 or a tensor of row indices" in reason


def test_a_mask_of_one_row_is_left_alone() -> None:
    """[batch, 1, 1, tokens]: which keys are padding, for all queries alike."""
    model = tiny("e").requires_grad_(False)
    padding = torch.ones(2, 1, 1, 7, dtype=torch.bool, device=DEVICE)
    padding[0, ..., :2] = False
    torch._dynamo.mark_dynamic(padding, 3)
    masks = {"full_attention": padding, "sliding_attention": padding}
    done = compile_passes(lambda ids: model(ids, attention_mask=masks, use_cache=False, logits_to_keep=ROWS).logits, {"yoco"})
    ids = dynamic(2, 7)
    with torch.no_grad():
        expected = model(ids, attention_mask=masks, use_cache=False, logits_to_keep=ROWS).logits
        torch.testing.assert_close(done.call(ids), expected, rtol=0, atol=1e-5)
    assert yoco_of(done).matched("yoco")


@pytest.mark.parametrize("where", ["config", "environment"])
def test_switched_off(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA4_COMPILE_DISABLE", "yoco" if where == "environment" else "")
    model = passes_only(tiny("e"), OptimizeConfig(disable=("yoco",) if where == "config" else (), packed=False))
    with torch.no_grad():
        model(prompt(2, 7), logits_to_keep=ROWS)
    found = report(model).fusions["yoco"]
    assert not found.enabled and ("config" if where == "config" else "GEMMA4_COMPILE_DISABLE") in found.note


def test_no_layer_shares() -> None:
    """Nothing is expected, and nothing is a miss."""
    model = passes_only(tiny("dense"), WHOLE)
    with torch.no_grad():
        model(prompt(2, 7), logits_to_keep=ROWS)
    found = report(model).fusions["yoco"]
    assert (found.expected, found.matched, found.unmatched) == (0, 0, ())


def test_it_is_part_of_the_pipeline() -> None:
    """Between raise, which names operations, and fuse, whose norms could not join across the gather."""
    names = [step.name for step in pipeline({"yoco", "feed_forward_tail"})]
    assert names.index("route") < names.index("yoco") < names.index("feed_forward_tail")
    assert "yoco" not in [step.name for step in pipeline({"feed_forward_tail"})]
    assert run(pipeline({"yoco"}), Graph()).sites == []


def test_attentions_with_sdpa_run_uncompiled() -> None:
    """As in Hugging Face: SDPA has none to give. The call is answered, with a warning that says what to do."""
    model = optimize(tiny("e"))
    with torch.no_grad(), pytest.warns(UserWarning, match="set_attn_implementation"):
        model(prompt(2, 7), output_attentions=True)
