"""The scheduler and the pages without a model: whatever comes, each request reads its own keys, and no page is lost."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gemma4_compile.runtime.sampling_params import SamplingParams
from gemma4_compile.runtime.scheduling.pages import KVPages
from gemma4_compile.runtime.scheduling.scheduler import Scheduler
from gemma4_compile.runtime.scheduling.sequence import Sequence
from tests.runtime.fake_device import FakeDevice, assert_right, expected

PAGE, WINDOW, LONGEST = 4, 6, 40


def served(
    full: int, sliding: int, rows: int = 4, budget: int = 16, depth: int = 1, reuse: bool = True, speculative: int = 0,
    luck: float = 0.5,
) -> FakeDevice:  # fmt: skip
    pools = {"full_attention": full, "sliding_attention": sliding}
    pages = KVPages(pools, {"full_attention": 0, "sliding_attention": WINDOW}, PAGE, rows, LONGEST // PAGE)
    return FakeDevice(pages, Scheduler(pages, budget, 5, reuse, speculative), rows, depth, speculative, luck)


def sequence(number: int, prompt: list[int], limit: int, speculates: bool = False, **params) -> Sequence:
    limit = min(limit, LONGEST - len(prompt))
    return Sequence(number, list(prompt), SamplingParams(max_tokens=None, **params), limit, speculates=speculates)


def run_out(device: FakeDevice, most: int = 3000) -> None:
    for _ in range(most):
        if not (device.scheduler.running or device.scheduler.waiting or device.running):
            return
        device.step()
    raise AssertionError(f"nothing ends: {device.scheduler.running} {device.scheduler.waiting}")


def random_prompt(chooser: random.Random, longest: int = LONGEST - 1) -> list[int]:
    """Of few tokens, so that prompts have beginnings in common."""
    return [chooser.randrange(2) for _ in range(chooser.randint(1, longest))]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize(("full", "sliding"), [(200, 100), (10, 9), (25, 12)])
def test_every_request_ends_with_its_own_tokens(full: int, sliding: int, reuse: bool, depth: int) -> None:
    chooser = random.Random(f"{full} {reuse} {depth}")
    device = served(full, sliding, depth=depth, reuse=reuse)
    sequences = [sequence(i, random_prompt(chooser), chooser.randint(1, 30)) for i in range(40)]
    for s in sequences:
        device.scheduler.add(s)
    run_out(device)
    for s in sequences:
        assert s.finish_reason == "length" and s.output == expected(s.tokens[: s.prompt_length], s.limit)
    for pool in device.pages.pools.values():
        assert pool.free == pool.pages
    if full != 25:
        assert (device.scheduler.preemptions > 0) == (full == 10)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(("speculative", "luck"), [(1, 0.6), (3, 0.0), (3, 1.0), (9, 0.6)])
@pytest.mark.parametrize(("full", "sliding"), [(200, 100), (10, 9), (25, 12)])
def test_every_request_ends_with_its_own_tokens_with_drafts(
    full: int, sliding: int, speculative: int, luck: float, depth: int
) -> None:
    """More drafts than a page has tokens, and than a window; some requests without any, in the same steps; rounds planned
    before the host knows how far the one before has come, or the two before."""
    chooser = random.Random(f"{full} {speculative} {luck}")
    device = served(full, sliding, depth=depth, speculative=speculative, luck=luck)
    sequences = [
        sequence(i, random_prompt(chooser), chooser.randint(1, 30), speculates=i % 4 != 3, stop_token_ids=(3,) * (i % 2))
        for i in range(40)
    ]
    for s in sequences:
        device.scheduler.add(s)
    run_out(device)
    for s in sequences:
        assert s.finish_reason and s.output == expected(s.tokens[: s.prompt_length], len(s.output))
        assert s.finish_reason == "stop" or len(s.output) == s.limit
        assert 3 not in s.output[:-1] or not s.params.stop_token_ids
    for pool in device.pages.pools.values():
        assert pool.free == pool.pages
    assert device.drafted > 0 and (luck < 1 or depth or device.accepted == device.drafted)
    if full == 10:
        assert device.scheduler.preemptions > 0


def test_no_draft_accepted_leaves_nothing_behind() -> None:
    """A verification without a token more than decode gives: the next step is planned as any, also beside a new prompt."""
    device = served(60, 40, depth=0, speculative=3)
    writer = sequence(0, [1], 12, speculates=True)
    device.scheduler.add(writer)
    scheduled = device.step()
    for round_number in range(3):
        right = expected([1], len(writer.output) + 1)[-1]
        device.state.drafts[scheduled[0].row] = (right + 1) % 11
        if round_number == 1:
            device.scheduler.add(sequence(1, [0] * 9, 3, speculates=True))
        before = len(writer.output)
        scheduled = device.step()
        assert scheduled[0].drafts == 3 and len(writer.output) == before + 1 and writer.computed == len(writer.tokens) - 1
    run_out(device)
    assert_right(writer)


def test_drafts_wait_for_all_that_write() -> None:
    """Each gets its token first; what is left of budget and pages goes to drafts, and nobody is preempted for one."""
    device = served(9, 9, rows=3, budget=4, depth=0, speculative=3, luck=1.0, reuse=False)
    sequences = [sequence(i, [1], 11, speculates=True) for i in range(3)]
    for s in sequences:
        device.scheduler.add(s)
    while any(not s.output for s in sequences):
        device.step()
    assert [(w.length, w.drafts) for w in device.step()] == [(2, 1), (1, 0), (1, 0)]
    run_out(device)
    assert device.scheduler.preemptions == 0
    for s in sequences:
        assert_right(s)


def test_a_page_is_taken_for_a_draft_only_if_it_is_free() -> None:
    device = served(10, 40, rows=2, budget=16, depth=0, speculative=3, luck=1.0, reuse=False)
    first, second = sequence(0, [1], 20, speculates=True), sequence(1, [0] * 35, 2)
    for s in (first, second):
        device.scheduler.add(s)
    while not second.finish_reason:
        device.step()
    assert device.scheduler.preemptions == 0
    run_out(device)
    assert_right(first)
    assert_right(second)


def test_preempted_and_aborted_requests_keep_no_draft() -> None:
    device = served(60, 40, depth=0, speculative=3)
    sequences = [sequence(i, [1, 0], 20, speculates=True) for i in range(2)]
    for s in sequences:
        device.scheduler.add(s)
    device.step()
    assert all(s.drafted == 3 for s in sequences)
    device.scheduler._preempt(sequences[1])
    device.scheduler.finish(sequences[0], "abort")
    scheduled = device.step()
    assert [(w.sequence, w.length, w.drafts, w.ahead) for w in scheduled] == [(sequences[1], 3, 0, -1)], (
        "computed anew, not drafted"
    )
    run_out(device)
    assert_right(sequences[1])


def test_a_prefix_is_computed_once() -> None:
    device = served(60, 40, budget=64)
    prompt = [1] * 22
    first, second = sequence(0, prompt, 3), sequence(1, [*prompt[:18], 0, 0, 0], 3)
    device.scheduler.add(first)
    device.step()
    device.scheduler.add(second)
    device.step()
    assert (first.cached, second.cached) == (0, 16)
    run_out(device)
    again = sequence(2, prompt, 3)  # after they have ended: from pages that nobody holds
    device.scheduler.add(again)
    run_out(device)
    assert again.cached == 20
    for s in (first, second, again):
        assert_right(s)


def test_requests_of_one_step_share_a_prefix() -> None:
    """As the n samples of one prompt do: pages that a step fills are read in the same step."""
    device = served(60, 40, budget=64)
    sequences = [sequence(i, [1, 0] * 10, 4) for i in range(3)]
    for s in sequences:
        device.scheduler.add(s)
    scheduled = device.step()
    assert [w.length for w in scheduled] == [20, 4, 4]
    run_out(device)
    for s in sequences:
        assert_right(s)


def test_a_prefix_whose_window_is_gone_is_not_reused() -> None:
    """The full layers still have it, the sliding ones do not: both or none."""
    device = served(60, 6, budget=8)
    prompt = [1] * 20
    device.scheduler.add(sequence(0, prompt, 2))
    run_out(device)
    device.scheduler.add(sequence(1, [0] * 30, 2))  # takes all sliding pages
    run_out(device)
    again = sequence(2, prompt, 2)
    device.scheduler.add(again)
    run_out(device)
    assert again.cached == 0
    assert_right(again)


def test_long_prompts_do_not_stop_those_who_write() -> None:
    device = served(100, 60, budget=8)
    writer, long = sequence(0, [1], 20), sequence(1, [0] * 38, 1)
    device.scheduler.add(writer)
    device.step()
    device.scheduler.add(long)
    while long.finish_reason is None:
        before = writer.computed
        device.step()
        assert writer.computed == before + 1 or writer.todo == 0


def test_nobody_is_passed_over() -> None:
    """A long prompt that does not fit yet is not overtaken for ever by short ones that would."""
    device = served(12, 12, budget=64)
    running = [sequence(i, [1] * 9, 12) for i in range(3)]
    long, short = sequence(3, [0] * 36, 1), sequence(4, [0], 1)
    for s in (*running, long, short):
        device.scheduler.add(s)
    while long.finish_reason is None:
        device.step()
        assert short.cached is None or long.cached is not None, "admitted before it"
    run_out(device)


@pytest.mark.slow
def test_sliding_pages_stay_few() -> None:
    """20,000 tokens in chunks: the window's pages and the chunk's."""
    pages = KVPages(
        {"full_attention": 5001, "sliding_attention": 40}, {"full_attention": 0, "sliding_attention": 16}, 4, 1, 5001
    )
    device = FakeDevice(pages, Scheduler(pages, 64), 1, 1)
    long = Sequence(0, [1] * 19_000, SamplingParams(), 1_000)
    device.scheduler.add(long)
    most = {"prompt": 0, "writing": 0}
    while long.finish_reason is None:
        device.step()
        if long.allocation is not None:
            held = [p for p in long.allocation.pages["sliding_attention"] if p >= 0]
            part = "writing" if long.computed > 19_064 else "prompt"
            most[part] = max(most[part], len(held))
    assert most["prompt"] <= 16 // 4 + 1 + 64 // 4 and most["writing"] <= 16 // 4 + 2
    assert_right(long)


@settings(max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
class Serving(RuleBasedStateMachine):
    """Anything in any order: requests, steps, aborts, at any pool size."""

    @initialize(full=st.integers(10, 40), sliding=st.integers(8, 20), rows=st.integers(1, 5), budget=st.integers(5, 40),
                depth=st.integers(0, 2), reuse=st.booleans(), speculative=st.integers(0, 6),
                luck=st.sampled_from([0.0, 0.5, 0.9, 1.0]))  # fmt: skip
    def begin(
        self, full: int, sliding: int, rows: int, budget: int, depth: int, reuse: bool, speculative: int, luck: float
    ) -> None:  # fmt: skip
        self.device = served(full, sliding, rows, budget, depth, reuse, speculative, luck)
        self.sequences: list[Sequence] = []

    @rule(data=st.data(), length=st.integers(1, LONGEST - 1), limit=st.integers(1, 20), ones=st.integers(0, 30),
          logprobs=st.booleans(), stop=st.booleans(), drafts=st.booleans())  # fmt: skip
    def add(self, data: st.DataObject, length: int, limit: int, ones: int, logprobs: bool, stop: bool, drafts: bool) -> None:
        prompt = ([1] * ones + data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)))[:length]
        new = sequence(len(self.sequences), prompt, limit, prompt_logprobs=0 if logprobs else None,
                       stop_token_ids=(3,) if stop else (),
                       speculates=drafts and not logprobs and self.device.speculative > 0)  # fmt: skip
        self.sequences.append(new)
        self.device.scheduler.add(new)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.device.step()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        living = [s for s in self.sequences if s.finish_reason is None]
        if living:
            self.device.scheduler.finish(data.draw(st.sampled_from(living)), "abort")

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "device"):
            self.device.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "device"):
            return
        run_out(self.device)
        for s in self.sequences:
            assert s.finish_reason is not None
            assert_right(s)
            assert s.finish_reason != "length" or len(s.output) == s.limit
        for pool in self.device.pages.pools.values():
            assert pool.free == pool.pages, "a page has leaked"


TestServing = Serving.TestCase


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(("full", "sliding"), [(200, 100), (12, 10)])
def test_no_chunk_ends_within_a_block(full: int, sliding: int, depth: int) -> None:
    """Runs of image tokens that see each other are computed in one step, whatever else runs, and all requests end."""
    chooser = random.Random(f"blocks {full} {depth}")
    device = served(full, sliding, budget=12, depth=depth)
    sequences = []
    for number in range(30):
        made = sequence(number, random_prompt(chooser, 30), chooser.randint(1, 9))
        first = 0
        while first + 3 < made.prompt_length and chooser.random() < 0.7:
            begin = chooser.randint(first, made.prompt_length - 2)
            first = min(begin + chooser.randint(2, 8), made.prompt_length)
            made.blocks.append((begin, first))
        sequences.append(made)
        device.scheduler.add(made)
    schedule, ends = device.scheduler.schedule, 0

    def watched():
        nonlocal ends
        scheduled = schedule()
        for w in scheduled:
            end = w.start + w.length
            assert not any(first < end < last for first, last in w.sequence.blocks), (w.start, end, w.sequence.blocks)
            ends += any(end == last for _, last in w.sequence.blocks)
        return scheduled

    device.scheduler.schedule = watched  # type: ignore[method-assign]
    run_out(device)
    assert ends, "chunks end at blocks"
    for s in sequences:
        assert s.finish_reason == "length" and s.output == expected(s.tokens[: s.prompt_length], s.limit)
