"""Pass tests of qkv_norm_rope: exact counts, numerics, near misses, dynamic shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4ClippableLinear,
    apply_multidimensional_rope,
    apply_rotary_pos_emb,
)

from tests.models import DEVICE, tiny_multimodal
from tests.passes.harness import (
    assert_dynamic,
    assert_equal_alone,
    assert_missed,
    assert_same,
    compile_passes,
    forms,
    norm,
    rows,
)

FUSION = "qkv_norm_rope"
Q, K, V = norm(8, seed=1), norm(8, seed=2), norm(8, scale=False)
SIN = rows(2, 3, 8, seed=9)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("e", {"qkv_norm_rope": 2, "q_norm_rope": 2}),
        ("moe", {"qkv_norm_rope": 1, "kv_norm_rope": 2}),
        ("dense", {"qkv_norm_rope": 1, "kv_norm_rope": 1}),
    ],
)
def test_exact_count(kind: str, expected: dict[str, int]) -> None:
    assert forms(kind, FUSION) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["e", "moe"])
def test_equals_unfused(kind: str, dtype: torch.dtype) -> None:
    assert_equal_alone(kind, FUSION, dtype)


@pytest.mark.parametrize("kind", ["e", "moe"])
def test_dynamic_shape(kind: str) -> None:
    assert_dynamic(kind, FUSION)


@pytest.mark.parametrize(("clipped", "op"), [(False, "qkv_norm_rope_2d"), (True, "qkv_norm_rope_2d_clipped")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vision_encoder(dtype: torch.dtype, clipped: bool, op: str) -> None:
    """Each layer, of any number of images and patches; bit-equal to the encoder as it is."""
    model = tiny_multimodal("e", dtype, vision={"use_clipped_linears": clipped}).requires_grad_(False)
    encoder = model.model.vision_tower.encoder
    width = encoder.config.hidden_size

    def encode(x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return encoder._call_impl(x, mask, pixel_position_ids=positions).last_hidden_state

    def inputs(images: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).view(1, -1, 2)
        mask = torch.ones(images, side * side, dtype=torch.bool, device=DEVICE)
        mask[0, -side:] = False
        return rows(images, side * side, width).to(dtype), mask, places.repeat(images, 1, 1).to(DEVICE)

    done = compile_passes(encode, {FUSION})
    for images, side in ((2, 6), (3, 9)):
        given = inputs(images, side)
        for tensor in given:
            torch._dynamo.mark_dynamic(tensor, [0, 1])
        with torch.no_grad():
            assert_same(done.call(*given), encode(*given))
    assert len(done.graphs) == 1 and done.ops == {op: encoder.config.num_hidden_layers}


Bounds = tuple[Tensor | None, Tensor | None]


def clipped_attention(
    *bounds: Bounds,
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """q, k and v of patches, each a Gemma4ClippableLinear with these bounds of its output, or without any; and inputs."""
    config = Gemma4VisionConfig(use_clipped_linears=True)
    projections: list[Any] = [Gemma4ClippableLinear(config, 16, 32).requires_grad_(False).to(DEVICE) for _ in bounds]
    for seed, (projection, (least, most)) in enumerate(zip(projections, bounds, strict=True)):
        projection.linear.weight.copy_(rows(32, 16, seed=seed))
        projection.input_min.fill_(-1.0)
        projection.output_min, projection.output_max = least, most
    called = [p.linear if p.output_min is None else p for p in projections]
    norms = norm(16, seed=1), norm(16, seed=2), norm(16, scale=False)
    positions = torch.zeros(2, 12, 2, dtype=torch.int64, device=DEVICE)

    def attention(x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (n(p(x).view((2, 12, -1, 16))) for n, p in zip(norms, called, strict=True))
        return (*(apply_multidimensional_rope(t, angles, angles, positions) for t in (q, k)), v)

    return attention, (rows(2, 12, 16), rows(2, 12, 16, seed=6))


def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def test_clipped_projections() -> None:
    """Each with bounds of its own, that are no mirror of each other; two with the very same; NaN goes through."""
    shared = number(-0.5), number(0.7)
    for bounds in ([(number(-1.0), number(0.4)), shared, (number(0.1), number(2.0))], [shared, shared, shared]):
        function, inputs = clipped_attention(*bounds)
        inputs[0][1, 3, 5] = torch.nan
        done = compile_passes(function, {FUSION})
        with torch.no_grad():
            for mine, other in zip(done.call(*inputs), function(*inputs), strict=True):
                assert torch.equal(mine.isnan(), other.isnan())
                assert_same(mine.nan_to_num(), other.nan_to_num())
        assert done.ops == {"qkv_norm_rope_2d_clipped": 1}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ((None, None), ""),  # a plain linear among clipped ones
        ((torch.full((32,), -1.0, device=DEVICE), number(1.0)), "must have one element"),
        ((number(-1.0, torch.float64), number(1.0, torch.float64)), "dtypes differ"),
    ],
    ids=["none", "vector", "fp64"],
)
def test_bounds_of_another_kind(place: int, other: Bounds, reason: str) -> None:
    bounds: list[Bounds] = [(number(-1.0), number(1.0))] * 3
    bounds[place] = other
    assert_missed(*clipped_attention(*bounds), FUSION, reason)


@pytest.mark.parametrize(("parts", "reason"), [((8, 8), "rotates parts of 8 at 4"), ((4, 4), "")])
def test_parts_that_are_no_halves(parts: tuple[int, int], reason: str) -> None:
    """Only two halves, each at its own half, are two dimensions."""

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pieces = zip(*(torch.split(t, list(parts), dim=-1) for t in (x[..., : sum(parts)], cos, sin)), strict=True)
        return torch.cat([apply_rotary_pos_emb(a, b, c, unsqueeze_dim=2) for a, b, c in pieces], dim=-1)

    x, angles = rows(2, 3, 4, 16), rows(2, 3, sum(parts))
    done = compile_passes(turned, {FUSION})
    with torch.no_grad():
        assert_same(done.call(x, angles, angles), turned(x, angles, angles))
    assert not done.ops
    matched = [site.rewrite for site in done.records[0].sites]
    assert matched == ["rope_2d"], matched


def rotated(q: Tensor, cos: Tensor) -> Tensor:
    return apply_rotary_pos_emb(Q(q), cos, SIN, unsqueeze_dim=2)


def heads_first(q: Tensor, cos: Tensor) -> Tensor:
    return apply_rotary_pos_emb(Q(q.transpose(1, 2)), cos, SIN, unsqueeze_dim=1)


def read_twice(q: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    normed = Q(q)
    return apply_rotary_pos_emb(normed, cos, SIN, unsqueeze_dim=2), normed * 2


def no_norm(q: Tensor, cos: Tensor) -> Tensor:
    return apply_rotary_pos_emb(q, cos, SIN, unsqueeze_dim=2)


@pytest.mark.parametrize(
    ("function", "cos", "reason"),
    [
        (read_twice, rows(2, 3, 8), "is also used by"),
        (no_norm, rows(2, 3, 8), "expected rms_norm"),
        (rotated, rows(2, 3, 8).double(), "dtypes differ"),
        (rotated, rows(2, 3, 1), "cos must be"),
    ],
)
def test_near_miss(function, cos: Tensor, reason: str) -> None:
    assert_missed(function, (rows(2, 3, 4, 8), cos), FUSION, reason)


def test_heads_first_is_not_raised() -> None:
    """RoPE over [batch, heads, tokens, head_dim] is another layout: no rope op, and so no site."""
    q, cos = rows(2, 3, 4, 8), rows(2, 3, 8)
    done = compile_passes(heads_first, {FUSION})
    with torch.no_grad():
        assert_same(done.call(q, cos), heads_first(q, cos))
    assert not done.ops


def test_queries_alone_are_fused_where_that_pays() -> None:
    """From 128 tokens on; below, Inductor's one kernel is as fast, and the site is found and left to it."""
    cos = rows(2, 64, 8)

    def many(q: Tensor, cos: Tensor) -> Tensor:
        return apply_rotary_pos_emb(Q(q), cos, cos, unsqueeze_dim=2)

    done = compile_passes(many, {FUSION})
    with torch.no_grad():
        assert_same(done.call(rows(2, 64, 4, 8), cos), many(rows(2, 64, 4, 8), cos))
    assert done.ops == {"q_norm_rope": 1}


def test_projections_of_other_inputs_stay_apart() -> None:
    """q, k and v that do not come from one input are no attention layer: q and k fuse alone, v is left."""
    weights = {name: rows(16, 16, seed=i) for i, name in enumerate("qkv")}

    def attention(x: Tensor, y: Tensor, cos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (F.linear(t, weights[n]).view(2, 64, -1, 8) for t, n in ((x, "q"), (y, "k"), (y, "v")))
        rope = apply_rotary_pos_emb
        return rope(Q(q), cos, cos, unsqueeze_dim=2), rope(K(k), cos, cos, unsqueeze_dim=2), V(v)

    done = compile_passes(attention, {FUSION})
    inputs = (rows(2, 64, 16, seed=21), rows(2, 64, 16, seed=22), rows(2, 64, 8))
    with torch.no_grad():
        assert_same(done.call(*inputs), attention(*inputs))
    assert done.ops == {"q_norm_rope": 2}
