"""The graph runner without a GPU: buckets, padding, refusals, and the check that no graph keeps what it must not."""

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma4TextConfig

from gemma4_compile.garbage import without_collection
from gemma4_compile.geometry import geometry
from gemma4_compile.graphs.buckets import Buckets
from gemma4_compile.graphs.checks import CaptureRefused
from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
from gemma4_compile.ops.attention import attention_kernels
from gemma4_compile.packed.inputs import STEP_INPUTS, PlainKV, Request
from gemma4_compile.packed.program import Program
from gemma4_compile.packed.row_state import RowState
from gemma4_compile.packed.split import SPLIT_POINTS
from gemma4_compile.packed.step_inputs import StepInputs
from gemma4_compile.runtime.worker.capture import mixed_steps
from tests.runtime.host_recorder import HostRecorder
from tests.runtime.served import memory, packed, tokens_of

BUCKETS = Buckets(decode=(1, 2, 4), tokens=(4, 8, 16), rows=(2, 4))
REQUESTS = 5


def runner(kind: str = "e", recorder: HostRecorder | None = None, buckets: Buckets = BUCKETS) -> tuple[GraphRunner, PlainKV]:
    kv = memory(kind, requests=REQUESTS)
    graphs = GraphRunner(packed(kind).program, kv.inputs([Request([5])]), REQUESTS, buckets, recorder or HostRecorder())
    return graphs, kv


def assert_same(graphs: GraphRunner, kv: PlainKV, other: PlainKV, batch: list[Request], kind: str = "e") -> None:
    """Logits, states and everything in memory."""
    actual, expected = graphs.run(kv.inputs(batch)), packed(kind).run(other.inputs(batch))
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(actual.hidden, expected.hidden, rtol=0, atol=2e-5)
    for name, tensor in kv.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["e", "moe"])
def test_every_edge(kind: str) -> None:
    """Bucket - 1, bucket, bucket + 1 for tokens, wanted rows and decode batches; twice, so that graphs are used again."""
    graphs, kv = runner(kind)
    other = memory(kind, requests=REQUESTS)
    for turn in range(2):
        for total in (3, 4, 5, 7, 8, 9, 15, 16, 17):
            lengths = [total - 2, 2]
            assert_same(graphs, kv, other, [Request(tokens_of(turn + i, n)) for i, n in enumerate(lengths)], kind)
        for wanted in (1, 2, 3, 4, 5):
            assert_same(graphs, kv, other, [Request(tokens_of(turn, 7), rows=range(wanted))], kind)
        for count in (1, 2, 3, 4, 5):
            assert_same(graphs, kv, other, [Request(tokens_of(i, 5)) for i in range(count)], kind)
            assert_same(graphs, kv, other, [Request([7 + i], 5) for i in range(count)], kind)
    assert graphs.refused == {}
    assert isinstance(graphs.recorder, HostRecorder)
    recorded = graphs.recorder.recorded
    assert graphs.replays >= 34
    assert_same(graphs, kv, other, [Request(tokens_of(9, 8))], kind)
    assert graphs.recorder.recorded == recorded, "a bucket is captured once"


def test_tails_are_shared_by_all_token_buckets() -> None:
    """Two pieces behind the boundary for each row bucket, two before it for each token bucket, and one for each pair."""
    graphs, kv = runner()
    for total in (4, 8, 16):
        graphs(kv.inputs([Request(tokens_of(1, total))]))
    assert packed("e").program.boundary == 4 and graphs.recorder.recorded == 2 + 3 * 2 + 3  # type: ignore[attr-defined]


def test_a_verification_step_is_one_graph() -> None:
    """Several tokens of each request, all of them wanted, as MTP asks."""
    graphs, kv = runner()
    other = memory("e", requests=REQUESTS)
    for start in ([Request(tokens_of(1, 6)), Request(tokens_of(2, 3))],):
        assert_same(graphs, kv, other, start)
    recorded = graphs.recorder.recorded  # type: ignore[attr-defined]
    assert_same(graphs, kv, other, [Request([8, 9], 6, rows=[0, 1]), Request([4], 3, rows=[0])])
    assert graphs.recorder.recorded == recorded + 1  # type: ignore[attr-defined]


