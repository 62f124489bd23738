"""attention_qkv: the two ops that it is made of, its contract, and its kernels under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gemma4_compile import ops
from gemma4_compile.ops.fusions.attention_qkv import attention_qkv_into
from tests.ops.attention_cases import NEW_MIXES, check_same, raw, step
from tests.ops.interpreted import interpreted, seeded_on_one_thread  # noqa: F401  (a fixture of every test here)

OP = torch.ops.gemma4.attention_qkv.default


@pytest.mark.parametrize("v_is_k", (False, True))
@pytest.mark.parametrize("cache_dtype", (None, torch.float8_e4m3fn), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mix", NEW_MIXES)
def test_equals_the_two_ops(mix: str, dtype: torch.dtype, cache_dtype: torch.dtype | None, v_is_k: bool):
    made = step(NEW_MIXES[mix], kv_heads=2, window=5, dtype=dtype, cache_dtype=cache_dtype, padding=3, unwritten=0.0)
    args = raw(made, v_is_k)
    before = [cache.clone() for cache in args[8:10]]
    check_same(args, ops.attention_qkv, ops.qkv_norm_rope, ops.attention)
    untouched = torch.ones(before[0].shape[0] * before[0].shape[1], dtype=torch.bool)
    untouched[args[10][args[10] >= 0]] = False
    for cache, old in zip(args[8:10], before, strict=True):
        new, old = (c.flatten(0, 1).view(torch.uint8) for c in (cache, old))
        assert torch.equal(new[untouched], old[untouched]) and not torch.equal(new, old)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(dtype: torch.dtype):
    """Schema (keys and values are written, nothing else is), fake against real, tracing with symbolic shapes."""
    torch.library.opcheck(OP, raw(step(NEW_MIXES["mixed"], window=5, dtype=dtype, padding=2, unwritten=0.0)))


WRONG: dict[str, tuple[int, Callable]] = {
    "qkv_norm_rope: x must be .B, T, N, D.": (0, lambda q: q[0]),
    "qkv_norm_rope: k must be .B, T, Hk, D.": (1, lambda k: k[:, :-1]),
    "qkv_norm_rope: v must have k's shape": (2, lambda v: v[:, :, :-1]),
    "qkv_norm_rope: each weight must be .D.": (4, lambda weight: weight[:-1]),
    "qkv_norm_rope: cos must be": (5, lambda cos: cos[:, :-1]),
    "attention: keys must be .P, page, Hk, D.": (8, lambda keys: keys[..., :-1]),
    "attention: values must have the shape of keys": (9, lambda values: values[:-1]),
    "attention: slots must be .T. for k": (10, lambda slots: slots[:-1]),
    "attention: starts must be .R . 1.": (13, lambda starts: starts[:-1]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_shape_is_one_clear_line(message: str):
    args = list(raw(step(NEW_MIXES["mixed"], kv_heads=2)))
    position, wrong = WRONG[message]
    args[position] = wrong(args[position])
    for call in (ops.attention_qkv, ops.attention_qkv.launch):  # what launches on CUDA, before anything is written
        with pytest.raises(ValueError, match=f"^{message}") as raised:
            call(*args)
        assert "\n" not in str(raised.value)


def test_what_the_kernels_cannot_take():
    args = raw(step(NEW_MIXES["decode"]))
    with pytest.raises(ValueError, match="attention: the page size must be a multiple of 16, got 8, wanted 0; "):
        ops.attention_qkv.launch(*args[:8], *(cache.view(-1, 8, 1, 16) for cache in args[8:10]), *args[10:])


def test_into_a_given_tensor():
    args = raw(step(NEW_MIXES["mixed"], window=5, padding=1, unwritten=0.0))

    def into(*args) -> torch.Tensor:
        out = torch.full_like(args[0], torch.nan)
        attention_qkv_into(out, *args)
        return out

    check_same(args, into, ops.qkv_norm_rope, ops.attention)
    with pytest.raises(ValueError, match="attention: out must have q's shape and dtype, got"):
        attention_qkv_into(args[0].double(), *args)


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    return interpreted("tests.ops.interpret_attention_qkv")


CASES = (
    *(f"two launches, {dtype}" for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *(f"pages of {dtype}" for dtype in (torch.float32, torch.float16, torch.float8_e4m3fn)),
    *("layouts", "nothing"),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kernel_under_the_interpreter(case: str, report: dict[str, str]):
    assert report.get(case) == "ok"
