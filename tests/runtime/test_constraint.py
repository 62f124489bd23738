"""Constrained requests: what may come is decided from all tokens before, steps overlap or not; others are as they would be."""

from dataclasses import replace

import numpy as np
import pytest

from gemma4_compile import Engine, EngineConfig, SamplingParams, SpeculativeConfig, demo_checkpoint
from tests.runtime.demo_models import demo

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


class Counting:
    """Each token must be the one before, and one; the first is 100. Fails where it is told to."""

    def __init__(self, fails_at: int = -1):
        self.next, self.seen, self._fails_at = 100, 0, fails_at

    def fill(self, words: np.ndarray) -> None:
        if self.seen == self._fails_at:
            raise RuntimeError("no more")
        assert words.shape == (2048 // 32,) and words.dtype == np.int32
        words[:] = 0
        words[self.next // 32] = np.uint32(1 << self.next % 32).astype(np.int32)

    def accept(self, token: int) -> None:
        self.seen, self.next = self.seen + 1, token + 1


def engine(overlap: bool, mtp: bool = False) -> Engine:
    models = demo("e")
    speculative = SpeculativeConfig(demo_checkpoint("e") / "assistant", 3) if mtp else None
    config = EngineConfig(max_requests=8, max_batched_tokens=64, page_size=16, overlap=overlap)
    return Engine(models.served, config, models.tokenizer, speculative=speculative)


@pytest.mark.parametrize("mtp", [False, True], ids=["plain", "mtp"])
@pytest.mark.parametrize("overlap", [False, True], ids=["in turns", "overlapping"])
def test_each_token_follows_from_the_one_before(overlap: bool, mtp: bool) -> None:
    served = engine(overlap, mtp)
    prompts = demo("e").prompts(6, 60)
    free = [output.token_ids for output in served.generate(prompts, PARAMS)]
    bound = replace(PARAMS, constraint=Counting)
    drawn = replace(PARAMS, constraint=Counting, temperature=1.5, n=2, top_k=20, logprobs=1)
    outputs = served.generate(prompts, [PARAMS, bound, PARAMS, drawn, bound, PARAMS])
    counted = list(range(100, 112))
    assert [outputs[i].token_ids for i in (0, 2, 5)] == [free[i] for i in (0, 2, 5)]
    assert [sample.token_ids for i in (1, 3, 4) for sample in outputs[i].samples] == [counted] * 4
    assert all(one.logprob < max(one.top.values()) for one in outputs[3].logprobs or [])
    assert not (outputs[1].metrics.draft_tokens or outputs[3].metrics.draft_tokens)
    assert bool(outputs[0].metrics.draft_tokens) == mtp


@pytest.mark.parametrize("overlap", [False, True])
def test_a_constraint_that_fails_ends_its_request_alone(overlap: bool) -> None:
    served = engine(overlap)
    free, bound = demo("e").prompts(2, 20)
    wanted = served.generate([free], PARAMS)[0].token_ids
    found, failed = served.generate([free, bound], [PARAMS, replace(PARAMS, constraint=lambda: Counting(fails_at=3))])
    assert found.token_ids == wanted and failed.finish_reason == "error"
    assert failed.error == "its constraint failed: no more" and failed.token_ids == [100, 101, 102]
    assert all(pool.free == pool.pages for pool in served.runner.pages.pools.values()) and not served.has_work


def test_a_step_that_fails_takes_bound_requests_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine(overlap=True)
    with monkeypatch.context() as patch:
        patch.setattr(served.runner, "_new_tokens", lambda *_: 1 / 0)
        (failed,) = served.generate([[5, 6]], replace(PARAMS, constraint=Counting))
    assert "a step failed: ZeroDivisionError" in failed.error
    assert served.generate([[5, 6]], replace(PARAMS, constraint=Counting))[0].token_ids == list(range(100, 112))


def test_min_tokens_and_a_constraint_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="min_tokens and a constraint may leave no token"):
        replace(PARAMS, constraint=Counting, min_tokens=2)
