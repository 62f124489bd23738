"""The forms that vLLM alone writes compute what they replace; each is in the file that the report names."""

import pytest
import torch

import gemma4_compile.ops  # noqa: F401
from gemma4_compile.ops.fusions.linear import merged
from gemma4_compile.passes import FUSIONS as USUAL
from gemma4_compile.patterns.rewrite import Rewrite
from gemma4_compile.vllm.forms import FUSIONS
from tests.patterns.test_rewrites import evaluate

USUAL_REWRITES = [rewrite for fusion in USUAL.values() for rewrite in fusion.rewrites()]
OWN = [rewrite for fusion in FUSIONS.values() for rewrite in fusion.rewrites() if rewrite not in USUAL_REWRITES]


@pytest.mark.parametrize("rewrite", OWN, ids=lambda rewrite: rewrite.name)
def test_replacement_computes_the_same(rewrite: Rewrite) -> None:
    torch.manual_seed(0)
    inputs = rewrite.inputs()
    assert inputs.keys() == rewrite.searched.parameters.keys() == rewrite.replacement.parameters.keys()
    for expected, actual in zip(evaluate(rewrite.searched, inputs), evaluate(rewrite.replacement, inputs), strict=True):
        tolerance = 1e-5 if rewrite.name == "gate_up" else 0.0  # one product or two: the CPU's sums differ
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_forms_are_few_and_named() -> None:
    names = ["qkv_norm_rope", "q_norm_rope", "post_attention_norms", "ple_inputs", "ple_combine", "gate_up"]
    assert [rewrite.name for rewrite in OWN] == names
    assert all(rewrite.searched.source.startswith("vllm/forms.py:") for rewrite in OWN)
    # A fusion keeps its name, its sites and its switch.
    assert all(FUSIONS[name].sites is USUAL[name].sites for name in FUSIONS)


def test_gate_and_up_of_one_matrix_are_one_product() -> None:
    both = torch.randn(12, 8)
    found = merged(both[:6], both[6:])
    assert found is not None and found.data_ptr() == both.data_ptr() and torch.equal(found, both)
    assert merged(both[6:], both[:6]) is None
    assert merged(both[:6], both[6:].clone()) is None
    assert merged(both[:6, :4], both[6:, :4]) is None
    assert merged(both[:4], both[6:10]) is None
