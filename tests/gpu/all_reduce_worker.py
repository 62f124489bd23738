"""What the all-reduces of several GPUs are tested with: a line `case: ok`, `skipped` or what went wrong, from rank 0.

    torchrun --nproc-per-node 2 -m tests.gpu.all_reduce_worker [rounds]

Started by test_all_reduce.py, or by hand. NVLink multicast stays off."""

from __future__ import annotations

import os

os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # before torch reads it: some hosts must not set multicast up
os.environ["NCCL_NVLS_ENABLE"] = "0"

import importlib.util  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from datetime import timedelta  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from gemma4_compile import OptimizeConfig, demo_checkpoint, optimize, report  # noqa: E402
from gemma4_compile.ops import OPS, Vocabulary, all_reduce_norm  # noqa: E402
from gemma4_compile.ops.distributed.all_reduce_norm import FORMS, by_nccl, by_one_shot, slot_bytes, sum_over_ranks  # noqa: E402
from gemma4_compile.ops.distributed.symmetric import forget, workspace  # noqa: E402
from gemma4_compile.ops.examples import SMALL  # noqa: E402
from gemma4_compile.ops.sampling.local_sample import local_highest, token_of  # noqa: E402
from gemma4_compile.ops.sampling.logits import logprobs_of  # noqa: E402
from scripts import _flashinfer_all_reduce  # noqa: E402
from tests.gpu.times import microseconds  # noqa: E402
from tests.ops.accuracy import assert_as_accurate  # noqa: E402
from tests.ops.all_reduce_cases import arguments  # noqa: E402
from tests.ops.exact import exact  # noqa: E402
from tests.ops.kernel_cases import outputs  # noqa: E402
from tests.ops.sample_cases import MIXES, awkward, parameters  # noqa: E402

WIDTHS = (2816, 5376)
TOKENS = (1, 2, 8, 33, 64)
VOCABULARY = 262144
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Result = tuple[Tensor, ...]
Way = Callable[[str, list[Any]], Result]


class Skipped(Exception):
    """Why a case does not run here."""


def group() -> str:
    everyone: Any = dist.group.WORLD
    return everyone.group_name


def given(op: str, width: int, tokens: int, dtype: torch.dtype, turn: int) -> list[Any]:
    return arguments(op, replace(SMALL, hidden=width), tokens, dtype, "cuda", turn, dist.get_rank())


def gathered(x: Tensor) -> list[Tensor]:
    """A tensor of each rank, as bytes: NaNs are equal too."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def sum_by_nccl(x: Tensor) -> Tensor:
    """As eager transformers adds up: with more than two ranks, NCCL rounds on the way."""
    total = x.clone()
    dist.all_reduce(total)
    return total


def assert_right(op: str, mine: list[Any], found: Result, what: str, rounds_once: bool = True) -> None:
    """The same bits on all ranks, and as near to fp64 as the op alone over a sum in fp32, or over NCCL's."""
    sums = FORMS[op].sums
    parts = [torch.stack(gathered(t)) for t in mine[:sums]]
    total = partial(sum_over_ranks, group=group()) if rounds_once else sum_by_nccl
    eager = OPS[op].reference(*map(total, mine[:sums]), *mine[sums:])
    wanted = exact(op, (*(p.double().sum(0) for p in parts), *mine[sums:]))
    for actual, reference, best in zip(found, outputs(eager), wanted, strict=True):
        for rank, other in enumerate(gathered(actual.view(torch.uint8) if actual.dtype != torch.uint8 else actual)):
            assert torch.equal(actual.view(torch.uint8), other), f"{what}: rank {rank} has other bits"
        assert_as_accurate(actual, reference, best)


def one_shot(op: str, mine: list[Any]) -> Result:
    found = by_one_shot(op, *mine, group())
    assert found is not None, "no memory that all ranks read: see the warning above"
    return outputs(found)


def nccl(op: str, mine: list[Any]) -> Result:
    return outputs(by_nccl(op, *mine, group()))


