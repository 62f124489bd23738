"""Every kernel passes Triton's frontend for a Hopper GPU, as its launcher calls it. No GPU is needed, and nothing runs.

The interpreter runs kernels as Python, and takes what the compiler does not: a name of two types, for example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the frontend is Triton's own")

import triton.language as tl  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import ASTSource, make_backend  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from gemma4_compile.graphs.step_buffer import StepBuffer  # noqa: E402
from gemma4_compile.ops import OPS, attention_hopper, dependent  # noqa: E402
from gemma4_compile.ops.attention import attention  # noqa: E402
from gemma4_compile.ops.dependent import constants  # noqa: E402
from gemma4_compile.ops.examples import Sizes, example  # noqa: E402
from gemma4_compile.ops.fusions.attention_qkv import attention_qkv  # noqa: E402
from gemma4_compile.ops.fusions.experts import run_plan, sorted_pairs  # noqa: E402
from gemma4_compile.ops.fusions.linear import launch_products  # noqa: E402
from gemma4_compile.ops.plans import HopperProductsPlan, HopperTilesPlan, PleDotPlan, ple_plan  # noqa: E402
from gemma4_compile.ops.sampling.sample import sample  # noqa: E402
from gemma4_compile.packed.inputs import KINDS  # noqa: E402
from gemma4_compile.runtime.speculative.verification import _launch_advance  # noqa: E402
from tests.ops.attention_cases import Request, raw, step  # noqa: E402
from tests.runtime.round_cases import DRAFTS, PAGE, WIDTH, drafting, state, verification  # noqa: E402
from tests.runtime.round_cases import step as drafted_step  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
SIZES = Sizes(hidden=1536, q_heads=8, kv_heads=1, head_dim=256, intermediate=64, layers=2, vocabulary=512)


@triton.jit
def _of_two_types_kernel(x_ptr, COUNT: tl.constexpr):
    for place in tl.static_range(COUNT):
        tl.store(x_ptr + place, 1)
    for start in range(0, COUNT, 2):
        place = start + tl.arange(0, 2)
        tl.store(x_ptr + place, 1)


class Frontend:
    """Takes the launches of kernels; each kind of arguments is compiled to Triton's IR once."""

    def __init__(self) -> None:
        self.backend = make_backend(HOPPER)
        self.seen: set[str] = set()

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        options = {"debug": False, "instrumentation_mode": ""} | options
        bound, specialization, given = bind(*args, **options)
        chosen, signature, constexprs, attributes = kernel._pack_args(self.backend, options, bound, specialization, given)
        key = f"{kernel.fn.__qualname__} {signature} {constexprs} {attributes}"
        if key in self.seen:
            return
        self.seen.add(key)
        source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, attributes)
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        generators = self.backend.get_codegen_implementation(chosen)
        source.make_ir(HOPPER, chosen, generators, self.backend.get_module_map(), context)


@pytest.fixture
def frontend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Frontend]:
    made = Frontend()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: made.run(kernel, *args, **options))
    monkeypatch.setattr(dependent, "supported", lambda: True)
    with torch.no_grad():
        yield made


@pytest.mark.parametrize("name", [name for name in OPS if not name.startswith("all_reduce")])
def test_op(name: str, frontend: Frontend) -> None:
    for tokens in (1, 6, 20):
        args = example(name, SIZES, tokens, torch.bfloat16)
        with constants([a for a in args if isinstance(a, torch.Tensor)]):
            OPS[name].launch(*args)
    assert frontend.seen


@pytest.mark.parametrize(
    ("name", "inside", "apart"),
    [
        ("norm_gate_up", {"_norm_vector_kernel"}, {"_tail_kernel", "_dot_kernel"}),
        ("norm_linear_triple", {"_norm_vector_kernel"}, {"_tail_kernel", "_dot_kernel"}),
        (
            "norm_ple",
            {"_norm_gate_kernel", "_projection_kernel"},
            {"_tail_kernel", "_gate_dot_kernel", "_projection_dot_kernel"},
        ),
    ],
)
def test_norms_are_inside_products_of_few_rows(name: str, inside: set[str], apart: set[str], frontend: Frontend) -> None:
    for tokens, kernels in ((1, inside), (2, inside), (3, apart)):
        frontend.seen.clear()
        OPS[name].launch(*example(name, SIZES, tokens, torch.bfloat16))
        assert {key.split()[0] for key in frontend.seen} == kernels, tokens


