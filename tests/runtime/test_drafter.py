"""The drafter equals Hugging Face's assistant, request by request, over pages scattered differently in each pool."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4AssistantConfig, Gemma4TextConfig

from gemma4_compile import optimize
from gemma4_compile.demo import DEMO_NAMES
from gemma4_compile.geometry import geometry
from gemma4_compile.hf.assistant import assistant_class
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.program import StepResult
from gemma4_compile.runtime.speculative.drafter import Drafter
from gemma4_compile.runtime.worker.memory import allocate
from tests.models import CONFIGS, tiny
from tests.runtime.demo_models import demo
from tests.runtime.drafted import DRAFTS, PAGE, drafter, expected, rounds, served
from tests.runtime.host_recorder import HostRecorder


def recorded(made: Drafter, monkeypatch: pytest.MonkeyPatch) -> list[StepResult]:
    """What each step of a drafter gives from now on."""
    results: list[StepResult] = []
    run = made.program.run

    def keep(inputs: dict[str, Tensor]) -> StepResult:
        results.append(run(inputs))
        return results[-1]

    monkeypatch.setattr(made.program, "run", keep)
    return results


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_drafts_are_hugging_faces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests in one batch, below and beyond the window: each step's tokens, and the states that it passes on."""
    made = drafter(name)
    steps = recorded(made, monkeypatch)
    tokens, passed = expected(name, DRAFTS)
    drafts = made.draft(*served(name).inputs)
    assert drafts.dtype == torch.int64 and drafts.tolist() == tokens.tolist()
    torch.testing.assert_close(torch.stack([step.hidden for step in steps], 1), passed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEMO_NAMES)
