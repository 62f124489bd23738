"""Memory of caches: how much there is, who has it, and when it comes back."""

import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma4TextConfig

from gemma4_compile.calls.cache_views import lease_of
from gemma4_compile.calls.kv_memory import PAGE, SLACK, KVMemory
from gemma4_compile.geometry import geometry
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
from gemma4_compile.hf.step_cache import CACHE
from gemma4_compile.optimized import state_of
from tests.hf.test_generate import calls_of, pair
from tests.models import prompt


@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_bytes_at_8000_tokens(name: str) -> None:
    """At most a quarter more than transformers' own dynamic cache, which keeps a window less one of sliding layers."""
    config = Gemma4TextConfig(**TEXT_CONFIGS[name])
    memory = KVMemory(geometry(config), config.sliding_window, torch.bfloat16, torch.device("meta"))
    own = 0
    pages = {kind.name: memory._pages(kind, kind.window or 8000) for kind in memory.kinds}
    ours = 0
    for kind in memory.kinds:
        token = 2 * 2 * len(kind.layers) * kind.heads * kind.dim
        own += token * min(8000, kind.window - 1 if kind.window else 8000)
        ours += token * pages[kind.name] * PAGE
    assert ours <= 1.25 * own, f"{ours / own:.2f}"


def test_a_long_prompt_takes_one_slab() -> None:
    """What its scratch memory leaves goes to the region that the cache has."""
    _, model = pair("e")
    model(prompt(1, 2))
    memory = calls_of(model).memory
    before = len(memory.slabs)
    output = model(prompt(1, 8 * SLACK), logits_to_keep=1)
    assert len(memory.slabs) <= before + 1
    lease = lease_of(output[CACHE], 2)
    assert lease is not None and sum(slab.nbytes for slab in memory.slabs if slab is lease.slab) == lease.slab.nbytes
    assert {kind.name: lease.regions[kind.name].pages for kind in memory.kinds} == {
        kind.name: memory._pages(kind, kind.window or 8 * SLACK) for kind in memory.kinds
    }


def test_memory_comes_back_with_the_last_tensor() -> None:
    _, model = pair("dense")
    model(prompt(1, 2))
    memory = calls_of(model).memory
    gc.collect()
    assert all(slab.empty for slab in memory.slabs)
    cache: Any = model(prompt(2, 5))[CACHE]
    assert not all(slab.empty for slab in memory.slabs)
    held = cache.layers[1].keys
    del cache
    assert not all(slab.empty for slab in memory.slabs), "somebody has a tensor of it"
    before = held.clone()
    model(prompt(2, 9, seed=4))
    assert torch.equal(held, before)
    del held
    assert all(slab.empty for slab in memory.slabs)


def test_decoding_stays_in_its_memory() -> None:
    """A step copies nothing but when a region is full."""
    _, model = pair("e")
    cache: Any = model(prompt(1, 5))[CACHE]
    lease = lease_of(cache, 2)
    assert lease is not None
    version = lease.version
    for seed in range(40):
        model(prompt(1, 1, seed=seed), **{CACHE: cache})
    assert lease_of(cache, 2) is lease and lease.version == version and lease.length == 45


@pytest.mark.parametrize("wrong", ["batch", "model", "half"])
@pytest.mark.filterwarnings("ignore:gemma4_compile runs this call")
def test_caches_that_do_not_fit_end_as_in_hugging_face(wrong: str) -> None:
    plain, model = pair("e")
    caches = []
    for each in (plain, model):
        owner = pair("moe")[0] if wrong == "model" else each
        cache: Any = DynamicCache(config=owner.config)
        owner(prompt(2, 4), **{CACHE: cache})
        if wrong == "half":
            cache.layers[1].crop(-1)
        caches.append(cache)
    given = prompt(3 if wrong == "batch" else 2, 2)
    try:
        expected = plain(given, **{CACHE: caches[0]}).logits
    except Exception as error:
        with pytest.raises(type(error)):
            model(given, **{CACHE: caches[1]})
    else:
        torch.testing.assert_close(model(given, **{CACHE: caches[1]}).logits, expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(model(prompt(1, 3)).logits.argmax(-1), plain(prompt(1, 3)).logits.argmax(-1)), "and others go on"


def test_cache_memory_is_told() -> None:
    _, model = pair("dense")
    model(prompt(1, 2))
    assert state_of(model).cache_memory == sum(slab.nbytes for slab in calls_of(model).memory.slabs) > 0


def test_short_prompts_across_slabs() -> None:
    """A turn that does not fit moves a cache to another slab, where others are: both kinds of layers, and the turn's keys."""
    plain, model = pair("e")
    pairs: list[list[Any]] = [[DynamicCache(config=each.config) for each in (plain, model)] for _ in range(3)]
    model(prompt(1, 2))
    slabs = set()
    for seed in range(24):
        for number, caches in enumerate(pairs):
            given = prompt(1, 100 + 60 * number, seed=seed)
            expected, actual = (
                each(given, logits_to_keep=3, **{CACHE: cache}).logits
                for each, cache in zip((plain, model), caches, strict=True)
            )
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
            lease = lease_of(caches[1], 2)
            assert lease is not None
            slabs.add(id(lease.slab))
    assert len(slabs) > 1
