"""The compiled kernels at the sizes of the real models: accuracy, graphs, streams, offsets past 2**31."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gemma4_compile import ops
from gemma4_compile.ops import OPS
from gemma4_compile.ops.examples import SMALL, Sizes, example
from gemma4_compile.ops.plans import HopperProductsPlan, HopperTilesPlan
from tests.ops.accuracy import assert_as_accurate
from tests.ops.exact import exact
from tests.ops.kernel_cases import CASES, check_experts, check_op, check_products, outputs

E2B = Sizes(hidden=1536, q_heads=8, kv_heads=1, head_dim=256, intermediate=6144, layers=35)
E4B = Sizes(hidden=2560, q_heads=8, kv_heads=2, head_dim=512, intermediate=10240, layers=42)
MOE = Sizes(hidden=2816, q_heads=16, kv_heads=8, head_dim=256, intermediate=2112, expert_intermediate=704)
DENSE = Sizes(hidden=5376, q_heads=32, kv_heads=4, head_dim=512, intermediate=21504, shared_kv=True)
MODELS = {"small": SMALL, "E2B": E2B, "E4B": E4B, "26B-A4B": MOE, "31B": DENSE}
# Token counts on both sides of every boundary in plans.py.
TOKENS = (1, 2, 5, 13, 24, 40, 90, 300, 1100)


def packet(name: str):
    return getattr(torch.ops.gemma4, name).default


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", OPS)
def test_as_accurate_as_eager_bf16(name: str, model: str):
    for tokens in TOKENS:
        check_op(name, example(name, MODELS[model], tokens, torch.bfloat16, "cuda", batch=2 if tokens == 5 else 1))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("name", OPS)
def test_as_accurate_as_eager_other_dtypes(name: str, dtype: torch.dtype):
    for sizes in (SMALL, replace(E2B, layers=3)):
        for tokens in (1, 6, 30, 70):
            check_op(name, example(name, sizes, tokens, dtype, "cuda"))


# Sums and rotations round where eager rounds. Matrix products add in another order than cuBLAS, and one rounding of a
# square root or an exponential may differ: the share of bf16 outputs that may differ by a unit in the last place.
NORMED = ("norm_gate_up", "norm_linear", "norm_linear_pair", "norm_linear_triple", "norm_ple")
PRODUCTS = ("linear", "linear_pair", "linear_triple", "gate_up", "experts", "ple_tail", "ple_tail_norm", *NORMED)
DIFFERENT = dict.fromkeys(PRODUCTS, 0.02) | {"experts": 0.06}  # eight rounded products in each sum


@pytest.mark.parametrize("name", [name for name in OPS if name != "route"])
def test_bits_of_eager_in_bf16(name: str):
    args = example(name, E2B, 64 if name not in PRODUCTS else 8, torch.bfloat16, "cuda")
    for actual, wanted in zip(outputs(OPS[name].launch(*args)), outputs(OPS[name].reference(*args)), strict=True):
        assert (actual != wanted).double().mean().item() <= DIFFERENT.get(name, 5e-4)


@pytest.mark.parametrize("sizes", (E2B, E4B), ids=("E2B", "E4B"))
@pytest.mark.parametrize("name", NORMED)
def test_norms_inside_products_are_those_of_two_kernels(name: str, sizes: Sizes):
    """By one kernel for a row or two, by two for more: no value but a rounding of a sum may differ."""
    for tokens in (1, 2, 3, 4, 5):
        args = example(name, replace(sizes, layers=2), tokens, torch.bfloat16, "cuda")
        (hidden, *products), (wanted, *expected) = OPS[name].launch(*args), OPS[name].reference(*args)
        assert (hidden != wanted).double().mean().item() <= 2e-3
        for actual, eager in zip(products, expected, strict=True):
            assert (actual != eager).double().mean().item() <= 0.02


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str):
    torch.library.opcheck(packet(name), example(name, SMALL, 5, torch.bfloat16, "cuda", batch=2))


@pytest.mark.parametrize("case", CASES)
def test_special_case(case: str):
    CASES[case]("cuda")


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs Hopper: its own kernels are NOT tested",
)


@needs_hopper
@pytest.mark.parametrize(("counts", "gated"), (((1536,), False), ((520, 40, 72), False), ((2112, 2112), True)), ids=str)
@pytest.mark.parametrize("splits", (1, 3))
@pytest.mark.parametrize("known", (False, True), ids=("plain", "dependent"))
def test_products_on_hopper(counts: tuple[int, ...], gated: bool, splits: int, known: bool):
    """Rows and columns that fill no block, programs with several tiles, and shares that are shorter than the buffers."""
    plans = [(64, 64, 128), (64, 32, 256), (128, 128, 64)] if gated else [(64, 16, 256), (64, 32, 128), (128, 64, 64)]
    for tokens, of_tile, block in plans:
        for rows in (3, 16, 17, 50) if tokens == 64 else (65, 100, 128):
            for width in (200, 1544):
                plan = HopperProductsPlan(tokens, of_tile, splits, block)
                check_products(plan, rows, counts, width, gated, "cuda", known)


@needs_hopper
@pytest.mark.parametrize("tokens", (1, 19, 900))
def test_experts_on_hopper(tokens: int):
    """Tiles that are filled in part, in both directions, and programs with several tiles and with none."""
    sizes = Sizes(hidden=320, q_heads=1, kv_heads=1, head_dim=16, expert_intermediate=192, experts=6, top_k=3)
    check_experts([HopperTilesPlan()], sizes, tokens, "cuda")


def layers(state: torch.Tensor, ple: tuple, tail: tuple) -> torch.Tensor:
    """A chain in which every kernel reads what the one before it wrote, with other kernels in between."""
    for i in range(40):
        state, normed = ops.ple_tail_norm(state, *ple)
        state, normed = ops.feed_forward_tail_norm(normed, state, *tail)
        if i % 3 == 0:
            state = state + normed
        if i % 5 == 0:
            state = state + torch.zeros_like(state)
        state, _ = ops.post_attention_norm(state, normed, tail[0], tail[2], 1e-6)
    return state


def chain(tokens: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    state, *ple = example("ple_tail_norm", E2B, tokens, torch.bfloat16, "cuda")
    _, _, *tail = example("feed_forward_tail_norm", E2B, tokens, torch.bfloat16, "cuda")
    return (lambda x: layers(x, tuple(ple), tuple(tail))), state


@pytest.mark.parametrize("tokens", (1, 8, 16, 64))
def test_cuda_graph_replays_are_the_eager_result(tokens: int):
    """ple_tail overlaps the prologues of its kernels: a race would show as a replay that differs."""
    run, state = chain(tokens)
    wanted = run(state)
    assert wanted.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run(state)
    for _ in range(50):
        actual.zero_()
        graph.replay()
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("tokens", (1, 2, 5, 80, 300))
def test_experts_in_a_cuda_graph_follow_the_routes(tokens: int):
    """A graph holds the launches, not the routes: other indices in the same buffers, also all tokens on the same experts."""
    args = example("experts", MOE, tokens, torch.bfloat16, "cuda")
    OPS["experts"].launch(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = OPS["experts"].launch(*args)
    places = torch.arange(8, device="cuda").expand(tokens, 8)
    for routes in (torch.rand(tokens, 128, device="cuda").argsort(-1)[:, :8], places + 120, places):
        args[1].copy_(routes)
        actual.zero_()
        graph.replay()
        assert torch.equal(actual, OPS["experts"].launch(*args))
        assert_as_accurate(actual, OPS["experts"].reference(*args), exact("experts", args)[0])


def test_two_streams_at_once():
    """No op keeps state between calls: concurrent calls do not meet."""
    chains = [chain(4), chain(7)]
    wanted = [run(state) for run, state in chains]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for (run, state), stream in zip(chains, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(state))
        torch.cuda.synchronize()
        assert all(torch.equal(r, w) for r, w in zip(results, wanted, strict=True))


def test_inside_torch_compile_with_a_dynamic_token_count():
    def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        hidden, normed = ops.post_attention_norm(x * 2, residual, weight, weight, 1e-6)
        return hidden + normed

    compiled = torch.compile(block, fullgraph=True)
    for tokens in (3, 40, 700):
        x, residual, weight, *_ = example("post_attention_norm", E2B, tokens, torch.bfloat16, "cuda")
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(residual, 1)
        torch.testing.assert_close(compiled(x, residual, weight), block(x, residual, weight))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: NOT tested off the current device")
@pytest.mark.parametrize("name", OPS)
def test_tensors_off_the_current_device(name: str):
    args = example(name, SMALL, 5, torch.bfloat16, "cuda:1")
    for actual, wanted in zip(outputs(packet(name)(*args)), outputs(OPS[name].reference(*args)), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_offsets_past_two_to_the_31():
    x = torch.empty(2**31 // 5376 + 70, 5376, dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.ones(5376, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(ops.rms_norm(x, weight, 1e-6)[-64:], ops.rms_norm(x[-64:], weight, 1e-6))


def test_table_past_two_to_the_31():
    ids, table, *rest = example("ple_inputs", replace(E2B, vocabulary=262144), 3, torch.bfloat16, "cuda")
    ids.copy_(torch.tensor([[262143, 262000, 5]]))
    wanted = OPS["ple_inputs"].reference(ids, table, *rest)
    assert torch.equal(ops.ple_inputs(ids, table, *rest), wanted)
