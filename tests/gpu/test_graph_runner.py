"""Tokens with CUDA graphs are the tokens without, at every bucket's edge; both demo checkpoints."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from gemma4_compile import demo_checkpoint, optimize
from gemma4_compile.demo import DEMO_NAMES, held_out_prompts
from gemma4_compile.graphs.buckets import Buckets
from gemma4_compile.graphs.checks import CaptureRefused
from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.graphs.recorder import CudaRecorder
from gemma4_compile.hf.loading import load
from gemma4_compile.packed.inputs import PlainKV, Request
from gemma4_compile.runtime.worker.model import PackedModel

BUCKETS = Buckets(decode=(1, 2, 4, 8, 16), tokens=(16, 32, 64, 128, 256), rows=(4, 16))
REQUESTS, CAPACITY, STEPS = 17, 320, 6


class Served:
    """One demo checkpoint: a program, its memory twice, and graphs over one of them."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        model, tokenizer = load(demo_checkpoint(name) / "target", "cuda", dtype)
        if name == "moe":
            model.set_experts_implementation("grouped_mm" if dtype == torch.bfloat16 else "batched_mm")
        self.packed = PackedModel(optimize(model.requires_grad_(False)))
        self.prompts = held_out_prompts(tokenizer, 40, 16, 200)
        self.plain_kv, self.graph_kv = (
            PlainKV(self.packed.geometry, REQUESTS, CAPACITY, dtype, "cuda") for _ in range(2)
        )  # fmt: skip
        inputs = self.graph_kv.inputs([Request([2])])
        self.graphs = GraphRunner(self.packed.program, inputs, REQUESTS, BUCKETS)

    def prompt_of(self, lengths: list[int]) -> list[list[int]]:
        """Held-out text cut to these lengths."""
        text = [token for prompt in self.prompts for token in prompt]
        return [text[37 * i : 37 * i + length] for i, length in enumerate(lengths)]

    def greedy(self, prompts: list[list[int]], graphs: bool) -> tuple[list[list[int]], list[torch.Tensor]]:
        """STEPS greedy tokens of each prompt, all in one batch, and each step's logits."""
        kv, step = (self.graph_kv, self.graphs) if graphs else (self.plain_kv, self.packed)
        requests = [Request(prompt) for prompt in prompts]
        texts: list[list[int]] = [[] for _ in prompts]
        seen: list[torch.Tensor] = []
        for _ in range(STEPS):
            seen.append(step(kv.inputs(requests))[0].float().clone())
            tokens = seen[-1].argmax(-1).tolist()
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
            requests = [Request([t], r.seen + len(r.tokens)) for t, r in zip(tokens, requests, strict=True)]
        return texts, seen


_SERVED: dict[Any, Served] = {}


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Served:
    name, dtype = request.param
    torch.set_float32_matmul_precision("highest")
    if request.param not in _SERVED:
        _SERVED[request.param] = Served(name, dtype)
    return _SERVED[request.param]


both = pytest.mark.parametrize(
    "served", [(n, d) for n in DEMO_NAMES for d in (torch.float32, torch.bfloat16)], indirect=True, ids=str
)


@both
def test_same_tokens_at_every_edge(served: Served):
    """Prefills of bucket - 1, bucket and bucket + 1 tokens in one, two and five requests; decode batches likewise."""
    parted = 0
    for total in sorted({b + d for b in BUCKETS.tokens for d in (-1, 0, 1)}):
        for count in (1, 2, 5):
            lengths = [total // count + (i < total % count) for i in range(count)]
            parted += compare(served, lengths)
    for count in sorted({b + d for b in BUCKETS.decode for d in (-1, 0, 1)} - {0}):
        parted += compare(served, [5 + i % 3 for i in range(count)])
    assert served.graphs.refused == {}
    assert served.graphs.replays > 100
    print(f"texts that part at a tie: {parted}")


def compare(served: Served, lengths: list[int]) -> int:
    """Equal texts in fp32. In bf16 a padded batch may take another GEMM, which decides ties: there, as many as part."""
    prompts = served.prompt_of(lengths)
    plain, logits = served.greedy(prompts, graphs=False)
    graphed, _ = served.greedy(prompts, graphs=True)
    if served.packed.model.dtype == torch.float32:
        assert graphed == plain, lengths
        return 0
    parted = 0
    for row, (mine, other) in enumerate(zip(graphed, plain, strict=True)):
        step = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), None)
        if step is None:
            continue
        parted += 1
        margin = (logits[step][row].max() - logits[step][row][mine[step]]).item()
        assert margin <= 0.25, f"{lengths}: row {row} parts at step {step}, {margin} below the best"
    return parted


