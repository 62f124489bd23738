"""The compiled kernels of verify at a real vocabulary: the CPU's results, CUDA graphs, no waits, times beside the sampler's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4_compile import ops
from gemma4_compile.ops import draw_draft
from tests.gpu.times import microseconds
from tests.ops.sample_cases import MIXES
from tests.ops.verify_cases import awkward_requests, mixture

verify: Any = ops.verify  # mypy takes each starred list for all arguments
VOCABULARY = 262144
FORMS = pytest.mark.parametrize("block", (False, True), ids=("by token", "by block"))
CANDIDATES = pytest.mark.parametrize("candidates", (None, 4096), ids=("dense", "sparse"))


def cuda(args: list[Any]) -> list[Any]:
    return [None if a is None else a.cuda() for a in args]


def different(args: list[Any], block: bool) -> list[int]:
    """Requests whose results on CUDA are not the CPU's."""
    wanted, got = verify(*args, block), verify(*cuda(args), block)
    return sum((g.cpu() != w for g, w in zip(got, wanted, strict=True)), torch.zeros(())).nonzero()[:, 0].tolist()


@FORMS
@CANDIDATES
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_the_results_of_the_reference(dtype: torch.dtype, candidates: int | None, block: bool):
    for mixes in (MIXES, [(0, 1.0, 0.0), (64, 0.95, 0.0)]):
        logits, *rest = mixture(6, 3, VOCABULARY, candidates, mixes=mixes)
        assert not different([logits.to(dtype), *rest], block)


@FORMS
def test_small_vocabularies(block: bool):
    for width, candidates in ((1, None), (5, 3), (300, None), (300, 100), (2500, 1500), (4099, None)):
        assert not different(mixture(100, 4, width, candidates), block)


@FORMS
def test_awkward_rows(block: bool):
    for width in (5, 128, 1023, 2100):
        assert not different(awkward_requests(width), block)


@FORMS
@CANDIDATES
def test_cuda_graph_serves_other_contents_and_never_waits(candidates: int | None, block: bool):
    """Drafts too are drawn in the graph."""

    def step(args: list[Any]) -> list[Tensor]:
        scores, tokens, seeds, offsets, greedy = *args[4:6], *args[10:12], ~(args[6] > 0)
        drafts = [draw_draft(scores[:, j], None if tokens is None else tokens[:, j], seeds, offsets, j, greedy) for j in (0, 1)]
        stacked = torch.stack(drafts, 1)
        return [stacked, *verify(*args[:3], stacked, *args[4:], block)]

    contents = []
    for greedy in (3, 1, 0):
        logits, *rest = mixture(8, 2, 20_000, candidates, greedy=greedy, spare=0)
        contents.append(cuda([torch.cat((logits, torch.zeros(24, 20_000)))[:24], *rest]))  # as many rows each time
    wanted = [step(args) for args in contents]
    static = [None if a is None else a.clone() for a in contents[0]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(static)
    for turn in (1, 2, 0, 1):
        for buffer, content in zip(static, contents[turn], strict=True):
            if buffer is not None:
                buffer.copy_(content)
        graph.replay()
        assert all(torch.equal(o, w) for o, w in zip(out, wanted[turn], strict=True))


def test_compiled_drafts():
    """Inductor may round the noise otherwise, so a few drafts may differ."""
    scores = torch.randn(500, 4096, device="cuda")
    tokens = torch.rand(500, 4096, device="cuda").argsort(1)
    rows = torch.arange(500, device="cuda")
    compiled = torch.compile(draw_draft, fullgraph=True)
    for step in range(2):
        got = compiled(scores, tokens, rows, rows, torch.tensor(step, device="cuda"), rows % 3 == 0)
        assert (got != draw_draft(scores, tokens, rows, rows, step, rows % 3 == 0)).sum() <= 2


@CANDIDATES
@pytest.mark.parametrize("requests", (1, 16, 80))
def test_times(requests: int, candidates: int | None):
    """Prints medians (pytest -s). No bound: other work may share the GPU."""
    most = 3
    logits = (torch.randn(requests, most + 1, VOCABULARY, device="cuda") * 3).bfloat16()
    rows = torch.arange(requests, device="cuda")
    counts = torch.full_like(rows, most)
    for top_k, top_p in ((0, 1.0), (64, 0.95), (0, 0.95)):
        shaping = [torch.full((requests,), value, device="cuda") for value in (1.0, top_k, top_p, 0.0)]
        shaping[1] = shaping[1].int()
        scores = logits[:, :most].float() + torch.randn(requests, most, VOCABULARY, device="cuda")
        tokens = None
        if candidates is not None:
            scores, tokens = scores.topk(candidates, dim=2)
        greedy = rows < 0
        drafts = torch.stack([
            draw_draft(scores[:, j], None if tokens is None else tokens[:, j], rows, rows, j, greedy) for j in range(most)
        ], dim=1)  # fmt: skip
        args = logits.flatten(0, 1), rows * (most + 1), counts, drafts, scores, tokens, *shaping, rows, rows
        each = [t.repeat_interleave(most + 1) for t in (*shaping, rows, rows)]
        sampled = microseconds(partial(ops.sample, logits.flatten(0, 1), *each))
        by_token, by_block = (microseconds(partial(verify, *args, block)) for block in (False, True))
        print(
            f"R={requests}, K={most}, C={candidates or VOCABULARY}, top_k={top_k}, top_p={top_p}: sample {sampled:.1f} us, "
            f"by token {by_token:.1f}, by block {by_block:.1f}"
        )
