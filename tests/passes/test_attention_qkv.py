"""Pass tests of attention_qkv: exact counts, numerics, near misses, dynamic shapes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gemma4_compile.packed.inputs import Request
from gemma4_compile.passes import FUSIONS
from tests.models import DEVICE
from tests.passes.harness import assert_missed, assert_same, compile_passes, forms, rows
from tests.passes.packed_step import PackedStep

FUSION = "attention_qkv"
BOTH = frozenset({"qkv_norm_rope", FUSION})
BATCH = [Request([5, 6, 7, 8, 9]), Request([20] * 13, rows=[3, 12])]
OWNERS = {"e": 2, "moe": 3, "dense": 2}  # layers that own KV; of moe's and dense's, full ones have V = K


@pytest.mark.parametrize("kind", OWNERS)
def test_exact_count(kind: str) -> None:
    """Each owner of KV in a packed step, by its layer; no op for its norms is left, and layers that share keep attention."""
    step = PackedStep(kind, BOTH)
    step(BATCH)
    (record,) = step.run.records
    sites = FUSIONS[FUSION].sites(step.geometry)
    assert len(sites) == OWNERS[kind]
    assert [site.path.split(".self_attn")[0] for site in record.matched(FUSION)] == [f"model.{site}" for site in sites]
    assert step.run.ops[FUSION] == len(sites) and step.run.ops["qkv_norm_rope"] == 0
    assert step.run.ops["attention"] == len(step.geometry.layers) - len(sites)
    assert len(record.matched("qkv_norm_rope")) == len(step.geometry.layers), "it is counted all the same"


def test_no_site_outside_of_packed_steps() -> None:
    assert not forms("e", FUSION)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["e", "moe"])
def test_equals_unfused(kind: str, dtype: torch.dtype) -> None:
    """Logits, and what lies in the pages, to the bit."""
    (fused, pages), (unfused, other) = (PackedStep(kind, enabled, dtype)(BATCH) for enabled in (BOTH, None))
    assert_same(fused, unfused)
    assert pages.keys() == other.keys() and pages
    for name, tensor in pages.items():
        assert tensor.any()
        assert_same(tensor, other[name])


@pytest.mark.parametrize("kind", ["e", "moe"])
def test_dynamic_shape(kind: str) -> None:
    """One graph serves other numbers of tokens, requests and wanted rows."""
    step, unfused = PackedStep(kind, {*BOTH, "yoco"}), PackedStep(kind, None)
    for batch in (BATCH, [Request([5] * 9, rows=[1, 2, 8])] * 3, [Request([4, 5])] * 2):
        (logits, pages), (expected, other) = step(batch), unfused(batch)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # yoco's products have fewer rows
        for name, tensor in pages.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5)
    assert len(step.run.graphs) == 1 and step.run.ops[FUSION] == OWNERS[kind]


def test_without_the_norms_fusion_each_site_has_a_reason() -> None:
    step = PackedStep("dense", {FUSION})
    step(BATCH)
    (record,) = step.run.records
    assert not record.matched(FUSION) and step.run.ops["attention"] == 2
    reasons = [miss.reason for miss in record.misses if miss.fusion == FUSION]
    assert len(reasons) == 2 and all("expected getitem, found rms_norm_noscale" in reason for reason in reasons)


OPS = torch.ops.gemma4
Heads = tuple[Tensor, Tensor, Tensor]
WEIGHT, COS = rows(16, seed=1), rows(1, 4, 16, seed=2)


def normed(q: Tensor, k: Tensor, v: Tensor) -> Heads:
    return OPS.qkv_norm_rope(q, k, v, WEIGHT, WEIGHT, COS, COS, 1e-6)


def turned(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).transpose(1, 2)


def attention(q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
    """Of one request of four tokens over pages of its own."""
    keys, values = (torch.zeros(1, 16, 2, 16, device=DEVICE) for _ in range(2))
    slots = torch.arange(4, device=DEVICE)
    table, starts = (torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in ([[0]], [0, 4]))
    return OPS.attention(q, k, v, keys, values, slots, table, slots.clone(), starts, 0, 0, 1.0)


def alike(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = normed(q, k, v)
    return attention(turned(q), turned(k), turned(v))


def keys_read_twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = normed(q, k, v)
    return attention(turned(q), turned(k), turned(v)), k * 2


def queries_read_twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = normed(q, k, v)
    return attention(turned(q), turned(k), turned(v)), q * 2


def keys_and_values_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = normed(q, k, v)
    return attention(turned(q), turned(v), turned(k))


def keys_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = normed(q, k, v)
    return attention(turned(q), turned(k * 2), turned(v))


def keys_shared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = normed(q, k, v)
    return attention(turned(q), None, None), k, v


def not_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = normed(q, k, v)
    return attention(q, k, v)


def heads() -> Heads:
    return rows(1, 4, 4, 16, seed=3), rows(1, 4, 2, 16, seed=4), rows(1, 4, 2, 16, seed=5)


def test_what_the_near_misses_are_near_to() -> None:
    done = compile_passes(alike, {FUSION})
    assert_same(done.call(*heads()), alike(*heads()))
    assert done.ops == {FUSION: 1}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (keys_read_twice, "is also used by"),
        (queries_read_twice, "is also used by"),
        (keys_and_values_swapped, "expected 2, found 1"),
        (keys_scaled, "expected getitem, found mul"),
        (keys_shared, "expected transpose, found the literal None"),
        (not_turned, "expected transpose, found getitem"),
    ],
)
def test_near_miss(function: Callable, reason: str) -> None:
    assert_missed(function, heads(), FUSION, reason)