def test_one_table_for_all_layers_is_noticed(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others drafted all layers through the table of one pool, and got nothing accepted. Done here on purpose: the states that
    the comparison with Hugging Face looks at are others then, of every request."""
    made = drafter(name, 1)
    steps = recorded(made, monkeypatch)
    tokens, hidden, positions, tables = served(name).inputs
    _, passed = expected(name, 1)
    made.draft(tokens, hidden, positions, dict.fromkeys(KINDS, tables[kind]))
    made.draft(tokens, hidden, positions, tables)
    wrong, right = ((step.hidden - passed[:, 0]).abs().amax(-1) for step in steps)
    assert (wrong > 1e-3).all() and (right < 1e-4).all()


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_graphs_of_every_bucket(name: str) -> None:
    """1 to 8 requests in buckets of 1, 3 and 6 and beyond, in falling and rising order, twice: what an earlier batch left in
    the buffers is of no account."""
    recorder = HostRecorder()
    made = drafter(name, 3, recorder=recorder, sizes=(1, 3, 6))
    tokens, hidden, positions, tables = served(name).inputs
    wanted, _ = expected(name, 3)
    for turn in range(2):
        for count in (*range(8, 0, -1), *range(1, 9)):
            rows = torch.randperm(8, generator=torch.Generator().manual_seed(10 * turn + count))[:count]
            drafts = made.draft(tokens[rows], hidden[rows], positions[rows], {kind: t[rows] for kind, t in tables.items()})
            assert drafts.tolist() == wanted[rows].tolist()
    assert recorder.recorded == 3 and made.refused == {}


@pytest.mark.parametrize("drafts", range(1, DRAFTS + 1))
@pytest.mark.parametrize("name", DEMO_NAMES)
def test_any_number_of_drafts(name: str, drafts: int) -> None:
    made = drafter(name, drafts, recorder=HostRecorder())
    assert made.draft(*served(name).inputs).tolist() == expected(name, drafts)[0].tolist()


def test_padding_reads_pages_that_exist_and_nothing_is_written() -> None:
    """Behind a full batch, one of few: the other rows must not go on reading what may be freed by now."""
    given = served("e")
    made = drafter("e", 2, recorder=HostRecorder(), sizes=(8,))
    made.draft(*given.inputs)
    tokens, hidden, positions, tables = given.inputs
    before = {key: tensor.clone() for key, tensor in given.kv.items()}
    short = {kind: table[:2, :1] for kind, table in tables.items()}
    assert made.draft(tokens[:2], hidden[:2], positions[:2], short).tolist() == expected("e", 2)[0][:2].tolist()
    assert all((made._static[f"table.{kind}"][2:] == 0).all() for kind in KINDS) and not made._static["positions"][2:].any()
    assert all(torch.equal(given.kv[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["e", pytest.param("moe", marks=pytest.mark.slow)])
def test_drafts_in_bf16(name: str) -> None:
    """Rounding moves some; a fault here once lost them all: a score that one use rounded and another did not equalled none."""
    given, tokens = served(name), expected(name, 1)[0]
    target = copy.deepcopy(demo(name).plain).bfloat16().requires_grad_(False)
    kv = {key: tensor.bfloat16() for key, tensor in given.kv.items()}
    made = Drafter(optimize(target), copy.deepcopy(given.assistant).bfloat16(), 1, kv)
    token, hidden, positions, tables = given.inputs
    drafts = made.draft(token, hidden.bfloat16(), positions, tables)
    assert (drafts == tokens).float().mean() >= 0.75


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_drafting_and_verification(name: str) -> None:
    """Prefill, drafts, verification, all from graphs of the host: each step's states are what the next drafts begin with."""
    models = demo(name)
    prompts = models.prompts(5, 140)
    texts, accepted = rounds(name, 3, prompts, 16, recorder=HostRecorder)
    assert texts == [models.generate(prompt, 16) for prompt in prompts]
    assert accepted > 0.5


class Soup(HostRecorder):
    """Graphs that keep what a tensor held when they were captured."""

    def record(self, function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        _, kept = super().record(function)
        return lambda: None, kept


class Failing(HostRecorder):
    def record(self, function: Callable[[], Sequence[Tensor]]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("recorder", "reason"), [(Soup, "a replay gave other states"), (Failing, "its capture failed: operation")]
)
def test_a_graph_that_is_wrong_is_given_up(recorder: type[HostRecorder], reason: str) -> None:
    """A warning, the right drafts, and no graph for this bucket any more."""
    made = drafter("e", 2, recorder=recorder(), sizes=(8,))
    with pytest.warns(UserWarning, match=f"drafts for 8 requests without CUDA graphs: {reason}"):
        assert made.draft(*served("e").inputs).tolist() == expected("e", 2)[0].tolist()
    assert list(made.refused) == [8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.draft(*served("e").inputs).tolist() == expected("e", 2)[0].tolist()


def test_a_second_drafter_compiles_nothing() -> None:
    """It is kept with the assistant's programs; another assistant is another program."""
    first, again, other = drafter("e", 1), drafter("e", 4), drafter("moe", 1)
    assert again.program.compiled == 0
    assert first.program.spec.model == again.program.spec.model != other.program.spec.model


def tiny_assistant(**overrides: Any) -> Any:
    """For tests/models.py's dense kind: layers with the very indices of the target's owners."""
    options = {"backbone_hidden_size": 64} | {k: overrides.pop(k) for k in list(overrides) if k == "backbone_hidden_size"}
    text = CONFIGS["dense"] | {"num_kv_shared_layers": 2, "hidden_size": 32, "vocab_size_per_layer_input": 0} | overrides
    torch.manual_seed(5)
    config = Gemma4AssistantConfig(text_config=Gemma4TextConfig(**text).to_dict(), use_ordered_embeddings=False, **options)
    return assistant_class()(config).eval().requires_grad_(False)


def tiny_drafter(assistant: Any, **options: Any) -> tuple[Drafter, dict[str, Tensor]]:
    model = tiny("dense").requires_grad_(False)
    kv = allocate(geometry(model.config), dict.fromkeys(KINDS, 3), PAGE, torch.float32, torch.device("cpu"))
    for tensor in kv.values():
        tensor.normal_(generator=torch.Generator().manual_seed(tensor.shape[-1]))
    settings: dict[str, Any] = {"speculative_tokens": 2, "kv": kv} | options
    return Drafter(optimize(model), assistant, **settings), kv


def test_a_layer_with_the_index_of_its_owner_writes_nothing() -> None:
    """Layer 0 reads layer 0 of the target: it owns no keys for that."""
    made, kv = tiny_drafter(tiny_assistant())
    before = {name: tensor.clone() for name, tensor in kv.items()}
    tables = {kind: torch.tensor([[2]], dtype=torch.int32) for kind in KINDS}
    drafts = made.draft(torch.tensor([5]), torch.ones(1, 64), torch.tensor([9]), tables)
    assert drafts.shape == (1, 2) and all(torch.equal(kv[name], tensor) for name, tensor in before.items())
    assert [call.op for call in made.program.spec.calls if call.op] == ["attention"] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"backbone_hidden_size": 48}, "backbone_hidden_size must be the target's hidden size, 64, got 48; use its own"),
        ({"vocab_size": 256}, "vocab_size must be the target's vocabulary, 128, got 256; use its own"),
        ({"head_dim": 32}, "sliding_attention must have the target's KV heads and head dim, .2, 16., got .2, 32.; use"),
        ({"global_head_dim": 16}, "full_attention must have the target's KV heads and head dim, .1, 32., got .1, 16."),
        (
            {"num_global_key_value_heads": 2},
            "full_attention must have the target's KV heads and head dim, .1, 32., got .2, 32.",
        ),
        ({"sliding_window": 16}, "window must be within the target's, 8, whose pages are freed, got 16"),
    ],
)
def test_assistants_of_other_targets(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_drafter(tiny_assistant(**overrides))


def test_a_type_that_the_target_does_not_own() -> None:
    model = tiny("dense", layer_types=["full_attention"] * 2).requires_grad_(False)
    with pytest.raises(ValueError, match="the target must own keys of each layer type of the assistant, got sliding_attention"):
        Drafter(optimize(model), tiny_assistant(), 2, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative_tokens": 0}, "speculative_tokens must be 1 or more, got 0"),
        ({"kv": {}}, "a step needs the input 'keys.0', got"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_drafter(tiny_assistant(), **options)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="must be optimized first"):
        Drafter(tiny("dense"), tiny_assistant(), 2, {})
    with pytest.raises(TypeError, match="a drafter drafts for Gemma4ForCausalLM, got Gemma4TextModel"):
        Drafter(optimize(tiny("dense").model), tiny_assistant(), 2, {})
    with pytest.raises(TypeError, match="a drafter takes Gemma4AssistantForCausalLM, got Gemma4ForCausalLM"):
        tiny_drafter(tiny("dense"))
    with pytest.raises(ValueError, match="the assistant's dtype must be the target's dtype, torch.float32, got torch.bfloat16"):
        tiny_drafter(tiny_assistant().to(torch.bfloat16))
    with pytest.raises(ValueError, match="must be in eval mode, got training mode"):
        tiny_drafter(tiny_assistant().train())


def test_bad_inputs() -> None:
    made = drafter("e", 1, recorder=HostRecorder(), width=19)
    tokens, hidden, positions, tables = served("e").inputs
    wide = {kind: table.repeat(1, 2) for kind, table in tables.items()}
    for arguments, message in [
        ((tokens.int(), hidden, positions, tables), "tokens must have dtype torch.int64, got torch.int32; convert it"),
        ((tokens, hidden.bfloat16(), positions, tables), "hidden must have dtype torch.float32, got torch.bfloat16"),
        (
            (tokens, hidden[:, :-1], positions, tables),
            "hidden must be .8, 192., the target's final-normed states, got .8, 191.",
        ),
        ((tokens, hidden, positions[1:], tables), "positions must have one entry for each of 8 tokens, got 7"),
        (
            (tokens, hidden, positions, {"full_attention": tables["full_attention"]}),
            "needs the input 'table.sliding_attention'",
        ),
        (
            (tokens, hidden, positions, wide),
            "a request may have 19 pages here, got a table.sliding_attention of 38; raise width",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            made.draft(*arguments)
