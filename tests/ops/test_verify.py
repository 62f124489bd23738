"""Rejection sampling of drafts: the target's distribution whatever the drafter, what a request depends on, its kernels under
Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4_compile import ops
from gemma4_compile.ops import draw_draft
from gemma4_compile.ops.sampling.sample import kept_reference, scaled
from tests.ops.interpreted import interpreted, seeded_on_one_thread  # noqa: F401  (a fixture of every test here)
from tests.ops.sample_cases import parameters
from tests.ops.verify_cases import Chain, awkward_requests, mixture

MODULE = importlib.import_module("gemma4_compile.ops.sampling.verify")  # in the package the function has its name
verify: Any = ops.verify  # mypy takes each starred list for all arguments
OP = torch.ops.gemma4.verify.default
FORMS = pytest.mark.parametrize("block", (False, True), ids=("by token", "by block"))
COUNT = 20_000
SHAPES: dict[str, tuple[int, float, float]] = {
    "none": (0, 1.0, 0.0), "top_k": (5, 1.0, 0.0), "top_p": (0, 0.8, 0.0), "min_p": (0, 1.0, 0.15), "all": (7, 0.9, 0.05)
}  # fmt: skip


def chi_square(drawn: Tensor, probabilities: Tensor) -> float:
    """Chi-square over what it exceeds with a probability of 1e-4 (Wilson and Hilferty's approximation).

    Outcomes expected fewer than 8 times count as one. Infinite if one without probability was drawn."""
    expected = probabilities.double() * len(drawn)
    found = torch.bincount(drawn, minlength=len(expected)).double()
    if found[expected == 0].any():
        return float("inf")
    rare = expected < 8
    expected, found = (torch.cat((t[~rare], t[rare].sum()[None])) for t in (expected, found))
    found, expected = found[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3
    return ((found - expected).square() / expected).sum().item() / bound


def shaped(count: int, shape: str) -> list[Tensor]:
    _, *shaping, _, _ = parameters([SHAPES[shape]] * count)
    return shaping


def written(chain: Chain, tokens: int, temperature: float, shape: str, block: bool, draw: Any = draw_draft) -> Tensor:
    """The first `tokens` tokens of 20,000 requests, [COUNT, tokens]: as many rounds as that takes at most."""
    out = torch.full((COUNT, tokens + chain.most + 1), chain.width)
    offsets, seeds = torch.zeros(COUNT, dtype=torch.int64), torch.arange(COUNT)
    counts = torch.full((COUNT,), chain.most)
    first, shaping = torch.arange(COUNT) * (chain.most + 1), shaped(COUNT, shape)
    places, rows = torch.arange(chain.most), torch.arange(COUNT)
    for _ in range(tokens):
        last = torch.where(offsets > 0, out[rows, offsets - 1], chain.width)
        drafts, scores, logits = chain.drafts(last, seeds, offsets, temperature, draw)
        accepted, token = verify(
            logits, first, counts, drafts, scores, None, torch.full((COUNT,), temperature), *shaping, seeds, offsets, block
        )
        new = torch.cat((torch.where(places < accepted[:, None], drafts, 0), token[:, None] * 0), 1)
        new[rows, accepted] = token
        begin = torch.minimum(offsets, torch.tensor(tokens))  # those that have enough write where nobody looks
        out.scatter_(1, begin[:, None] + torch.arange(chain.most + 1), new)
        offsets = torch.minimum(begin + accepted + 1, torch.tensor(tokens))
    return out[:, :tokens]


def wanted(chain: Chain, tokens: int, temperature: float, shape: str) -> Tensor:
    """The probability of each run of tokens, the first one's digit first."""
    x = scaled(chain.target, torch.full((chain.width + 1,), temperature))
    kept = kept_reference(x, *shaped(chain.width + 1, shape))
    p = torch.where(kept, x, -torch.inf).double().softmax(1)
    joint = p[chain.width]
    for _ in range(tokens - 1):
        joint = (joint.view(-1, chain.width)[:, :, None] * p[: chain.width]).flatten()
    return joint


def numbers(tokens: Tensor, width: int) -> Tensor:
    return sum((tokens[:, i] * width ** (tokens.shape[1] - 1 - i) for i in range(tokens.shape[1])), torch.zeros(1).long())


@FORMS
@pytest.mark.parametrize(("temperature", "shape"), [(0.7, "all"), *product((1.0, 0.7), list(SHAPES)[:-1])])
def test_tokens_are_distributed_as_the_targets(temperature: float, shape: str, block: bool):
    """The first one, and the first two; not as those of another temperature."""
    chain = Chain(width=12, most=3, nearness=0.6)
    tokens = written(chain, 2, temperature, shape, block)
    for count in (1, 2):
        assert chi_square(numbers(tokens[:, :count], 12), wanted(chain, count, temperature, shape)) < 1
        assert chi_square(numbers(tokens[:, :count], 12), wanted(chain, count, temperature * 1.15, shape)) > 1


@FORMS
@pytest.mark.parametrize("nearness", (0.0, 0.9))
def test_four_tokens_of_up_to_four_rounds(nearness: float, block: bool):
    chain = Chain(width=4, most=3, nearness=nearness)
    tokens = written(chain, 4, 0.8, "none", block)
    assert chi_square(numbers(tokens, 4), wanted(chain, 4, 0.8, "none")) < 1


@FORMS
def test_a_residual_that_is_the_target_would_be_seen(block: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MODULE, "residual", lambda p, q, c: p)
    chain = Chain(width=12, most=3, nearness=0.6)
    tokens = written(chain, 2, 1.0, "none", block)
    for count in (1, 2):
        assert chi_square(numbers(tokens[:, :count], 12), wanted(chain, count, 1.0, "none")) > 2


@FORMS
def test_by_block_drafts_numbered_by_place_alone_would_be_seen(block: bool):
    """Why draw_draft is told the round's first place: numbers that decided must not be drawn with again. By token none did."""

    def by_place(scores: Tensor, tokens: None, seeds: Tensor, offsets: Tensor, step: int, greedy: Tensor) -> Tensor:
        return draw_draft(scores, tokens, seeds, offsets + step, 0, greedy)

    chain = Chain(width=2, most=2, nearness=0.0)
    chain.target = torch.tensor([1 / 3, 2 / 3]).log().expand(3, 2)
    chain.drafter = torch.tensor([2 / 3, 1 / 3]).log().expand(3, 2)
    probabilities = wanted(chain, 3, 1.0, "none")
    assert chi_square(numbers(written(chain, 3, 1.0, "none", block), 2), probabilities) < 1
    assert (chi_square(numbers(written(chain, 3, 1.0, "none", block, by_place), 2), probabilities) > 5) == block


def test_drafts_are_distributed_as_softmax_of_their_scores():
    """The same ones from candidates in another order, and by a compiled function; those of two places are independent."""
    scores = torch.linspace(0, 2, 6)[torch.randperm(6)].expand(COUNT, -1)
    seeds, offsets = torch.arange(COUNT), torch.full((COUNT,), 5)
    sampled = torch.zeros(COUNT, dtype=torch.bool)
    first, second = (draw_draft(scores, None, seeds, offsets, step, sampled) for step in (0, 1))
    q = scores[0].double().softmax(0)
    assert chi_square(first, q) < 1
    assert chi_square(first * 6 + second, (q[:, None] * q).flatten()) < 1
    tokens = torch.rand(COUNT, 6).argsort(1)
    assert torch.equal(draw_draft(scores.gather(1, tokens), tokens, seeds, offsets, 0, sampled), first)
    compiled = torch.compile(draw_draft, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(scores.gather(1, tokens), tokens, seeds, offsets, torch.tensor(1), sampled), second)


def test_probabilities_of_drafts_in_tiles():
    """Each tile is weighed at its own highest score; one of them has no finite score, one none that counts."""
    scores = torch.randn(2, 3, 5000) * 4
    scores[0, :, 1024:2048] = -torch.inf
    scores[1, :, 2048:3072] -= 60
    q, known = MODULE._drafter(scores, None, 5000)
    torch.testing.assert_close(q, scores.double().softmax(2), rtol=2e-6, atol=1e-11)
    assert known.all()


def test_greedy_drafts():
    tokens = torch.stack([torch.randperm(1000)[:40] for _ in range(30)])
    scores = torch.randn(30, 40).round()
    highest = [int(t[s == s.max()].min()) for t, s in zip(tokens, scores, strict=True)]
    rows = torch.arange(30)
    assert draw_draft(scores, tokens, rows, rows, 0, rows >= 0).tolist() == highest
    assert torch.equal(draw_draft(scores, None, rows, rows, 3, rows >= 0), scores.argmax(1))
    scores[:, 3] = torch.nan
    for greedy in (rows >= 0, rows < 0):
        assert (draw_draft(scores, tokens, rows, rows, 0, greedy)[:, None] == tokens).any(1).all()


def accepted_by(block: bool, p: Tensor, q: Tensor, count: int, most: int) -> float:
    """Drafts accepted on average where every row has the same p and q."""
    seeds, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    scores = q.log().expand(count, most, -1).contiguous()
    drafts = torch.stack([draw_draft(scores[:, j], None, seeds, zeros, j, zeros > 0) for j in range(most)], 1)
    rows = torch.arange(count) * (most + 1), torch.full((count,), most)
    logits = p.log().expand(count * (most + 1), -1)
    shaping = torch.ones(count), *shaped(count, "none")
    return verify(logits, *rows, drafts, scores, None, *shaping, seeds, zeros, block)[0].double().mean().item()


def test_by_block_accepts_more():
    """10/9 and 11/9 of two drafts, by hand: of p = (1/3, 2/3) and q = (2/3, 1/3)."""
    p, q = torch.tensor([1 / 3, 2 / 3]), torch.tensor([2 / 3, 1 / 3])
    assert abs(accepted_by(False, p, q, COUNT, 2) - 10 / 9) < 0.025  # standard error 0.006
    assert abs(accepted_by(True, p, q, COUNT, 2) - 11 / 9) < 0.025
    for nearness in (0.0, 0.5, 0.9):
        x, y = torch.randn(2, 10)
        p, q = x.softmax(0), (nearness * x + (1 - nearness) * y).softmax(0)
        assert accepted_by(True, p, q, 5000, 4) > accepted_by(False, p, q, 5000, 4) - 0.01


@FORMS
def test_all_is_accepted_where_both_agree(block: bool):
    p = torch.randn(50).softmax(0)
    assert accepted_by(block, p, p, 2000, 3) == 3


def sampled_at(args: list[Any], index: Tensor) -> Tensor:
    """gemma4::sample of each request's row at this index."""
    logits, first, *_, temperature, top_k, top_p, min_p, seeds, offsets = args
    return ops.sample(logits[first + index], temperature, top_k, top_p, min_p, seeds, offsets + index)


@FORMS
@pytest.mark.parametrize("candidates", (None, 30), ids=("dense", "sparse"))
def test_the_last_token_is_the_samplers(candidates: int | None, block: bool):
    """Behind all drafts, and of requests without any."""
    args = mixture(300, 3, 50, candidates)
    accepted, token = verify(*args, block)
    counts = args[2]
    assert ((accepted >= 0) & (accepted <= counts)).all()
    for part in (counts == 0, accepted == counts, (accepted == counts) & (counts == 3)):
        assert part.any() and torch.equal(token[part], sampled_at(args, accepted)[part])
    fewer = accepted < counts
    assert (token != sampled_at(args, accepted))[fewer].sum() > 10  # residuals have numbers of their own


@FORMS
def test_greedy_accepts_what_is_the_argmax(block: bool):
    args = mixture(100, 4, 30, greedy=1)
    args[4].fill_(torch.nan)  # not asked for
    logits, first, counts, drafts = args[:4]
    best = logits.argmax(1)
    for r in range(100):  # the argmax up to a place of its own, which may lie behind the last draft
        for j in range(min(r % 6, int(counts[r]))):
            drafts[r, j] = best[first[r] + j]
    accepted, token = verify(*args, block)
    for r in range(100):
        right = [bool(drafts[r, j] == best[first[r] + j]) for j in range(int(counts[r]))]
        assert accepted[r] == [*right, False].index(False)
    assert accepted.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(token, best[first + accepted])


@FORMS
def test_sparse_candidates_are_dense_ones_without_the_others(block: bool):
    args = mixture(300, 3, 60, 20)
    dense = torch.full((300, 3, 60), -torch.inf).scatter_(2, args[5], args[4])
    order = torch.rand(300, 3, 20).argsort(2)
    wanted = verify(*args, block)
    for scores, tokens in ((dense, None), (args[4].gather(2, order), args[5].gather(2, order))):
        for a, w in zip(verify(*args[:4], scores, tokens, *args[6:], block), wanted, strict=True):
            assert torch.equal(a, w)


@FORMS
def test_a_request_depends_on_nothing_of_others(block: bool):
    """Nor on its place, on what lies behind its counts, or on the width of the batch."""
    args = mixture(60, 3, 40, 12)
    accepted, token = verify(*args, block)
    for r in range(0, 60, 7):
        first, count = int(args[1][r]), int(args[2][r])
        one = [a[r : r + 1] for a in args[1:]]
        one = [args[0][first : first + count + 1], torch.zeros_like(one[0]), *one[1:]]
        for cut in range(count, 4):
            if cut:
                got = verify(*one[:3], *(a[:, :cut] for a in one[3:6]), *one[6:], block)
                assert (got[0], got[1]) == (accepted[r], token[r])
    behind = torch.arange(3) >= args[2][:, None]
    args[3] = torch.where(behind, 7, args[3])
    args[4] = torch.where(behind[:, :, None], torch.nan, args[4])
    args[5] = torch.where(behind[:, :, None], -5, args[5])
    for a, w in zip(verify(*args, block), (accepted, token), strict=True):
        assert torch.equal(a, w)


@FORMS
def test_seeds_and_offsets_make_other_results(block: bool):
    args = mixture(200, 3, 200, greedy=0)
    args[7:10] = shaped(200, "none")
    wanted = verify(*args, block)
    for at, change in ((10, 1), (10, 2**62), (11, 1), (11, 2**32)):
        others = verify(*args[:at], args[at] ^ change, *args[at + 1 :], block)
        assert (others[0] != wanted[0]).any() and (others[1] != wanted[1]).sum() > 100


@FORMS
def test_rows_that_are_no_numbers(block: bool):
    """No draft is accepted at them, and the token there is the sampler's: as if the request had no more drafts."""
    args = awkward_requests(40)
    accepted, token = verify(*args, block)
    logits, first, counts, drafts, scores = args[:5]
    place = torch.arange(drafts.shape[1])
    broken = ~logits.float().amax(1)[first[:, None] + place].isfinite()
    broken |= ~scores.amax(2).isfinite() & (args[6] > 0)[:, None]
    limit = (~broken).long().cumprod(1).sum(1)
    assert (limit == 0).sum() > 5 and (limit == 1).sum() > 5
    assert (accepted <= limit).all()
    got = verify(logits, first, limit, *args[3:], block)
    assert torch.equal(got[0], accepted) and torch.equal(got[1], token)
    assert torch.equal(token[limit == 0], sampled_at(args, torch.zeros_like(first))[limit == 0])


@FORMS
def test_drafts_that_are_no_tokens_end_the_run(block: bool):
    args = mixture(80, 3, 40)
    args[2].fill_(0)
    wanted = verify(*args, block)
    args[1], args[2] = args[1] * 0, torch.full_like(args[2], 3)
    for draft in (-1, 40, 2**40):
        args[3] = torch.full_like(args[3], draft)
        assert not verify(*args, block)[0].any()
    assert not wanted[0].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("candidates", (None, 8), ids=("dense", "sparse"))
def test_opcheck(candidates: int | None, dtype: torch.dtype):
    logits, *rest = mixture(5, 2, 20, candidates)
    torch.library.opcheck(OP, (logits.to(dtype), *rest, dtype == torch.float32))


WRONG: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "logits must be .S, V., got 1, wanted 2; pass": (0, lambda logits: logits[0]),
    "first must be .R. for drafts .R, K., got .4., wanted .5.; pass one a request": (1, lambda first: first[:4]),
    "counts has a dtype of its own, got torch.int32, wanted torch.int64; build": (2, lambda counts: counts.int()),
    "K must be 1 or more, got False, wanted True; call gemma4::sample": (3, lambda drafts: drafts[:, :0]),
    "draft_scores must be .R, K, C. for drafts .R, K., got .5, 1., wanted .5, 2.;": (4, lambda scores: scores[:, :1]),
    "draft_scores has a dtype of its own": (4, lambda scores: scores.double()),
    "draft_tokens must have the shape of draft_scores": (5, lambda tokens: tokens[:, :, 1:]),
    "C must be V without draft_tokens, got 8, wanted 20; pass the candidates": (5, lambda tokens: None),
    "temperature must be .R.": (6, lambda temperature: temperature[:4]),
    "offsets must be .R.": (11, lambda offsets: offsets[None]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_one_clear_line(message: str):
    args = mixture(5, 2, 20, 8)
    position, wrong = WRONG[message]
    args[position] = wrong(args[position])
    for call in (verify, verify.launch):
        with pytest.raises(ValueError, match=f"^verify: {message}") as raised:
            call(*args, True)
        assert "\n" not in str(raised.value)


def test_no_requests_and_fake():
    args = mixture(5, 2, 20, 8)
    assert [t.shape for t in verify(args[0], *(a[:0] for a in args[1:]), True)] == [(0,), (0,)]
    for fake in OP(*(a.to("meta") for a in args), True):
        assert (fake.shape, fake.dtype, fake.device.type) == ((5,), torch.int64, "meta")


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreted("tests.ops.interpret_verify")


@pytest.mark.slow
@pytest.mark.parametrize("case", ("dense", "sparse", "all shapes", "no numbers", "dtypes", "widths", "strides"))
def test_kernels_under_the_interpreter(case: str, report: dict[str, str]):
    assert report.get(case) == "ok"
