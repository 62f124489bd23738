"""The compiled attention kernels at the sizes of the real models: accuracy, CUDA graphs, compilations, offsets past 2**31."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma4_compile import ops
from gemma4_compile.ops.attention import attention_into
from gemma4_compile.ops.attention_hopper import HopperPlan
from gemma4_compile.ops.fusions.attention_qkv import attention_qkv_into
from scripts import bench_flashinfer
from scripts.bench_attention import LAYERS
from tests.ops.attention_cases import Request, Step, check_cache, check_same, check_steps, raw, step

HEADS = {  # heads, KV heads, head size
    "sliding E2B": (8, 1, 256),
    "full E2B": (8, 1, 512),
    "sliding 26B": (16, 8, 256),
    "full 26B": (16, 2, 512),
}
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs Hopper: its attention kernel is NOT tested",
)
CONTEXTS = (4000, 1, 15, 16, 700, 511, 512, 513, 2047, 90, 1300, 33, 3999, 64, 256, 1000)
BATCHES = {
    "decode 1": [Request(4000, 1)],
    "decode 7": [Request(past, 1) for past in CONTEXTS[:7]],
    "decode 32": [Request(past, 1) for past in CONTEXTS + CONTEXTS[::-1]],
    "verify": [Request(past, 5) for past in CONTEXTS[:9]],
    "prefill": [Request(0, 700), Request(100, 1300), Request(0, 3000)],
    "short prefill": [Request(3000, 100), Request(0, 30)],
    "mixed": [Request(4000, 1), Request(0, 900), Request(0, 0), Request(513, 1), Request(2000, 450), Request(7, 1)],
    "truncated": [Request(0, 3000, (2999,)), Request(100, 800, (5, 300, 798, 799)), Request(50, 1)],
}
SMALL_BATCHES = {
    "decode": [Request(past, 1) for past in (1000, 3, 600)],
    "prefill": [Request(0, 150), Request(500, 70)],
}


def cuda_step(heads: str, requests: list[Request], **options) -> Step:
    q_heads, kv_heads, dim = HEADS[heads]
    return step(requests, heads=q_heads, kv_heads=kv_heads, dim=dim, device="cuda", **options)


@pytest.mark.parametrize("window", (0, 512))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", BATCHES)
def test_as_accurate_as_eager_bf16(batch: str, heads: str, window: int):
    for page, padding in ((16, 3), (64, 1), (None, 0)):
        made = cuda_step(heads, BATCHES[batch], page=page, window=window, dtype=torch.bfloat16, padding=padding)
        check_steps([(made, None)])


@needs_hopper
@pytest.mark.parametrize("splits", (1, 2, 16))
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), ((8, 1, 512), (16, 8, 256), (6, 2, 512), (4, 4, 256)))
@pytest.mark.parametrize("batch", BATCHES)
def test_hopper_as_accurate_as_eager(batch: str, heads: int, kv_heads: int, dim: int, splits: int):
    """Any number of rows and query heads, pages whose unwritten rows are NaN, and shares of the keys that have none."""
    for page, padding, window in ((64, 3, 0), (None, 0, 0), (128, 1, 512)):
        made = step(
            BATCHES[batch], heads=heads, kv_heads=kv_heads, dim=dim, device="cuda", page=page, padding=padding, window=window,
            dtype=torch.bfloat16,
        )  # fmt: skip
        check_steps([(made, HopperPlan(splits))])


@needs_hopper
def test_hopper_reads_heads_before_rows():
    """As Hugging Face's caches lie: [requests, heads, length, head size]."""
    made = cuda_step("full 26B", BATCHES["prefill"], page=None, dtype=torch.bfloat16)
    args = list(made.args)
    for which in (3, 4):
        args[which] = args[which].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.attention(*args), ops.attention(*made.fresh()))


@pytest.mark.parametrize("window", (0, 512))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", ("decode 7", "decode 32", "short prefill", "truncated"))
def test_hidden_keys_bf16(batch: str, heads: str, window: int):
    check_steps([(cuda_step(heads, BATCHES[batch], page=64, window=window, dtype=torch.bfloat16, masked=True), None)])


