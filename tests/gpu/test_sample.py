"""The compiled sampler at a real vocabulary: the CPU's tokens, CUDA graphs, one compilation for all batches, times."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from gemma4_compile import ops
from tests.gpu.times import microseconds
from tests.ops.sample_cases import MIXES, awkward, mixture, parameters

VOCABULARY = 262144
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cuda(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a.cuda() for a in args)


def language_like(rows: int) -> Tensor:
    """[rows, VOCABULARY]: a few likely tokens above a bulk, as models have them."""
    logits = torch.randn(rows, VOCABULARY) * 2.5 - 8
    likely = torch.randint(0, VOCABULARY, (rows, 200))
    return logits.scatter_(1, likely, 16 - 12 * torch.rand(rows, 200))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (1, 3, 80))
def test_the_tokens_of_the_reference(rows: int, dtype: torch.dtype):
    """Flat rows search the whole vocabulary, language-like ones their candidates."""
    for logits in (language_like(rows), torch.randn(rows, VOCABULARY)):
        for _ in range(1 if rows == 80 else 6):
            _, *rest = mixture(rows, 1, greedy=7 if rows > 1 else 0)
            args = (logits.to(dtype), *rest)
            wrong = (ops.sample(*cuda(args)).cpu() != ops.sample(*args)).nonzero()[:, 0].tolist()
            assert not wrong, [[a[row].item() for a in rest] for row in wrong]


def test_awkward_rows_of_all_mixes():
    for width in (1, 5, 128, 1023, 4099):
        for first in range(0, len(MIXES), 15):
            args = (awkward(width), *parameters(MIXES[first : first + 15]))
            assert torch.equal(ops.sample(*cuda(args)).cpu(), ops.sample(*args))


def test_strided_rows():
    logits, *rest = mixture(6, 1000)
    wide = torch.randn(6, 1333)
    wide[:, 7:1007] = logits
    assert torch.equal(ops.sample(wide.cuda()[:, 7:1007], *cuda(tuple(rest))).cpu(), ops.sample(logits, *rest))


def test_rows_past_two_to_the_31():
    rows = 2**31 // VOCABULARY + 2
    args = cuda(parameters([(64, 0.95, 0.0)] * rows))
    logits = torch.randn(1, VOCABULARY, device="cuda", dtype=torch.bfloat16).repeat(rows, 1)
    assert ops.sample(logits, *args)[-1] == ops.sample(logits[-1:], *(a[-1:] for a in args))[0]


def test_the_same_tokens_each_time():
    """Candidates are collected in whatever order programs come."""
    args = cuda(mixture(40, VOCABULARY))
    tokens = ops.sample(*args)
    for _ in range(20):
        assert torch.equal(ops.sample(*args), tokens)


def test_cuda_graph_serves_other_contents():
    contents = [cuda(mixture(12, VOCABULARY, greedy=greedy)) for greedy in (7, 1, 0)]
    wanted = [ops.sample(*args) for args in contents]
    static = tuple(a.clone() for a in contents[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.sample(*static)
    for turn in (1, 2, 0, 1):
        for buffer, content in zip(static, contents[turn], strict=True):
            buffer.copy_(content)
        graph.replay()
        assert torch.equal(out, wanted[turn])


def test_one_compilation_for_all_batches(monkeypatch: pytest.MonkeyPatch):
    import triton

    ops.sample(*cuda(mixture(3, 1024)))
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["repr"]))
    for rows in (1, 2, 16, 40):
        ops.sample(*cuda(mixture(rows, 1024)))
    assert not compiled


def test_opcheck():
    torch.library.opcheck(torch.ops.gemma4.sample.default, cuda(mixture(9, 1000)))


TIMED = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "no thresholds": (1.0, 0, 1.0, 0.0),
    "top_k 64, top_p 0.95": (1.0, 64, 0.95, 0.0),
    "top_p 0.95": (1.0, 0, 0.95, 0.0),
    "min_p 0.05": (1.0, 0, 1.0, 0.05),
}


@pytest.mark.parametrize("rows", (1, 80))
@pytest.mark.parametrize("kind", ("language-like", "flat"))
def test_times(kind: str, rows: int):
    """Prints medians, in a CUDA graph (pytest -s). No bound: other work may share the GPU."""
    logits = (language_like(rows) if kind == "language-like" else torch.randn(rows, VOCABULARY)).cuda()
    for name, (temperature, top_k, top_p, min_p) in TIMED.items():
        _, *rest = cuda(parameters([(top_k, top_p, min_p)] * rows))
        args = logits, torch.full((rows,), temperature, device="cuda"), *rest
        print(f"sample, {kind}, N={rows}, {name}: {microseconds(partial(ops.sample, *args)):.1f} us")
