"""all_reduce_norm in the graphs of tensor parallel models: exact counts. They are those of rank 0 of two that do not exist."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4_compile.hf.parallel import load
from tests.models import DEVICE, prompt, tiny
from tests.passes.harness import Run, compile_passes
from tests.passes.one_process import fake_ranks

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the ranks are fake, and on the CPU: NOT tested with the kernels here")
FUSION = "all_reduce_norm"
NORMS = ("post_attention_norms", "feed_forward_tail")


@pytest.fixture(scope="module", params=["e", "moe", "dense"])
def rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """Rank 0's part of a tiny model."""
    pytest.importorskip("accelerate", reason="transformers' tensor parallel needs accelerate: NOT tested without it")
    folder: Path = tmp_path_factory.mktemp(request.param)
    tiny(request.param).save_pretrained(folder)
    with fake_ranks(2):
        model = load(folder, ranks=2, dtype=torch.float32)
        if request.param == "moe":
            model.set_experts_implementation("grouped_mm")
        yield request.param, model.requires_grad_(False)


def forms_of(model: Any, enabled: tuple[str, ...]) -> tuple[Counter[str], Run]:
    done = compile_passes(lambda ids: model(ids, use_cache=False).logits, enabled)
    with torch.no_grad():
        done.call(prompt(2, 6))
    (record,) = done.records
    return Counter(site.rewrite for site in record.matched(FUSION)), done


def sums_left(done: Run) -> int:
    (graph,) = done.graphs
    return sum(str(node.target) == "_c10d_functional.all_reduce" for node in graph.nodes)


def test_exact_count(rank: tuple[str, Any]) -> None:
    """Every sum of every layer: two of a dense layer, three of a layer with experts, of which two are one site."""
    kind, model = rank
    expected = {
        "e": {"all_reduce_post_attention_norm": 4, "all_reduce_feed_forward_tail": 4},
        "moe": {"all_reduce_post_attention_norms": 3, "all_reduce_moe_feed_forward_tail_norm": 3},
        "dense": {"all_reduce_post_attention_norm": 2, "all_reduce_feed_forward_tail_norm": 2},
    }
    found, done = forms_of(model, (FUSION, *NORMS))
    assert found == expected[kind]
    assert sums_left(done) == 0


@pytest.mark.slow
def test_without_the_fusions_of_norms_the_norm_alone(rank: tuple[str, Any]) -> None:
    """The experts' sum is reshaped in front of its norm, and stays."""
    kind, model = rank
    found, done = forms_of(model, (FUSION,))
    assert found == {"all_reduce_rms_norm": {"e": 8, "moe": 6, "dense": 4}[kind]}
    assert sums_left(done) == (3 if kind == "moe" else 0)


@pytest.mark.slow
def test_switched_off_the_sums_stay(rank: tuple[str, Any]) -> None:
    kind, model = rank
    found, done = forms_of(model, NORMS)
    assert not found and sums_left(done) == {"e": 8, "moe": 9, "dense": 4}[kind]


def test_yoco_takes_the_sums_with_the_rows(rank: tuple[str, Any]) -> None:
    """A sum over the ranks treats rows one by one, so it follows the wanted rows; and the fusion still finds it there."""
    kind, model = rank
    if kind != "e":
        pytest.skip("no layer of this model shares KV")
    wanted = torch.tensor([1, 4])
    done = compile_passes(lambda ids: model(ids, use_cache=False, logits_to_keep=wanted).logits, (FUSION, *NORMS, "yoco"))
    ids = prompt(2, 7)
    torch._dynamo.mark_dynamic(ids, 1)
    with torch.no_grad():
        done.call(ids)
    (record,) = done.records
    assert [site.path for site in record.matched("yoco")] == ["layers.2"]
    assert len(record.matched(FUSION)) == 8 and sums_left(done) == 0


@pytest.mark.slow
def test_shards_stand_before_everything(rank: tuple[str, Any]) -> None:
    """Else the fusion of Q, K and V, and that of their products, would stand before their weights."""
    kind, model = rank
    done = compile_passes(lambda ids: model(ids, use_cache=False).logits, ("qkv_norm_rope", "linear"))
    with torch.no_grad():
        done.call(prompt(2, 70))
    (graph,) = done.graphs
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    shards = [node for node in calls if node.target == "to_local" and node.all_input_nodes[0].op == "placeholder"]
    assert shards and shards == calls[: len(shards)]
    (record,) = done.records
    whole = tiny(kind).requires_grad_(False)
    if kind == "moe":
        whole.set_experts_implementation("grouped_mm")
    alone = compile_passes(lambda ids: whole(ids, use_cache=False).logits, ("qkv_norm_rope", "linear"))
    with torch.no_grad():
        alone.call(prompt(2, 70))
    for fusion in ("qkv_norm_rope", "linear"):
        found, expected = (Counter(s.rewrite for s in r.matched(fusion)) for r in (record, alone.records[0]))
        assert found == expected