@pytest.mark.parametrize("batch", bench_flashinfer.BATCHES)
@pytest.mark.parametrize("layer", ("E2B sliding", "E2B full", "26B-A4B sliding", "26B-A4B full"))
def test_flashinfer_computes_the_same(layer: str, batch: str):
    pytest.importorskip("flashinfer", reason="FlashInfer is not installed: NOT compared with it")
    found = bench_flashinfer.compare(bench_flashinfer.step_of(*bench_flashinfer.BATCHES[batch], *LAYERS[layer]))
    assert found["difference"] <= 5e-3  # both in bf16, which has 2^-9


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", SMALL_BATCHES)
def test_as_accurate_as_eager_other_dtypes(batch: str, heads: str, dtype: torch.dtype):
    for window in (0, 512):
        made = cuda_step(heads, SMALL_BATCHES[batch], page=64, window=window, dtype=dtype, padding=1)
        # fp32 sums products one after the other in a lane, where cuBLAS has trees of them.
        check_steps([(made, None)], factor=4.0 if dtype == torch.float32 else 1.5)


@pytest.mark.parametrize("heads", HEADS)
def test_keys_of_another_layer(heads: str):
    for batch in ("decode 7", "prefill", "truncated"):
        made = cuda_step(heads, BATCHES[batch], dtype=torch.bfloat16, writes=False)
        check_steps([(made, None)])


def test_fp8_cache():
    for batch in ("decode 7", "prefill"):
        made = cuda_step(
            "sliding E2B", BATCHES[batch], dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, writes=False, unwritten=0.0
        )
        check_steps([(made, None)])


def test_opcheck():
    made = cuda_step("sliding 26B", [Request(20, 3), Request(0, 2)], window=5, dtype=torch.bfloat16, padding=2, unwritten=0.0)
    torch.library.opcheck(torch.ops.gemma4.attention.default, made.fresh())


# Pairs of batches of equal shapes: as many requests, pages, and rows with their padding.
PAIRS = {
    "few rows": (
        ([Request(100, 1), Request(40, 4), Request(0, 3), Request(900, 1)], 3),
        ([Request(900, 2), Request(0, 1), Request(39, 3), Request(100, 1)], 5),
    ),
    "many rows": (
        ([Request(100, 1), Request(0, 300), Request(0, 500), Request(160, 40)], 9),
        ([Request(0, 101), Request(200, 100), Request(100, 400), Request(0, 200)], 49),
    ),
}


@pytest.mark.parametrize("page", (16, 64))
@pytest.mark.parametrize("window", (0, 512))
@pytest.mark.parametrize("heads", ("full E2B", "sliding 26B"))
@pytest.mark.parametrize("pair", PAIRS)
def test_cuda_graph_serves_other_contents_of_the_same_shapes(pair: str, heads: str, window: int, page: int):
    steps = [
        cuda_step(heads, requests, window=window, page=page, dtype=torch.bfloat16, padding=padding)
        for requests, padding in PAIRS[pair]
    ]
    wanted = [ops.attention(*made.fresh()) for made in steps]
    static: tuple[Any, ...] = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in steps[0].args)
    out = torch.empty_like(wanted[0])
    attention_into(out, *static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention_into(out, *static)
    for turn in (1, 0, 1):
        for buffer, contents in zip(static[:9], steps[turn].args[:9], strict=True):
            buffer.copy_(contents)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, wanted[turn])
        check_cache(steps[turn], static)


def test_one_compilation_for_all_token_counts(monkeypatch: pytest.MonkeyPatch):
    import triton

    def run(requests: list[Request], padding: int) -> None:
        ops.attention(*cuda_step("sliding E2B", requests, dtype=torch.bfloat16, padding=padding, page=64).fresh())

    run([Request(0, 1000)], 0)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["repr"]))
    for requests, padding in (([Request(5, 513)], 1), ([Request(0, 640), Request(70, 2000)], 0), ([Request(0, 2048)] * 16, 16)):
        run(requests, padding)
    assert not compiled


