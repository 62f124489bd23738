"""The sampler: what it keeps, how often it draws what, what a draw depends on, and its kernels under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gemma4_compile import ops
from gemma4_compile.ops.sampling.sample import kept_reference, scaled
from tests.ops.interpreted import interpreted, seeded_on_one_thread  # noqa: F401  (a fixture of every test here)
from tests.ops.sample_cases import awkward, mixture, parameters

OP = torch.ops.gemma4.sample.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def kept(x: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    rows = len(x)
    options = torch.full((rows,), top_k, dtype=torch.int32), torch.full((rows,), top_p), torch.full((rows,), min_p)
    return kept_reference(x, *options) & (x > -torch.inf)


@pytest.mark.parametrize(("top_k", "top_p"), list(product((0, 1, 5, 40, 128, 1000), (1.0, 0.95, 0.6, 0.01))))
def test_keeps_what_transformers_keeps(top_k: int, top_p: float):
    prompt: Any = None  # none of them reads it
    for min_p, temperature in product((0.0, 0.01, 0.2, 1.0), (0.4, 1.0, 1.7)):
        logits = torch.randn(20, 128) * 3
        wanted = TemperatureLogitsWarper(temperature)(prompt, logits)
        if top_k:
            wanted = TopKLogitsWarper(top_k)(prompt, wanted)
        if top_p < 1:
            wanted = TopPLogitsWarper(top_p)(prompt, wanted)
        if min_p:
            wanted = MinPLogitsWarper(min_p)(prompt, wanted)
        x = scaled(logits, torch.full((20,), temperature))
        assert torch.equal(kept(x, top_k, top_p, min_p), wanted > -torch.inf)


def test_equals_are_kept_together():
    x = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0, 2.0, -0.0, -torch.inf]])
    assert kept(x, top_k=2).nonzero()[:, 1].tolist() == [0, 2, 3, 5]
    assert kept(x, top_k=5).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 5]
    assert kept(x, top_k=6).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert kept(x, top_p=0.5).nonzero()[:, 1].tolist() == [0, 2, 3, 5]
    assert kept(x, top_p=0.0).nonzero()[:, 1].tolist() == [0]
    assert kept(x, min_p=0.36).nonzero()[:, 1].tolist() == [0, 2, 3, 5]
    assert kept(x, min_p=5.0).nonzero()[:, 1].tolist() == [0]


def test_top_p_is_a_share_of_what_top_k_left():
    x = torch.tensor([[0.5, 0.3, 0.1, 0.1 - 1e-3]]).log()
    assert kept(x, top_p=0.85).sum() == 3
    assert kept(x, top_k=2, top_p=0.85).sum() == 2
    assert kept(x, top_k=2, top_p=0.6).sum() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy(dtype: torch.dtype):
    logits = torch.randn(50, 128).to(dtype)
    logits[1] = 0.0
    logits[2, 5:] = 30.0
    temperature, *rest = parameters([(5, 0.5, 0.1)] * 50)
    for value in (0.0, -1.0, torch.nan):
        assert torch.equal(ops.sample(logits, temperature.fill_(value), *rest), logits.argmax(dim=1))
    only_best = ops.sample(logits, temperature.fill_(1.0), torch.ones_like(rest[0]), *rest[1:])
    assert torch.equal(logits.gather(1, only_best[:, None])[:, 0], logits.amax(dim=1))


def test_rows_that_cannot_be_sampled_have_their_argmax():
    logits = awkward(128)
    sampled = ops.sample(logits, *parameters([(0, 1.0, 0.0)] * len(logits), greedy=0))
    for row in (4, 6, 7, 8, 9):
        assert sampled[row] == logits[row].argmax()


def test_minus_infinity_is_never_sampled():
    logits = torch.full((500, 64), -torch.inf)
    logits[torch.arange(500), torch.arange(500) % 64] = -1e4
    logits[torch.arange(500), torch.arange(500) * 7 % 64] = -1e4
    for options in ((0, 1.0, 0.0), (60, 0.9, 0.0), (0, 1.0, 1e-14)):
        tokens = ops.sample(logits, *parameters([options] * 500, greedy=0))
        assert (logits.gather(1, tokens[:, None]) > -torch.inf).all()


# A chi-square of d degrees of freedom exceeds these with a probability of 1e-4.
CRITICAL = {3: 21.1, 7: 29.9, 15: 44.3}


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """Of draws against probabilities [V]; infinite if a token without probability was drawn."""
    expected, drawn = probabilities.double() * len(tokens), torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = expected > 0
    return float("inf") if drawn[~possible].any() else ((drawn - expected)[possible] ** 2 / expected[possible]).sum().item()


def draws(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, count: int, by: str) -> Tensor:
    """`count` draws from one row of logits: of one request, or the first ones of as many requests."""
    _, top_ks, top_ps, min_ps, seeds, offsets = parameters([(top_k, top_p, min_p)] * count)
    if by == "offset":
        seeds, offsets = torch.full_like(seeds, 1234), torch.arange(count)
    else:
        seeds, offsets = torch.arange(count), torch.zeros_like(offsets)
    return ops.sample(logits.expand(count, -1), torch.full((count,), temperature), top_ks, top_ps, min_ps, seeds, offsets)


@pytest.mark.parametrize("by", ("offset", "seed"))
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "left"), [(0, 1.0, 0.0, 16), (8, 1.0, 0.0, 8), (0, 0.6, 0.0, 4), (8, 0.9, 0.4, 4)]
)
def test_draws_are_distributed_as_softmax_of_the_kept(by: str, top_k: int, top_p: float, min_p: float, left: int):
    """And are not as the softmax of another temperature: the test would see that."""
    logits, temperature = torch.linspace(3, 0, 16)[torch.randperm(16)][None], 0.7
    tokens = draws(logits, temperature, top_k, top_p, min_p, 20_000, by)
    x = scaled(logits, torch.tensor([temperature]))
    possible = kept(x, top_k, top_p, min_p)[0]
    assert possible.sum() == left
    assert chi_square(tokens, torch.where(possible, x[0], -torch.inf).softmax(0)) < CRITICAL[left - 1]
    assert chi_square(tokens, torch.where(possible, x[0] * 0.9, -torch.inf).softmax(0)) > CRITICAL[left - 1]


def test_draws_of_one_request_are_independent():
    tokens = draws(torch.zeros(1, 4), 1.0, 0, 1.0, 0.0, 20_000, "offset")
    pairs = tokens[:-1] * 4 + tokens[1:]
    assert chi_square(pairs, torch.full((16,), 1 / 16)) < CRITICAL[15]


def test_a_row_does_not_depend_on_others_nor_on_its_place():
    args = mixture(60, 128)
    tokens = ops.sample(*args)
    order = torch.randperm(60)
    assert torch.equal(ops.sample(*(a[order] for a in args)), tokens[order])
    for row in range(0, 60, 7):
        assert ops.sample(*(a[row : row + 1] for a in args)) == tokens[row]


def test_seeds_and_offsets_make_other_draws():
    logits, (temperature, *options, seeds, offsets) = (
        torch.zeros(1, 128).expand(40, -1),
        parameters([(0, 1.0, 0.0)] * 40, greedy=0),
    )
    tokens = ops.sample(logits, temperature, *options, seeds, offsets)
    assert torch.equal(ops.sample(logits, temperature, *options, seeds, offsets), tokens)
    for others in ((seeds + 1, offsets), (seeds ^ 2**62, offsets), (seeds, offsets + 1), (seeds, offsets + 2**32)):
        assert (ops.sample(logits, temperature, *options, *others) != tokens).sum() > 35


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype):
    logits, *rest = mixture(9, 128)
    torch.library.opcheck(OP, (logits.to(dtype), *rest))


def test_no_rows_and_fake():
    args = mixture(5, 128)
    assert ops.sample(*(a[:0] for a in args)).shape == (0,)
    fake = OP(*(a.to("meta") for a in args))
    assert (fake.shape, fake.dtype, fake.device.type) == ((5,), torch.int64, "meta")


WRONG: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "logits must be .N, V., got 1, wanted 2; pass": (0, lambda logits: logits[0]),
    "V must lie in 1..2..22, got False, wanted True": (0, lambda logits: logits[:, :0]),
    "temperature must be .N. for logits .N, V., got .4., wanted .5.; pass one a row": (1, lambda temperature: temperature[:4]),
    "top_k has a dtype of its own, got torch.int64, wanted torch.int32; build it with": (2, lambda top_k: top_k.long()),
    "offsets must be .N.": (6, lambda offsets: offsets[None]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_one_clear_line(message: str):
    args = list(mixture(5, 128))
    position, wrong = WRONG[message]
    args[position] = wrong(args[position])
    for call in (ops.sample, ops.sample.launch):  # what launches on CUDA, before anything is
        with pytest.raises(ValueError, match=f"^sample: {message}") as raised:
            call(*args)
        assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreted("tests.ops.interpret_sample")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ("bitwise", "candidates", "whole rows", "own plan", "ties", "awkward rows", "neighbours", "widths", "strides")
)
def test_kernels_under_the_interpreter(case: str, report: dict[str, str]):
    assert report.get(case) == "ok"
