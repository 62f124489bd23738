"""Time the all-reduce with the norms behind it, one-shot and by NCCL, against NCCL and Inductor's code for the norms.

    python scripts/bench_all_reduce.py [--ranks 2] [--tokens 1,8] [--ways one-shot,nccl+ours] [--out FILE]

Starts itself under torchrun, a process a GPU. A row is one op of a layer, in microseconds an instance: the slowest rank's
median over replays of CUDA graphs that hold many instances on rotating buffers; the ways' replays alternate:
    one-shot   our one launch over symmetric memory
    nccl+ours  NCCL's all-reduce, then our fused op
    inductor   torch.compile of NCCL's all-reduce and the unfused norms
    nccl       the all-reduce alone
    flashinfer FlashInfer's one-shot all-reduce, then our fused op, where FlashInfer is installed
The floor is the larger of the local bytes over the copy bandwidth and the bytes of one exchange over the rate of a large NCCL
all-reduce, both measured in the same run. NVLink multicast stays off.
"""

from __future__ import annotations

import os

os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # before torch reads it: some hosts must not set multicast up
os.environ["NCCL_NVLS_ENABLE"] = "0"

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from datetime import timedelta  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile.bench.rates import copy_bandwidth, median_seconds  # noqa: E402
from gemma4_compile.ops import OPS  # noqa: E402
from gemma4_compile.ops.distributed.all_reduce_norm import FORMS, by_nccl, by_one_shot, slot_bytes  # noqa: E402
from gemma4_compile.ops.distributed.symmetric import forget  # noqa: E402
from gemma4_compile.ops.examples import example  # noqa: E402
from gemma4_compile.ops.plans import one_shot_pays  # noqa: E402
from scripts import _flashinfer_all_reduce  # noqa: E402
from scripts.bench_ops import DENSE, MOE, ROTATE_BYTES, tensors  # noqa: E402

CASES = {
    "post_attention_norms": ("26B-A4B", MOE),
    "moe_feed_forward_tail_norm": ("26B-A4B", MOE),
    "post_attention_norm": ("31B", DENSE),
    "feed_forward_tail_norm": ("31B", DENSE),
}
TOKENS = (1, 8, 64, 512)
WAYS = ("one-shot", "nccl+ours", "inductor", "nccl", "flashinfer")


def ways(op: str, group: str) -> dict[str, Callable[..., Any]]:
    """name -> a function of the op's arguments."""
    collectives, sums = torch.ops._c10d_functional, FORMS[op].sums

    def total(x: Tensor) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(x, "sum", group))

    def unfused(*args: Any) -> Any:
        return OPS[op].reference(*(total(x) for x in args[:sums]), *args[sums:])

    def sums_alone(*args: Any) -> Any:
        return [total(x) for x in args[:sums]]

    found: dict[str, Callable[..., Any]] = {
        "one-shot": lambda *args: by_one_shot(op, *args, group),
        "nccl+ours": lambda *args: by_nccl(op, *args, group),
        "inductor": torch.compile(unfused, dynamic=False, fullgraph=True),
        "nccl": sums_alone,
    }
    if _flashinfer_all_reduce.installed():
        found["flashinfer"] = lambda *args: _flashinfer_all_reduce.by_flashinfer(op, *args, group)
    return found


def capture(function: Callable[..., Any], sets: list[tuple]) -> tuple[Any, list[Any]]:
    """One CUDA graph of function over every set of arguments."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for args in sets[:3]:
            function(*args)
    torch.cuda.synchronize()
    dist.barrier()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for args in sets:
            kept.append(function(*args))
    return graph, kept


def microseconds(graphs: dict[str, tuple[Any, list[Any]]], instances: int, repeats: int = 20) -> dict[str, float]:
    """Median of one instance of each, their replays alternating; the ranks begin each replay together."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for repeat in range(repeats + 3):
        for name, (graph, _) in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            dist.barrier()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 3:
                times[name].append(begin.elapsed_time(end) * 1e3 / instances)
    medians = torch.tensor([statistics.median(series) for series in times.values()], device="cuda")
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return dict(zip(times, medians.tolist(), strict=True))


def exchange_rate(ranks: int) -> float:
    """Bytes a second that a rank gives (and takes) in a large all-reduce by NCCL."""
    x = torch.zeros(2**27, device="cuda", dtype=torch.bfloat16)
    dist.all_reduce(x)
    seconds = torch.tensor([median_seconds(lambda: dist.all_reduce(x), 8)], device="cuda")
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return 2 * (ranks - 1) / ranks * x.numel() * 2 / seconds.item()