@pytest.mark.parametrize("served", [("e", torch.float32), ("moe", torch.float32)], indirect=True, ids=str)
def test_padding_writes_nothing(served: Served):
    """Rows that no request owns stay as they were, whatever ran."""
    for tensor in served.graph_kv.tensors.values():
        tensor[REQUESTS - 1].fill_(7.0)
    served.greedy(served.prompt_of([9, 23, 40]), graphs=True)
    for tensor in served.graph_kv.tensors.values():
        assert (tensor[REQUESTS - 1] == 7).all()
        tensor[REQUESTS - 1].zero_()


@pytest.mark.parametrize("served", [("e", torch.float32)], indirect=True, ids=str)
def test_what_was_captured_last_does_not_overwrite_what_came_first(served: Served):
    """All buckets share one pool: replay them again, in another order."""
    prompts = [served.prompt_of(lengths) for lengths in ([15], [250], [33, 60], [20] * 5, [100], [15], [8] * 16)]
    first = [served.greedy(p, graphs=True)[0] for p in prompts]
    assert [served.greedy(p, graphs=True)[0] for p in reversed(prompts)] == first[::-1]


@pytest.mark.parametrize("served", [("e", torch.float32)], indirect=True, ids=str)
def test_another_memory_is_refused(served: Served):
    with pytest.raises(CaptureRefused, match="make a new GraphRunner"):
        served.graphs(served.plain_kv.inputs([Request([5, 6])]))


@pytest.mark.parametrize("served", [("e", torch.float32)], indirect=True, ids=str)
def test_inputs_on_the_host_are_refused(served: Served):
    inputs = served.graph_kv.inputs([Request([5, 6])])
    with pytest.raises(CaptureRefused, match="positions on cpu"):
        GraphRunner(served.packed.program, inputs | {"positions": inputs["positions"].cpu()}, REQUESTS)


def test_a_capture_outlives_garbage() -> None:
    """Collected amid it, a dead graph would be destroyed there, which CUDA does not permit."""
    recorder, x = CudaRecorder(torch.device("cuda", 0)), torch.ones(8, device="cuda")
    cycle: list[Any] = list(recorder.record(lambda: [x + 1]))
    cycle.append(cycle)
    dead = weakref.ref(cycle[0].__self__)
    del cycle
    usual = gc.get_threshold()

    def work() -> list[torch.Tensor]:
        gc.set_threshold(1)
        kept: list[Any] = [[] for _ in range(1000)]
        assert dead() is not None, f"collected behind {len(kept)} lists"
        return [x * 2]

    try:
        replay, (result,) = recorder.record(work)
    finally:
        gc.set_threshold(*usual)
    replay()
    assert result.tolist() == [2.0] * 8


def test_a_capture_outlives_another_thread() -> None:
    recorder, x = CudaRecorder(torch.device("cuda", 0)), torch.ones(8, device="cuda")
    event = torch.cuda.Event()
    event.record()
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as other:

        def work() -> list[torch.Tensor]:
            assert other.submit(event.query).result()
            return [x * 3]

        replay, (result,) = recorder.record(work)
    replay()
    assert result.tolist() == [3.0] * 8


def test_workspaces_that_others_clear_stay_ours() -> None:
    """Inductor's CUDA graph trees clear cuBLAS' workspaces: what is allocated from then on lies nowhere in a replay's way."""
    recorder, x = CudaRecorder(torch.device("cuda", 0)), torch.randn(64, 16384, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, 16384, device="cuda", dtype=torch.bfloat16) for n in (256, 1536)]  # cuBLAS divides K

    def products() -> list[torch.Tensor]:
        return [torch.nn.functional.linear(x, weight) for weight in weights]

    replays = []
    for _ in range(2):  # also what is captured behind a clear
        recorder.warm_up(products)
        replays.append(recorder.record(products))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.stream(recorder.stream):
        others = [torch.full((2**size,), 7, device="cuda", dtype=torch.uint8) for size in range(9, 27) for _ in range(8)]
    torch.cuda.synchronize()
    expected = products()
    for replay, results in replays:
        replay()
        assert all(map(torch.equal, results, expected))
    assert all((other == 7).all() for other in others)


def test_recorders_come_and_go() -> None:
    """More than torch has streams: theirs are used again."""
    x = torch.randn(64, 64, device="cuda")
    for _ in range(40):
        recorder = CudaRecorder(torch.device("cuda", 0))
        recorder.warm_up(lambda: x @ x)
        replay, (result,) = recorder.record(lambda: [x @ x])
        replay()
        assert torch.equal(result, x @ x)
        recorder.close()
        torch._C._cuda_clearCublasWorkspaces()