def chosen(op: str, mine: list[Any]) -> Result:
    return outputs(all_reduce_norm(op, *mine, group=group()))


def flashinfer(op: str, mine: list[Any]) -> Result:
    found = _flashinfer_all_reduce.by_flashinfer(op, *mine, group())
    assert found is not None, "no memory that all ranks read: see the warning above"
    return outputs(found)


def memory_is_shared() -> None:
    space = workspace(group(), torch.device("cuda", torch.cuda.current_device()), slot_bytes(torch.empty(1, 2816), 1), 4)
    assert space is not None and space.ranks == dist.get_world_size(), "no memory that all ranks read: see the warning above"
    print(f"rank {space.rank}: {torch.cuda.get_device_name()}, addresses {space.addresses[: space.ranks].tolist()}", flush=True)


def form(op: str, *ways: Way) -> None:
    """Each width, number of tokens and dtype."""
    seed = 0
    for width in WIDTHS:
        for tokens in TOKENS:
            for dtype in DTYPES:
                mine = given(op, width, tokens, dtype, seed := seed + 1)
                for way in ways:
                    assert_right(op, mine, way(op, mine), f"{way.__name__}, {width} x {tokens} {dtype}", way is not nccl)


def rounds(count: int, way: Way) -> None:
    """Many, of changing forms and row counts, with no wait of the host in between; now and then one rank is late."""
    late = random.Random(dist.get_rank())
    names = list(FORMS)
    for first in range(0, count, 50):
        kept = []
        for turn in range(first, min(first + 50, count)):
            op = names[turn % len(names)]
            # Rows of two widths that take turns in the same places.
            width, tokens = (2816, 2816, 2808)[turn % 3], (1, 8, 3, 64, 2)[turn % 5]
            mine = given(op, width, tokens, torch.bfloat16, 100 + turn)
            if late.random() < 0.3:
                torch.cuda._sleep(late.randrange(400_000))
            kept.append((op, mine, way(op, mine), f"round {turn}"))
        for op, mine, found, what in kept:
            assert_right(op, mine, found, what)