def test_decode_gives_logits_tokens_and_states() -> None:
    """From the host's arrays, padded to the bucket; what is padding is cut off."""
    kv, other = memory("e", requests=REQUESTS), memory("e", requests=REQUESTS)
    state = RowState.empty(REQUESTS, 0, torch.device("cpu"))
    program = packed("e").program
    graphs = GraphRunner(program, kv.inputs([Request([5])]), REQUESTS, BUCKETS, HostRecorder(), state)
    batch = [Request([7 + i], 5) for i in range(3)]
    for memory_of in (kv, other):
        program(memory_of.inputs([Request(tokens_of(i, 5)) for i in range(3)]))
    arrays = {name: tensor.numpy() for name, tensor in kv.inputs(batch).items() if name in STEP_INPUTS}
    rows = np.arange(3)
    for _ in range(2):
        found = graphs.decode(StepInputs.of_model(arrays, targets=rows))
        expected = program.run(other.inputs(batch))
        assert found is not None and found.tokens is not None
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=0, atol=2e-5)
        assert found.tokens.tolist() == expected.logits[0].argmax(-1).tolist() == state.last[:3].tolist()


def test_no_bucket_is_large_enough() -> None:
    graphs, kv = runner()
    other = memory("e", requests=REQUESTS)
    assert_same(graphs, kv, other, [Request(tokens_of(1, 40))])
    assert_same(graphs, kv, other, [Request(tokens_of(1, 8), rows=range(6))])
    assert graphs.replays == 0


def test_sizes_may_come_in_any_order() -> None:
    """A short step behind a long one: indices that the long one left in the buffers point past the short one's end."""
    graphs, kv = runner()
    other = memory("e", requests=REQUESTS)
    assert_same(graphs, kv, other, [Request(tokens_of(1, 16), rows=[12, 13, 15])])
    assert_same(graphs, kv, other, [Request(tokens_of(2, 4))])
    assert_same(graphs, kv, other, [Request(tokens_of(3, 7), rows=[1, 2, 6])])
    assert graphs.refused == {} and graphs.replays == 3


@pytest.mark.parametrize("buckets", [Buckets(decode=(), tokens=(16,), rows=(64,)), Buckets(decode=(2,), tokens=(), rows=())])
def test_few_buckets(buckets: Buckets) -> None:
    graphs, kv = runner(buckets=buckets)
    other = memory("e", requests=REQUESTS)
    for batch in ([Request(tokens_of(1, 9))], [Request([5], 9)]):
        assert_same(graphs, kv, other, batch)
    assert graphs.replays > 0 and graphs.refused == {}


