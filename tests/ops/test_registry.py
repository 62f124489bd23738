"""Properties that every registered op must have; a new op is covered by being registered."""

from __future__ import annotations

import pytest
import torch

from gemma4_compile.ops import OPS, library
from gemma4_compile.ops.examples import SMALL, example
from tests.ops.accuracy import assert_as_accurate
from tests.ops.exact import EXACT, exact

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def packet(name: str):
    return getattr(torch.ops.gemma4, name).default


def outputs(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


# They write pages, draw, or search: example arguments of any size would not do, and each has a test file.
WITHOUT_EXAMPLE = {
    "attention", "attention_qkv", "sample", "ordered_argmax", "ordered_scores", "local_highest", "local_draw", "drawn_token",
    "block_attention", "begin_search", "digit_histogram", "next_digit", "leave_experts",
}  # fmt: skip


def test_every_op_has_an_example_and_an_exact_form():
    assert set(OPS) == set(EXACT)
    assert set(library._DEFINED) - set(OPS) <= WITHOUT_EXAMPLE


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(name: str, dtype: torch.dtype):
    """Schema, no mutation or aliasing, fake against real, and tracing with symbolic shapes."""
    torch.library.opcheck(packet(name), example(name, SMALL, 5, dtype, batch=2))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_against_fp64(name: str, dtype: torch.dtype):
    """Guards the fp64 forms themselves: eager must lie within a few roundings of them."""
    torch.manual_seed(0)
    args = example(name, SMALL, 5, dtype, batch=2)
    for actual, wanted in zip(outputs(OPS[name].reference(*args)), exact(name, args), strict=True):
        scale = max(1.0, wanted.double().abs().max().item())
        assert (actual.double() - wanted.double()).abs().max().item() <= 8 * torch.finfo(dtype).eps * scale
        if actual.is_floating_point():
            assert_as_accurate(actual, actual, wanted.double())


@pytest.mark.parametrize("name", OPS)
def test_no_tokens(name: str):
    results = outputs(packet(name)(*example(name, SMALL, 0)))
    assert all(result.numel() == 0 for result in results)
    with torch.device("meta"):
        fakes = outputs(packet(name)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in example(name, SMALL, 0))))
    assert [f.shape for f in fakes] == [r.shape for r in results]


@pytest.mark.parametrize("name", OPS)
def test_outputs_are_contiguous_and_new(name: str):
    args = example(name, SMALL, 4, torch.bfloat16, batch=2)
    inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
    results = outputs(packet(name)(*args))
    storages = [r.untyped_storage().data_ptr() for r in results]
    assert all(r.is_contiguous() for r in results)
    assert len({*storages, *inputs}) == len(storages) + len(inputs)


@pytest.mark.parametrize(
    ("name", "position", "message"),
    [
        ("rms_norm", 1, "rms_norm: weight must be .H. .*, got .23., wanted .24.; pass"),
        ("rope", 1, "rope: cos must be"),
        ("geglu", 1, "geglu: up must have gate's shape"),
        ("gate_up", 2, "gate_up: each weight must be .N, K."),
        ("linear", 1, "linear: each weight must be .N, K."),
        ("linear_triple", 3, "linear_triple: each weight must be .N, K."),
        ("route", 1, "route: per_expert_scale must be"),
        ("experts", 1, "experts: weights must have the shape of indices"),
        ("experts", 3, "experts: gate_up must be .E, 2I, H."),
        ("experts", 4, "experts: down must be .E, H, I. for gate_up"),
        ("post_attention_norm", 3, "post_attention_norm: each weight must be"),
        ("post_attention_norms", 4, "post_attention_norms: each weight must be"),
        ("feed_forward_tail", 1, "feed_forward_tail: residual must have"),
        ("moe_feed_forward_tail", 1, "moe_feed_forward_tail: experts must be"),
        ("ple_tail", 2, "ple_tail: gate_weight must be"),
        ("norm_gate_up", 1, "norm_gate_up: residual must have"),
        ("norm_gate_up", 5, "norm_gate_up: each weight must be .N, K."),
        ("norm_linear_pair", 4, "norm_linear_pair: each weight must be .H."),
        ("norm_linear_triple", 7, "norm_linear_triple: each weight must be .N, K."),
        ("norm_ple", 3, "norm_ple: gate_weight must be"),
        ("ple_inputs", 3, "ple_inputs: projection must be"),
        ("ple_combine", 2, "ple_combine: norm_weight must be"),
        ("qkv_norm_rope", 2, "qkv_norm_rope: v must have k's shape"),
        ("q_norm_rope", 1, "q_norm_rope: each weight must be"),
    ],
)
def test_wrong_shape_is_one_clear_line(name: str, position: int, message: str):
    args = list(example(name, SMALL, 4))
    args[position] = args[position][..., :-1]
    fakes = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    for call, given in ((packet(name), args), (OPS[name].launch, args), (packet(name), fakes)):
        with pytest.raises(ValueError, match=message) as raised:
            call(*given)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["rms_norm", "feed_forward_tail_norm", "all_reduce_rms_norm"])
def test_a_reference_is_traced_as_one_graph(name: str) -> None:
    """Its check too: benchmarks compile references as Inductor's own code for the same subgraph."""
    arguments = example(name, SMALL, 3, torch.float32)
    compiled = torch.compile(OPS[name].reference, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), OPS[name].reference(*arguments))