def captured(count: int, way: Way) -> None:
    """Three in a CUDA graph: an odd number, so that each replay begins with the other slot."""
    late = random.Random(dist.get_rank())
    ops = ("post_attention_norms", "moe_feed_forward_tail_norm", "feed_forward_tail_norm")
    for tokens in (1, 16):
        static = [given(op, 2816, tokens, torch.bfloat16, 5) for op in ops]
        for _ in range(2):
            for op, mine in zip(ops, static, strict=True):
                way(op, mine)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = [way(op, mine) for op, mine in zip(ops, static, strict=True)]
        for replay in range(count // (2 * len(ops)) + 1):
            for op, mine in zip(ops, static, strict=True):
                for i, fresh in enumerate(given(op, 2816, tokens, torch.bfloat16, 1000 + replay)):
                    if isinstance(fresh, Tensor):
                        mine[i].copy_(fresh)
            if late.random() < 0.3:
                torch.cuda._sleep(late.randrange(400_000))
            graph.replay()
            copies = [tuple(t.clone() for t in result) for result in results]
            for op, mine, found in zip(ops, static, copies, strict=True):
                assert_right(op, mine, found, f"replay {replay} of {tokens} tokens")


def captured_without_memory() -> None:
    """A graph that is captured before the memory was made holds NCCL's all-reduce, and says so."""
    mine = given("rms_norm", 1160, 3, torch.bfloat16, 3)
    outputs(by_nccl("rms_norm", *mine, group()))  # NCCL's own start is not for a capture either
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings(record=True) as said, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        warnings.simplefilter("always")
        found = outputs(all_reduce_norm("rms_norm", *mine, group=group()))
    assert any("cannot be made while a graph is captured" in str(w.message) for w in said)
    graph.replay()
    assert_right("rms_norm", mine, found, "the replay", rounds_once=False)


def many_tokens() -> None:
    """Through the op itself, which leaves these to NCCL."""
    for op in ("feed_forward_tail_norm", "moe_feed_forward_tail_norm"):
        mine = given(op, 5376, 700, torch.bfloat16, 11)
        assert_right(op, mine, outputs(all_reduce_norm(op, *mine, group=group())), op, rounds_once=False)


def by_flashinfer(count: int) -> None:
    """What one_shot is tested with; and FlashInfer's memory must be without multicast."""
    if not _flashinfer_all_reduce.installed():
        raise Skipped("FlashInfer is not installed: its all-reduce was NOT tested")
    for op in FORMS:
        form(op, flashinfer)
    from flashinfer.comm import trtllm_ar

    handles = [handle for memory in trtllm_ar._symm_workspace_refs.values() for _, handle in memory]
    assert handles and not any(handle.multicast_ptr for handle in handles), "FlashInfer set NVLink multicast up"
    rounds(count, flashinfer)
    captured(count, flashinfer)


def tokens_of_one_process(kind: str, graphs: bool) -> None:
    """generate() of the demo checkpoint, sharded and optimized, static cache: the tokens of transformers on one GPU."""
    if importlib.util.find_spec("accelerate") is None:
        raise ModuleNotFoundError("transformers' tensor parallel needs accelerate; pip install accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gemma4_compile.demo import held_out_prompts
    from gemma4_compile.hf.parallel import load

    folder = demo_checkpoint(kind) / "target"
    alone: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    alone = alone.eval().to("cuda")
    model = load(folder, dtype=torch.float32)
    for either in (alone, model):
        if kind == "moe":
            either.set_experts_implementation("batched_mm")  # grouped_mm on a GPU is for bf16
    optimize(model, OptimizeConfig(enable=("all_reduce_norm",), cuda_graphs=None if graphs else False))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    static = {"cache_implementation": "static"}  # with which transformers would compile its own model too
    for prompt in held_out_prompts(tokenizer, count=2, min_tokens=16, max_tokens=64):
        ids = torch.tensor([prompt], device="cuda")
        with torch.no_grad():
            found, wanted = (
                m.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)
                for m, more in ((model, static), (alone, {}))
            )
        assert torch.equal(found, wanted), f"{found.tolist()} is not {wanted.tolist()}"
        assert all(torch.equal(found, other) for other in gathered(found)), "the ranks' tokens differ"
    fusion = report(model).fusions["all_reduce_norm"]
    assert fusion.matched == fusion.expected > 0, str(report(model))


def divided(logits: Tensor) -> tuple[Vocabulary, Tensor]:
    """This rank's part of logits that all ranks have."""
    size = logits.shape[1]
    here = size // dist.get_world_size()
    vocabulary = Vocabulary(size, dist.get_rank() * here, here, group())
    return vocabulary, logits[:, vocabulary.start :][:, :here].contiguous()


def divided_vocabulary() -> None:
    """The tokens, greedy tokens and log-probabilities of a whole one, for all mixes of parameters."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for rows in (len(MIXES), 15):
            logits = (torch.randn(rows, VOCABULARY) * 3 if rows > 15 else awkward(VOCABULARY)).to("cuda", dtype)
            rest = [t.cuda() for t in parameters(MIXES[:rows])]
            vocabulary, mine = divided(logits)
            tokens = torch.ops.gemma4.sample(logits, *rest)
            wrong = (vocabulary.sample(mine, *rest) != tokens).nonzero()[:, 0].tolist()
            assert not wrong, f"{dtype}: {[[t[row].item() for t in rest] for row in wrong]}"
            assert torch.equal(vocabulary.argmax(mine), local_argmax(logits)), f"argmax, {dtype}"
            assert torch.equal(vocabulary.gather(mine).nan_to_num(), logits.nan_to_num())
            for found, wanted in zip(vocabulary.logprobs(mine, tokens, 5)[:3], logprobs_of(logits, tokens, 5), strict=False):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4, equal_nan=True)


def local_argmax(logits: Tensor) -> Tensor:
    """The lowest of the highest: on a GPU, argmax may give another of equals."""
    return token_of(local_highest(logits, 0))


def divided_vocabulary_captured() -> None:
    """Each kind of batch in a CUDA graph, over other contents; rank 0 prints times (gathered: all logits, and the whole op)."""
    rows = 8
    for name, (options, thresholds) in KINDS.items():
        torch.manual_seed(1)
        contents = [
            (torch.randn(rows, VOCABULARY).cuda() * 3, *(t.cuda() for t in parameters([options] * rows, 0))) for _ in range(2)
        ]
        vocabulary, static = divided(contents[0][0])
        rest = [t.clone() for t in contents[0][1:]]

        def draw(vocabulary: Any = vocabulary, static: Any = static, rest: Any = rest, thresholds: Any = thresholds) -> Tensor:
            return vocabulary.sample(static, *rest, thresholds)

        def gather(vocabulary: Any = vocabulary, static: Any = static, rest: Any = rest) -> Tensor:
            return torch.ops.gemma4.sample(vocabulary.gather(static), *rest)

        draw()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = draw()
        for logits, *others in (contents[1], contents[0]):
            static.copy_(divided(logits)[1])
            for buffer, content in zip(rest, others, strict=True):
                buffer.copy_(content)
            graph.replay()
            assert torch.equal(out, torch.ops.gemma4.sample(logits, *others)), name
        times = [microseconds(function) for function in (draw, gather)]
        if dist.get_rank() == 0:
            print(f"time of {name}, N={rows}: {times[0]:.1f} us, gathered {times[1]:.1f} us", flush=True)


KINDS: dict[str, tuple[tuple[int, float, float], tuple[str, ...]]] = {
    "no thresholds": ((0, 1.0, 0.0), ()),
    "top_k 64": ((64, 1.0, 0.0), ("top_k",)),
    "top_k 64, top_p 0.95": ((64, 0.95, 0.0), ("top_k", "top_p")),
    "top_p 0.95": ((0, 0.95, 0.0), ("top_p",)),
    "min_p 0.05": ((0, 1.0, 0.05), ("min_p",)),
}


def cases(count: int) -> dict[str, Callable[[], None]]:
    """In order: each needs what those before it showed."""
    return {
        "shared memory": memory_is_shared,
        **{f"form {op}": partial(form, op, one_shot, nccl) for op in FORMS},
        f"{count} rounds": partial(rounds, count, one_shot),
        "CUDA graph": partial(captured, count, chosen),
        "CUDA graph without memory": captured_without_memory,
        "many tokens": many_tokens,
        "flashinfer": partial(by_flashinfer, count),
        "divided vocabulary": divided_vocabulary,
        "divided vocabulary in CUDA graphs": divided_vocabulary_captured,
        "tokens e": partial(tokens_of_one_process, "e", False),
        "tokens e in CUDA graphs": partial(tokens_of_one_process, "e", True),
        "tokens moe": partial(tokens_of_one_process, "moe", False),
        "tokens moe in CUDA graphs": partial(tokens_of_one_process, "moe", True),
    }


def run(cases: dict[str, Callable[[], None]], wanted: Sequence[str]) -> None:
    """Each case with all ranks, and its line. wanted: beginnings of names; all cases without any."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(minutes=5))
    torch.set_grad_enabled(False)
    for name, case in cases.items():
        if wanted and not name.startswith(tuple(wanted)):
            continue
        error, start = "", time.monotonic()
        try:
            case()
        except Skipped as why:
            error = f"skipped: {why}"
        except Exception as caught:  # every case gets its line
            error = f"{type(caught).__name__} {' '.join(str(caught).split())[-600:]}"
            traceback.print_exc()
        torch.cuda.synchronize()
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        if dist.get_rank() == 0:
            print(f"{name}: {next((e for e in errors if e), 'ok')}", flush=True)
            print(f"    {time.monotonic() - start:.0f} s", flush=True)
    forget()
    _flashinfer_all_reduce.forget()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(cases(int(sys.argv[1]) if len(sys.argv) > 1 else 1000), sys.argv[2:])