def test_pages_past_two_to_the_31():
    requests = [Request(40, 3), Request(0, 70)]
    made = cuda_step("full E2B", requests, dtype=torch.bfloat16, padding=1)
    wanted = ops.attention(*made.fresh())
    args = list(made.fresh())
    pages, page, *_ = args[3].shape
    count = 2**31 // args[3].stride(0) + 2 * pages
    first = count - pages
    for i in (3, 4):
        large = args[i].new_empty((count, *args[i].shape[1:]))
        large[first:] = args[i]
        args[i] = large
    args[5] = torch.where(args[5] < 0, args[5], args[5] + first * page)
    args[6] = args[6] + first
    assert torch.equal(ops.attention(*args), wanted)
    check_cache(made, (*args[:3], args[3][first:], args[4][first:]))


# Rows that are all new and all ask, as attention_qkv has them: negative slots are those of the padding.
NEW = ("decode 1", "decode 7", "decode 32", "verify", "prefill", "mixed")


def check_attention_qkv(made: Step, v_is_k: bool) -> None:
    check_same(raw(made, v_is_k), ops.attention_qkv, ops.qkv_norm_rope, ops.attention)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", NEW)
def test_attention_qkv_equals_the_two_ops(batch: str, heads: str):
    """The result and the pages, to the bit."""
    for page, padding, v_is_k in ((64, 3, False), (None, 0, True)):
        made = cuda_step(heads, BATCHES[batch], page=page, window=512, dtype=torch.bfloat16, padding=padding, unwritten=0.0)
        check_attention_qkv(made, v_is_k)


@pytest.mark.parametrize("cache_dtype", (torch.float8_e4m3fn, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_qkv_into_pages_of_another_dtype(heads: str, cache_dtype: torch.dtype):
    for dtype in (torch.bfloat16, torch.float16):
        made = cuda_step(heads, BATCHES["mixed"], page=64, dtype=dtype, cache_dtype=cache_dtype, padding=5, unwritten=0.0)
        check_attention_qkv(made, v_is_k=False)


def test_attention_qkv_takes_parts_of_one_projection():
    q, k, v, *rest = raw(cuda_step("sliding 26B", BATCHES["mixed"], page=64, dtype=torch.bfloat16, unwritten=0.0))
    parts = torch.cat((q, k, v), 2).split((q.shape[2], k.shape[2], v.shape[2]), 2)
    check_same((*parts, *rest), ops.attention_qkv, ops.qkv_norm_rope, ops.attention)


def test_attention_qkv_opcheck():
    made = cuda_step("sliding 26B", [Request(20, 3), Request(0, 2)], window=5, dtype=torch.bfloat16, padding=2, unwritten=0.0)
    torch.library.opcheck(torch.ops.gemma4.attention_qkv.default, raw(made))


@pytest.mark.parametrize("heads", ("full E2B", "sliding 26B"))
@pytest.mark.parametrize("pair", PAIRS)
def test_a_cuda_graph_of_attention_qkv_serves_other_contents(pair: str, heads: str):
    steps = [
        raw(cuda_step(heads, requests, window=512, dtype=torch.bfloat16, padding=padding, unwritten=0.0))
        for requests, padding in PAIRS[pair]
    ]
    static: tuple[Any, ...] = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in steps[0])
    out = torch.empty_like(static[0])
    attention_qkv_into(out, *static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention_qkv_into(out, *static)

    def replayed(*arguments: Any) -> torch.Tensor:
        for buffer, contents in zip(static, arguments, strict=True):
            if isinstance(buffer, torch.Tensor):
                buffer.copy_(contents)
        out.fill_(torch.nan)
        graph.replay()
        for given, buffer in zip(arguments[8:10], static[8:10], strict=True):
            given.copy_(buffer)
        return out

    for turn in (1, 0, 1):
        check_same(steps[turn], replayed, ops.qkv_norm_rope, ops.attention)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: NOT tested off the current device")
def test_tensors_off_the_current_device():
    made = step([Request(40, 3), Request(0, 70)], dim=64, device="cuda:1", dtype=torch.bfloat16)
    out = torch.empty_like(made.args[0])
    attention_into(out, *made.fresh())
    assert torch.equal(out, ops.attention(*made.fresh()))
    check_steps([(made, None)])
