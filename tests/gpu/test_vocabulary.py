"""A divided vocabulary with all its ranks on one GPU: tokens of the whole op, kernels against references.

On several GPUs: test_all_reduce.py."""

from __future__ import annotations

import pytest
import torch

from gemma4_compile import ops
from gemma4_compile.ops.sampling import local_sample
from tests.ops.sample_cases import MIXES, awkward, mixture, parameters
from tests.ops.vocabulary_cases import Ranks

VOCABULARY = 262144
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("count", (2, 4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tokens_of_sample(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch):
    ranks = Ranks(count, monkeypatch.setattr)
    for width, rows, scale in ((VOCABULARY, 40, 3.0), (VOCABULARY, 1, 0.5), (4096, 90, 0.2), (80, 90, 3.0)):
        logits, *rest = (t.cuda() for t in mixture(rows, width, scale=scale))
        args = logits.to(dtype), *rest
        wrong = (ranks.call("sample", *args) != ops.sample(*args)).nonzero()[:, 0].tolist()
        assert not wrong, [[t[row].item() for t in rest] for row in wrong]


def test_awkward_rows_of_all_mixes(monkeypatch: pytest.MonkeyPatch):
    ranks = Ranks(2, monkeypatch.setattr)
    for width in (8, 136, 4104):
        for first in range(0, len(MIXES), 15):
            args = tuple(t.cuda() for t in (awkward(width), *parameters(MIXES[first : first + 15])))
            assert torch.equal(ranks.call("sample", *args), ops.sample(*args))


def test_the_same_histograms_as_on_the_cpu():
    """Integers, in whatever order programs add them."""
    logits, temperature, _, top_p, *_ = mixture(30, 20000)
    best = local_sample.local_highest(logits, 0)
    search = local_sample.begin_search(temperature, top_p, best, 20000)
    for digit in range(3):
        args = logits, temperature, search[0], None, best
        wanted = local_sample.digit_histogram(*args, digit)
        found = local_sample.digit_histogram(*(None if t is None else t.cuda() for t in args), digit)
        assert torch.equal(found.cpu(), wanted)
        on_gpu = local_sample.next_digit(found, *(t.cuda() for t in search), digit == 0)
        search = local_sample.next_digit(wanted, *search, digit == 0)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, search, strict=True))


def test_one_compilation_for_all_batches(monkeypatch: pytest.MonkeyPatch):
    import triton

    ranks = Ranks(2, monkeypatch.setattr)
    ranks.call("sample", *(t.cuda() for t in mixture(3, 1024)))
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["repr"]))
    for rows in (1, 2, 16, 40):
        ranks.call("sample", *(t.cuda() for t in mixture(rows, 1024)))
    assert not compiled
