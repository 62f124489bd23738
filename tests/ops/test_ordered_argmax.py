"""gemma4::ordered_argmax against transformers' own embedder, compiled, and its kernels under the interpreter."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma4AssistantConfig, Gemma4TextConfig
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantMaskedEmbedder

from gemma4_compile.ops import ordered_argmax
from tests.ops.interpreted import interpreted
from tests.ops.ordered_argmax_cases import CASES, CLUSTERS, HIDDEN, TOP_K, VOCABULARY, arguments

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@dtypes
def test_the_token_of_hugging_face(dtype: torch.dtype) -> None:
    """As its scattered row in fp32, for equal scores too, wherever their clusters stand. Compiled as well."""
    text = Gemma4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
    )
    config = Gemma4AssistantConfig(text_config=text.to_dict(), num_centroids=CLUSTERS, centroid_intermediate_top_k=TOP_K)
    embedder = Gemma4AssistantMaskedEmbedder(config).requires_grad_(False)
    states, _, ordering, weight, top_k = arguments(50, dtype, equal=VOCABULARY - 100)
    embedder.token_ordering.copy_(ordering)
    exact = embedder.centroids(states.float())
    wanted = torch.cat([embedder(row[None, None].float(), weight.float()).argmax(-1)[0] for row in states])
    for function in (ordered_argmax, torch.compile(ordered_argmax, dynamic=False)):
        assert function(states, exact, ordering, weight, top_k).tolist() == wanted.tolist()


def test_rows_that_are_not_numbers_give_a_token() -> None:
    _, scores, *rest = arguments(3, torch.float32)
    found = ordered_argmax(torch.full((3, HIDDEN), float("nan")), scores, *rest)
    assert ((found >= 0) & (found < VOCABULARY)).all()
    assert ordered_argmax(torch.zeros(0, HIDDEN), scores[:0], *rest).shape == (0,)


@dtypes
def test_opcheck(dtype: torch.dtype) -> None:
    for op in (torch.ops.gemma4.ordered_argmax.default, torch.ops.gemma4.ordered_scores.default):
        torch.library.opcheck(op, arguments(5, dtype))


@pytest.mark.parametrize(
    ("position", "message"),
    [(1, "scores must be .R, C. for states"), (2, "ordering must be .V."), (4, "top_k must lie in 1..C, got False")],
)
def test_what_does_not_fit(position: int, message: str) -> None:
    given = list(arguments(5, torch.float32))
    given[position] = 0 if position == 4 else given[position][:-1]
    with pytest.raises(ValueError, match=message):
        ordered_argmax(*given)


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreted("tests.ops.interpret_ordered_argmax")


@pytest.mark.parametrize("case", CASES)
def test_kernels(case: str, report: dict[str, str]) -> None:
    assert report.get(case) == "ok"
