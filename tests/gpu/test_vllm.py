"""vLLM's recorded graphs with the kernels of the fusions, and gate and up as vLLM keeps them. No vLLM here."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma4_compile.ops import OPS
from gemma4_compile.passes import trace_patterns
from gemma4_compile.vllm.forms import FUSIONS, pipeline
from gemma4_compile.vllm.norms import LowerNorms, RaiseNorms
from tests.ops.accuracy import assert_as_accurate
from tests.ops.exact import exact
from tests.vllm.recorded import GRAPHS, load
from tests.vllm.test_graphs import outputs, passed


@pytest.mark.parametrize("tokens", [1, 6, 40, 300])
@pytest.mark.parametrize("path", sorted(GRAPHS.glob("*-e.json")), ids=lambda path: path.stem)
def test_fused_graph_computes_the_same(path: Path, tokens: int) -> None:
    trace_patterns(pipeline(FUSIONS, {}, (RaiseNorms(), LowerNorms())))
    recorded = load(path.stem, torch.float32, "cuda")
    inputs = [i.cuda() if isinstance(i, Tensor) else i for i in recorded.inputs(tokens, torch.float32)]
    expected = outputs(copy.deepcopy(recorded.module), inputs)
    passed(recorded)
    for mine, other in zip(outputs(recorded.module, inputs), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 8, 32, 33, 64, 512])
def test_gate_and_up_of_one_matrix(tokens: int) -> None:
    """Kernels of few rows, one product beyond: as accurate as two products."""
    x = torch.randn(tokens, 1536, device="cuda", dtype=torch.bfloat16)
    both = (torch.randn(2 * 6144, 1536, device="cuda") / 1536**0.5).bfloat16()
    halves = both[:6144], both[6144:]
    (true,) = exact("gate_up", (x, *halves))
    assert_as_accurate(OPS["gate_up"].launch(x, *halves), OPS["gate_up"].reference(x, *halves), true)
