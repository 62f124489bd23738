"""A divided vocabulary against the ops for whole ones: ranks are threads here, whose sums are taken in one process.

Two processes over gloo: test_parallel.py. The kernels of a rank's own part: interpret_vocabulary.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gemma4_compile import ops
from gemma4_compile.ops.sampling import vocabulary
from gemma4_compile.ops.sampling.local_sample import begin_search, digit_histogram, local_draw, local_highest, next_digit
from gemma4_compile.ops.sampling.logits import logprobs_of
from gemma4_compile.ops.sampling.vocabulary import THRESHOLDS, Vocabulary
from tests.ops.interpreted import interpreted, seeded_on_one_thread  # noqa: F401  (a fixture of every test here)
from tests.ops.sample_cases import MIXES, awkward, mixture, parameters
from tests.ops.vocabulary_cases import Ranks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=(1, 2, 4))
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(request.param, monkeypatch.setattr)


def check(ranks: Ranks, args: tuple[Tensor, ...], thresholds: Any = THRESHOLDS) -> None:
    wanted, found = ops.sample(*args), ranks.call("sample", *args, thresholds)
    wrong = (found != wanted).nonzero()[:, 0]
    assert not len(wrong), f"{len(wrong)} rows differ, the first {[a[wrong[0]].tolist() for a in args[1:]]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (0.2, 3.0))
def test_the_tokens_of_sample(dtype: torch.dtype, scale: float, ranks: Ranks):
    """bf16 has many equals, at the thresholds too."""
    for width in (16, 1024):
        logits, *rest = mixture(len(MIXES), width, scale=scale)
        check(ranks, (logits.to(dtype), *rest))


def test_every_mix_on_awkward_rows(ranks: Ranks):
    for first in range(0, len(MIXES), 15):
        check(ranks, (awkward(128), *parameters(MIXES[first : first + 15])))
    for greedy in (0, 1):
        check(ranks, (awkward(128), *parameters([(1, 1.0, 0.0)] * 15, greedy)))


def test_neighbours(ranks: Ranks):
    """Values with no fp32 between them: a threshold that is off by one keeps one more. Many requests, to see it."""
    logits = 1.0 + torch.stack([torch.randperm(208) - 104 for _ in range(600)]) * 2.0**-23
    temperature, *rest = parameters([(3, 1.0, 0.0), (10, 0.5, 0.0), (0, 0.02, 0.0)] * 200)
    check(ranks, (logits, torch.ones_like(temperature), *rest))


def test_equals_at_the_border_of_two_ranks(ranks: Ranks):
    """A k-th value that all ranks have is kept on all of them; greedy rows take the lowest token."""
    logits = torch.zeros(400, 64)
    logits[:, ::5] = 1.0
    check(ranks, (logits, *parameters([(1, 1.0, 0.0), (0, 0.1, 0.0), (13, 0.9, 0.0), (14, 1.0, 0.9)] * 100)))
    check(ranks, (torch.zeros(50, 64), *parameters([(3, 0.5, 0.5)] * 50)))


def test_thresholds_beyond_their_range(ranks: Ranks):
    """None of them leaves nothing of a row."""
    options = [(-(2**31), 1.0, 0.0), (2**31 - 1, 2.0, -1.0), (63, -1.0, 0.0), (0, 1.0, 5.0), (64, 0.999999, 1e-30)] * 20
    check(ranks, (torch.randn(100, 64), *parameters(options)))


def test_rows_without_a_threshold_are_not_read():
    """Nor rows that are not drawn from: greedy ones, and those whose largest x is not finite."""
    logits, temperature = torch.randn(5, 64), torch.tensor([0.0, 1.0, 1.0, 1.0, -1.0])
    logits[2, 3] = torch.inf
    best = local_highest(logits, 0)
    counts = begin_search(temperature, torch.tensor([5, 0, 64, 63, 5], dtype=torch.int32), None, 64)
    shares = begin_search(temperature, torch.tensor([0.5, 1.0, 0.5, 0.5, 0.5]), best, 64)
    for search, least in ((counts, None), (shares, best)):
        assert search[0].tolist() == [-1, -1, -1, 0, -1]
        for digit in range(3):
            histogram = digit_histogram(logits, temperature, search[0], None, least, digit)
            assert histogram.any(dim=1).tolist() == [False, False, False, True, False]
            search = next_digit(histogram, *search, least is not None and digit == 0)
        assert (search[0] < 0).tolist() == [True, True, True, False, True]


COSTS = {
    (): {"max": 1},
    ("min_p",): {"max": 2},
    ("top_k",): {"max": 1, "sum": 3},
    ("top_p",): {"max": 2, "sum": 3},
    ("top_k", "top_p"): {"max": 2, "sum": 6},
    ("top_k", "top_p", "min_p"): {"max": 2, "sum": 6},
}


@pytest.mark.parametrize("thresholds", COSTS)
def test_only_thresholds_in_use_cost_sums(thresholds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    ranks = Ranks(2, monkeypatch.setattr)
    logits, temperature, *rest = mixture(60, 256)
    plain = {"top_k": torch.zeros(60, dtype=torch.int32), "top_p": torch.ones(60), "min_p": torch.zeros(60)}
    shaping = [given if name in thresholds else none for given, (name, none) in zip(rest[:3], plain.items(), strict=True)]
    check(ranks, (logits, temperature, *shaping, *rest[3:]), thresholds)
    assert ranks.counts == COSTS[thresholds]


def test_thresholds_that_are_not_named_are_not_looked_at(monkeypatch: pytest.MonkeyPatch):
    logits, *rest = mixture(90, 256)
    ranks, thresholds = Ranks(2, monkeypatch.setattr), ("top_k",)
    assert not torch.equal(ranks.call("sample", logits, *rest, thresholds), ops.sample(logits, *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax(dtype: torch.dtype, ranks: Ranks):
    for logits in (awkward(128), torch.randn(50, 128), torch.zeros(3, 128)):
        logits = logits.to(dtype)
        assert torch.equal(ranks.call("argmax", logits), logits.argmax(dim=1))
    assert ranks.counts == ({} if ranks.ranks == 1 else {"max": 3})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs(dtype: torch.dtype, ranks: Ranks):
    """64 distinct values, so that the likeliest tokens have one order."""
    logits = torch.stack([torch.randperm(64) for _ in range(70)]).to(dtype) / 4
    logits[5, logits[5] < 8] = -torch.inf
    tokens = torch.randint(0, 64, (70,))
    for top in (0, 1, 5, 17, 32):
        wanted, found = logprobs_of(logits, tokens, top), ranks.call("logprobs", logits, tokens, top)
        assert [t.dtype for t in found] == [t.dtype for t in wanted]
        for position, (a, b) in enumerate(zip(found, wanted, strict=True)):
            torch.testing.assert_close(a, b, rtol=0, atol=0 if position in (1, 3) else 2e-6)
    assert ranks.counts == ({} if ranks.ranks == 1 else {"gather": 5, "sum": 5})


def test_logprobs_of_awkward_rows(ranks: Ranks):
    """Equals, infinities and NaN: values as the whole op has them, and ids of which they are."""
    logits, tokens = awkward(128), torch.arange(15) * 8
    wanted, found = logprobs_of(logits, tokens, 128), ranks.call("logprobs", logits, tokens, 128)
    for position in range(3):
        torch.testing.assert_close(found[position], wanted[position], rtol=1e-6, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(logits.gather(1, found[3]), logits.gather(1, wanted[3]), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[3].sort(dim=1).values, torch.arange(128).expand(15, -1))


def test_gather(ranks: Ranks):
    logits = torch.randn(5, 64).bfloat16()
    assert torch.equal(ranks.call("gather", logits), logits)


def test_no_rows(ranks: Ranks):
    args = tuple(a[:0] for a in mixture(5, 64))
    assert ranks.call("sample", *args).shape == ranks.call("argmax", args[0]).shape == (0,)
    assert [t.shape for t in ranks.call("logprobs", args[0], args[-1], 2)] == [(0,), (0,), (0, 2), (0, 2)]


WRONG: dict[str, tuple[int, int, int, str]] = {
    "size must lie in 1..2..22, got False, wanted True": (2**22 + 8, 0, 2**21 + 4, "g"),
    "24 tokens from 0 on must be an equal part of 64": (64, 0, 24, "g"),
    "32 tokens from 16 on must be an equal part": (64, 16, 32, "g"),
    "32 tokens from 64 on must be an equal part": (64, 64, 32, "g"),
    "start must be a multiple of 4, its remainder, got 2, wanted 0; pad": (60, 30, 30, "g"),
    "a group has parts, one rank has all: divided, got True, wanted False; name the group": (64, 0, 32, ""),
}


@pytest.mark.parametrize("message", WRONG)
def test_parts_that_do_not_fit(message: str):
    with pytest.raises(ValueError, match=f"^Vocabulary: {message}"):
        Vocabulary(*WRONG[message])


def test_wrong_arguments():
    divided, (logits, *rest) = Vocabulary(64, 32, 32, "g"), mixture(5, 64)
    with pytest.raises(ValueError, match="sample: logits must be .N, shard., got .2, 64., wanted .2, 32.; pass this"):
        divided.sample(logits, *rest)
    with pytest.raises(ValueError, match="sample: thresholds are top_k, top_p and min_p: others, got .'topk'., wanted"):
        divided.sample(logits[:, :32], *rest, thresholds=("topk",))
    with pytest.raises(ValueError, match="logprobs: top must lie in 0..size"):
        divided.logprobs(logits[:, :32], rest[-1], 65)


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch):
    """Fake tensors have no values to wait for."""
    monkeypatch.setattr(vocabulary, "_all_reduce", lambda x, kind, group: x.clone())
    monkeypatch.setattr(vocabulary, "_all_gather", lambda x, ranks, group: x.expand(ranks, *x.shape))
    divided, args = Vocabulary(256, 128, 128, "fake"), mixture(5, 128)
    with FakeTensorMode() as fake:
        logits, *rest = (fake.from_tensor(t) for t in args)
        tokens = divided.sample(logits, *rest)
        assert (tokens.shape, tokens.dtype) == (divided.argmax(logits).shape, torch.int64) == ((5,), torch.int64)
        assert [t.shape for t in divided.logprobs(logits, tokens, 200)] == [(5,), (5,), (5, 200), (5, 200)]
        assert divided.gather(logits).shape == (5, 256)
        with pytest.raises(DataDependentOutputException):
            tokens[0].item()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(dtype: torch.dtype):
    logits, temperature, top_k, top_p, min_p, seeds, offsets = mixture(9, 128)
    logits, gemma4 = logits.to(dtype), torch.ops.gemma4
    best = local_highest(logits, 128)
    counts, shares = (begin_search(temperature, limit, b, 256) for limit, b in ((top_k, None), (top_p, best)))
    histogram = digit_histogram(logits, temperature, counts[0], None, None, 0)
    least = next_digit(histogram, *counts, False)[0]
    drawn = local_draw(logits, temperature, seeds, offsets, 128, least, best, min_p)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (gemma4.local_highest, (logits, 128)),
        (gemma4.local_draw, (logits, temperature, seeds, offsets, 128, None, None, None)),
        (gemma4.local_draw, (logits, temperature, seeds, offsets, 128, least, best, min_p)),
        (gemma4.drawn_token, (drawn, temperature)),
        (gemma4.begin_search, (temperature, top_k, None, 256)),
        (gemma4.begin_search, (temperature, top_p, best, 256)),
        (gemma4.digit_histogram, (logits, temperature, counts[0], None, None, 0)),
        (gemma4.digit_histogram, (logits, temperature, shares[0], least, best, 1)),
        (gemma4.next_digit, (histogram, *counts, False)),
        (gemma4.next_digit, (histogram, *shares, True)),
    ]
    for op, args in cases:
        torch.library.opcheck(op.default, args)


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreted("tests.ops.interpret_vocabulary")


@pytest.mark.slow
@pytest.mark.parametrize("case", ("mixtures", "ties", "awkward rows", "neighbours", "tiles", "strides", "no rows"))
def test_kernels_under_the_interpreter(case: str, report: dict[str, str]):
    assert report.get(case) == "ok"