def row(op: str, tokens: int, names: list[str], group: str, ranks: int, bandwidth: float, link: float) -> dict[str, Any]:
    model, sizes = CASES[op]
    torch._dynamo.reset()
    first = example(op, sizes, tokens, torch.bfloat16, "cuda")
    outputs = OPS[op].reference(*first)
    local = sum(t.numel() * t.element_size() for t in (*tensors(first), *tensors(outputs)))
    count = int(min(64, max(20, ROTATE_BYTES // local)))
    sets = [first, *(example(op, sizes, tokens, torch.bfloat16, "cuda") for _ in range(count - 1))]
    graphs: dict[str, tuple[Any, list[Any]]] = {}
    failed: dict[str, str] = {}
    for name, function in ways(op, group).items():
        if name not in names:
            continue
        problem = ""
        try:
            if function(*first) is None:
                problem = "no memory that all ranks read"
            else:
                graphs[name] = capture(function, sets)
        except Exception as error:  # the other ways are worth a number
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        problems: list[Any] = [None] * ranks
        dist.all_gather_object(problems, problem)
        if any(problems):
            failed[name] = next(p for p in problems if p)
            graphs.pop(name, None)
    found = microseconds(graphs, count)
    summed = sum(t.numel() * t.element_size() for t in first[: FORMS[op].sums])
    floor = max(local / bandwidth, summed * (ranks - 1) / ranks * 2 / link)
    return {
        "op": op,
        "model": model,
        "tokens": tokens,
        **{f"{name}_us": round(us, 3) for name, us in found.items()},
        "floor_us": round(floor * 1e6, 3),
        "chosen": "one-shot" if one_shot_pays(tokens, slot_bytes(first[0], FORMS[op].sums), ranks) else "nccl+ours",
        "bytes_summed": summed,
        "instances": count,
        **({"failed": failed} if failed else {}),
    }


def line(found: dict[str, Any]) -> str:
    times = "".join(f"{found[f'{name}_us']:11.2f}" if f"{name}_us" in found else f"{'-':>11}" for name in WAYS)
    best = min((found[f"{name}_us"] for name in WAYS[:2] if f"{name}_us" in found), default=float("nan"))
    gain = found.get("inductor_us", float("nan")) / best
    return f"{found['op']:27} {found['tokens']:5}{times}{found['floor_us']:9.2f}  x{gain:5.2f}  {found['chosen']}"


def bench(tokens: list[int], names: list[str]) -> dict[str, Any]:
    everyone: Any = dist.group.WORLD
    group, ranks = everyone.group_name, dist.get_world_size()
    bandwidth, link = copy_bandwidth(), exchange_rate(ranks)
    chief = dist.get_rank() == 0
    if chief:
        print(f"{ranks} x {torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, exchange {link / 1e9:.0f} GB/s")
        print(f"{'op':27} {'tokens':>5}" + "".join(f"{name:>11}" for name in WAYS) + f"{'floor':>9}  gain   chosen", flush=True)
    rows = []
    for op in CASES:
        for count in tokens:
            rows.append(row(op, count, names, group, ranks, bandwidth, link))
            if chief:
                print(line(rows[-1]), flush=True)
                for name, reason in rows[-1].get("failed", {}).items():
                    print(f"    {name} failed: {reason}", flush=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "ranks": ranks,
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "dtype": "bfloat16",
        "copy_bandwidth_TB_per_s": round(bandwidth / 1e12, 3),
        "exchange_GB_per_s": round(link / 1e9, 1),
        "command": f"python scripts/bench_all_reduce.py --ranks {ranks}",
        "rows": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated token counts")
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated, of those above")
    parser.add_argument("--out", type=Path, default=None, help="write the rows as JSON")
    options = parser.parse_args()
    names = options.ways.split(",")
    if unknown := set(names) - set(WAYS):
        parser.error(f"--ways are of {', '.join(WAYS)}, got {', '.join(sorted(unknown))}")
    if torch.cuda.device_count() < options.ranks or options.ranks < 2:
        print(f"bench_all_reduce needs 2 GPUs or more and --ranks of them, found {torch.cuda.device_count()}", file=sys.stderr)
        return 2
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(minutes=5))
    with torch.no_grad():
        result = bench([int(t) for t in options.tokens.split(",")], names)
    if options.out and dist.get_rank() == 0:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    forget()
    _flashinfer_all_reduce.forget()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