@pytest.mark.parametrize(
    ("tokens", "dtype", "hidden", "kernels"),
    [
        (2, torch.bfloat16, 1536, {"_gate_kernel", "_projection_kernel"}),
        (3, torch.bfloat16, 1536, {"_gate_dot_kernel", "_projection_dot_kernel"}),
        (128, torch.float16, 2560, {"_gate_dot_kernel", "_projection_dot_kernel"}),
        (80, torch.bfloat16, 4096, {"_gate_dot_kernel", "_projection_dot_kernel"}),
        (129, torch.bfloat16, 1536, {"_gelu_times_kernel"}),
        (4, torch.bfloat16, 5376, {"_gate_kernel", "_projection_kernel"}),
        (4, torch.float32, 1536, {"_gate_kernel", "_projection_kernel"}),
        (40, torch.float32, 1536, {"_gelu_times_kernel"}),
    ],
)
def test_ple_products(tokens: int, dtype: torch.dtype, hidden: int, kernels: set[str], frontend: Frontend) -> None:
    OPS["ple_tail"].launch(*example("ple_tail", replace(SIZES, hidden=hidden), tokens, dtype))
    assert {key.split()[0] for key in frontend.seen} == kernels | {"_tail_kernel"}


@pytest.mark.parametrize("rows", [3, 32, 33, 64, 65, 128])
@pytest.mark.parametrize("width", [96, 1536, 2560, 4096])
@pytest.mark.parametrize("p", [16, 256, 512])
def test_plans_of_ple_products(rows: int, width: int, p: int) -> None:
    """What their kernels take: whole warps of slices of 32 columns and more, and 8 or 16 tokens."""
    plan = ple_plan(rows, width, p, 2)
    assert isinstance(plan, PleDotPlan)
    assert {plan.gate_tokens, plan.tokens} <= {8, 16}
    assert plan.gate_slices % plan.gate_warps == 0 and plan.gate_slices <= 16
    assert -(-rows // plan.gate_tokens) * -(-p // 16) <= 132 * 4


def test_many_pairs_sorted(frontend: Frontend) -> None:
    sorted_pairs(torch.zeros(600, 8, dtype=torch.int64), 128, 128)
    assert len(frontend.seen) == 2


@pytest.mark.parametrize(("dim", "window"), [(256, 512), (512, 0)])
def test_attention(dim: int, window: int, frontend: Frontend) -> None:
    for requests in ([Request(70, 1)] * 2, [Request(0, 600)]):
        made = step(requests, heads=8, dim=dim, page=64, window=window, dtype=torch.bfloat16, unwritten=0.0)
        attention.launch(*made.fresh())
        attention_qkv.launch(*raw(made, False))
    assert len(frontend.seen) > 4


@pytest.mark.parametrize("requests", [[Request(70, 1)] * 20, [Request(0, 600)]], ids=["shares", "whole"])
def test_attention_on_hopper(requests: list[Request], frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_hopper, "is_hopper", lambda device: True)
    made = step(requests, heads=8, dim=512, page=64, dtype=torch.bfloat16, unwritten=0.0)
    attention.launch(*made.fresh())
    assert any("hopper" in key for key in frontend.seen)


@pytest.mark.parametrize(("matrices", "gated"), [(1, False), (3, False), (2, True)])
def test_products_on_hopper(matrices: int, gated: bool, frontend: Frontend) -> None:
    x, weights = torch.randn(40, 128).bfloat16(), tuple(torch.randn(96, 128).bfloat16() for _ in range(matrices))
    launch_products(x, weights, gated, HopperProductsPlan(64, 128 if gated else 32))
    assert len(frontend.seen) == 1


def test_experts_on_hopper(frontend: Frontend) -> None:
    sizes = replace(SIZES, hidden=128, expert_intermediate=192, experts=6, top_k=3)
    run_plan(HopperTilesPlan(), *example("experts", sizes, 20, torch.bfloat16))
    assert sum("hopper" in key for key in frontend.seen) == 2


def test_sampling(frontend: Frontend) -> None:
    logits, count = torch.randn(3, 512), 3
    whole = torch.zeros(count, dtype=torch.int64)
    shaping = torch.ones(count), whole.int(), torch.ones(count), torch.zeros(count)
    sample.launch(logits, *shaping, whole, whole)
    assert frontend.seen


@pytest.mark.parametrize("counts", [False, True])
def test_rounds(counts: bool, frontend: Frontend) -> None:
    tokens, hidden, given = verification()
    _launch_advance(state(DRAFTS), tokens, hidden, given, torch.tensor([3, 0, 1]), drafting(), counts)
    tables = {kind: torch.zeros(16, WIDTH, dtype=torch.int32) for kind in KINDS}
    buffer = StepBuffer(16, tables, state(DRAFTS), PAGE)
    buffer.send(drafted_step(DRAFTS))
    buffer._launch_unpack()
    assert len(frontend.seen) > 1


def test_what_the_compiler_refuses_is_found(frontend: Frontend) -> None:
    with pytest.raises(triton.CompilationError, match="changed type"):
        _of_two_types_kernel[(1,)](torch.zeros(4), 4)
