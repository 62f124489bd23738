"""Constrained requests on the GPU: beside others in overlapped steps, in graphs whose own greedy tokens count for nothing."""

from dataclasses import replace

import pytest

from gemma4_compile import Engine, EngineConfig, SamplingParams
from tests.gpu.test_mtp import LIMITS, serve
from tests.runtime.demo_models import demo
from tests.runtime.test_constraint import Counting

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("drafts", [None, 3], ids=["plain", "mtp"])
def test_each_token_follows_from_the_one_before(drafts: int | None) -> None:
    models = demo("e", "cuda")
    config = EngineConfig(max_requests=32, **LIMITS)
    engine = Engine(models.served, config, models.tokenizer) if drafts is None else serve("e", drafts)
    prompts = models.prompts(10, 100)
    free = [output.token_ids for output in engine.generate(prompts, PARAMS)]
    bound, drawn = replace(PARAMS, constraint=Counting), replace(PARAMS, constraint=Counting, temperature=1.5, top_k=20)
    params = [(PARAMS, bound, drawn)[i % 3] for i in range(10)]
    outputs = engine.generate(prompts, params)
    for index, output in enumerate(outputs):
        assert output.token_ids == (free[index] if index % 3 == 0 else list(range(100, 124)))
    alone = engine.generate(prompts, bound)
    assert all(output.token_ids == list(range(100, 124)) for output in alone)
    assert engine.runner.graphs is not None and engine.runner.graphs.refused == {}