def test_a_graph_that_stores_no_keys_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first replay must not read what the program stored."""
    point = SPLIT_POINTS["attention_qkv"]
    slots = point.argument("slots")

    def forgetful(out: Tensor, *arguments: Any) -> None:
        point.into(out, *arguments[:slots], torch.full_like(arguments[slots], -1), *arguments[slots + 1 :])

    monkeypatch.setitem(SPLIT_POINTS, "attention_qkv", replace(point, into=forgetful))
    graphs, kv = runner()
    with pytest.warns(UserWarning, match="a replay gave other logits"):
        assert_same(graphs, kv, memory("e", requests=REQUESTS), [Request(tokens_of(1, 7))])


def test_a_head_captured_again_is_compared_again() -> None:
    """Another row bucket captures the head anew: what was right before may not be now."""
    recorder = Souring()
    graphs, kv = runner(recorder=recorder)
    other = memory("e", requests=REQUESTS)
    assert_same(graphs, kv, other, [Request(tokens_of(1, 9), rows=[8])])
    recorder.sour = True
    with pytest.warns(UserWarning, match="a replay gave other logits"):
        assert_same(graphs, kv, other, [Request(tokens_of(2, 9), rows=[1, 2, 8])])
    recorder.sour = False
    assert_same(graphs, kv, other, [Request(tokens_of(3, 9), rows=[8])])


class Souring(HostRecorder):
    """Right until told otherwise."""

    sour = False

    def record(self, function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        replay, kept = super().record(function)
        return (lambda: None) if self.sour else replay, kept


class Soup(HostRecorder):
    """Graphs that keep what a tensor held when they were captured, as one around a host's plan does."""

    def record(self, function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        _, kept = super().record(function)
        return lambda: None, kept


@pytest.mark.parametrize("batch", [[Request([5, 6, 7])], [Request([5]), Request([6])]], ids=["pieces", "full"])
def test_token_soup_is_noticed(batch: list[Request]) -> None:
    """The first replay is compared: a warning, right logits, and no graph for this bucket any more."""
    graphs, kv = runner(recorder=Soup())
    other = memory("e", requests=REQUESTS)
    with pytest.warns(UserWarning, match="without CUDA graphs: a replay gave other logits than the program"):
        assert_same(graphs, kv, other, batch)
    assert len(graphs.refused) == 1 and graphs.replays == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(graphs, kv, other, batch)


class Failing(HostRecorder):
    def record(self, function: Callable[[], Sequence[Tensor]]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_capture_is_a_warning() -> None:
    graphs, kv = runner(recorder=Failing())
    with pytest.warns(UserWarning, match="its capture failed: operation not permitted"):
        assert_same(graphs, kv, memory("e", requests=REQUESTS), [Request([5, 6, 7])])


def test_padding_writes_nothing() -> None:
    """Memory of requests that are not in the batch stays as it was."""
    graphs, kv = runner()
    for tensor in kv.tensors.values():
        tensor.fill_(7.0)
    for batch in ([Request(tokens_of(1, 5))], [Request([5], 5)]):
        graphs(kv.inputs(batch))
        for tensor in kv.tensors.values():
            assert (tensor[1:] == 7).all() and (tensor[0, 6:] == 7).all()


def test_other_memory_is_refused() -> None:
    graphs, _ = runner()
    with pytest.raises(CaptureRefused, match="graphs keep the address of keys and values, .* make a new GraphRunner"):
        graphs(memory("e", requests=REQUESTS).inputs([Request([5])]))


def test_a_wider_table_is_refused_and_the_bucket_lives_on() -> None:
    graphs, kv = runner()
    inputs = kv.inputs([Request([5])])
    with pytest.raises(CaptureRefused, match="a request may have 1 pages here, got a table.full_attention of 2"):
        graphs(inputs | {"table.full_attention": inputs["table.full_attention"].repeat(1, 2)})
    graphs(inputs)
    assert graphs.replays == 1 and graphs.refused == {}


def test_inputs_on_the_host_are_refused() -> None:
    with pytest.raises(CaptureRefused, match="a graph reads its inputs on the GPU, got input_ids on cpu; move it there"):
        GraphRunner(packed("e").program, memory("e").inputs([Request([5])]), REQUESTS)


def test_a_piece_that_works_on_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program: Program = packed("e").program
    object.__setattr__(program.spec.calls[0], "host", "cumsum (aten.cumsum), which is on the CPU")
    try:
        with pytest.raises(CaptureRefused, match="cannot hold cumsum .*, which is on the CPU"):
            runner()
    finally:
        object.__setattr__(program.spec.calls[0], "host", "")


@pytest.mark.parametrize("sizes", [(4, 2), (2, 2), (0, 4)])
def test_bad_buckets(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens must be ascending positive sizes, got"):
        Buckets(tokens=sizes)


@pytest.mark.parametrize("before", [True, False])
def test_collection_is_as_before_behind_a_capture(before: bool) -> None:
    usual = gc.isenabled()
    (gc.enable if before else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="a failure"), without_collection():
            assert not gc.isenabled()
            raise RuntimeError("a failure")
        assert gc.isenabled() is before
    finally:
        (gc.enable if usual else gc.disable)()


@pytest.mark.parametrize("name", ["E2B", "26B-A4B"])
@pytest.mark.parametrize("requests", [1, 7, 100])
def test_every_kernel_of_attention_is_compiled_at_the_start(name: str, requests: int) -> None:
    """With any number of requests in a step of any size; behind YOCO's boundary as many rows ask as are wanted."""
    found = geometry(Gemma4TextConfig(**TEXT_CONFIGS[name]))
    shapes = {(layer.kv_heads, layer.heads // layer.kv_heads, layer.head_dim, layer.shares_kv) for layer in found.layers}

    def kernels(tokens: int, rows: int, requests: int) -> Iterator[Hashable]:
        for kv_heads, group, dim, few in shapes:
            yield from attention_kernels((kv_heads, group, dim, 512), 4096, 2, rows if few else tokens, requests)

    steps = [(tokens, rows, 1) for tokens in (16, 64, 512, 8192) for rows in (4, 16, 64) if rows < tokens]
    mixed = mixed_steps(steps, requests, kernels)
    compiled = {kernel for step in (*steps, *mixed) for kernel in kernels(*step)}
    for tokens, rows, _ in steps:
        for count in range(1, min(tokens - 1, requests) + 1):
            assert compiled.issuperset(kernels(tokens, rows, count)), (tokens, rows, count)
    assert len(mixed) <= 24, "a few steps, not hundreds"
