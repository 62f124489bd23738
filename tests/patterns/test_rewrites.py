"""Every Rewrite computes what it replaces; a new one is covered by being in FUSIONS."""

from collections.abc import Iterator

import pytest
import torch
from torch.fx import GraphModule

import gemma4_compile.ops  # noqa: F401
from gemma4_compile.passes import FUSIONS
from gemma4_compile.patterns import rms_norm, rope
from gemma4_compile.patterns.rewrite import Rewrite
from gemma4_compile.patterns.template import Template
from tests.passes.one_process import alone

REWRITES = [*rms_norm.rewrites(), *rope.rewrites(), *(r for fusion in FUSIONS.values() for r in fusion.rewrites())]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """Sums over the ranks are those of one."""
    with alone():
        yield


def evaluate(template: Template, inputs: dict) -> tuple[torch.Tensor, ...]:
    names = [node.target for node in template.graph.nodes if node.op == "placeholder"]
    result = GraphModule({}, template.graph)(*(inputs[name] for name in names))
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.name)
def test_replacement_computes_the_same(rewrite: Rewrite) -> None:
    torch.manual_seed(0)
    inputs = rewrite.inputs()
    expected, actual = evaluate(rewrite.searched, inputs), evaluate(rewrite.replacement, inputs)
    assert len(expected) == len(actual)
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.name)
def test_both_sides_have_the_same_parameters(rewrite: Rewrite) -> None:
    """The replacement is bound with what the search found."""
    assert rewrite.replacement.parameters.keys() <= rewrite.searched.parameters.keys()
    assert rewrite.inputs().keys() == rewrite.searched.parameters.keys()


def test_names_are_unique() -> None:
    assert len({rewrite.name for rewrite in REWRITES}) == len(REWRITES)


def test_sources_name_a_line() -> None:
    for rewrite in REWRITES:
        file, line = rewrite.searched.source.rsplit(":", 1)
        assert file.startswith(("patterns/", "transformers/")) and int(line) > 0
