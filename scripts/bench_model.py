"""Time decode steps of models of real size, with random weights: eager, Inductor alone, Inductor after our passes.

    python scripts/bench_model.py [--models E2B,26B-A4B] [--batches 1,32] [--context 1024] [--out FILE]
    python scripts/bench_model.py --quick --device cpu    # four layers, a small vocabulary: does it run?
    python scripts/bench_model.py --passes                # seconds of the passes on the 60 layers of 31B

The variants, all decoding one token a sequence over a StaticCache:
    eager      Hugging Face as it is
    inductor   optimize() with every fusion disabled and without CUDA graphs: Inductor alone, on the same graph
    fused      optimize() with the default fusions, without CUDA graphs
    graphed    inductor, replayed as a CUDA graph, as optimize() does by default on a static cache
    default    optimize() as it is: fused, replayed as a CUDA graph
    all        optimize() with the fusions that are off by default too
The default is the first three; each of the others needs room for one more copy of the model.
Each compiled variant of a model is a process of its own with an empty compile cache; the processes compile at the same
time and are then measured one by one. The cache holds random keys and values instead of a prompt's.

The floor is the bytes of weights that a step must read, over the copy bandwidth measured in the same run: each matrix
once, of the experts only those that the router chose, of the embeddings that are looked up only the rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import StaticCache

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile import OptimizeConfig, optimize, report
from gemma4_compile.bench.rates import copy_bandwidth, gpu_events
from gemma4_compile.dynamo import own_code
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
from gemma4_compile.hf.loading import random_model
from gemma4_compile.hf.step_cache import CACHE
from gemma4_compile.optimized import state_of
from gemma4_compile.passes import FUSIONS, pipeline, prepare, run

_whole = partial(OptimizeConfig, packed=False)  # graphs of the whole model, which the variants are about
VARIANTS: dict[str, OptimizeConfig | None] = {
    "eager": None,
    "inductor": _whole(disable=tuple(FUSIONS), cuda_graphs=False),
    "fused": _whole(cuda_graphs=False),
    "graphed": _whole(disable=tuple(FUSIONS)),
    "default": _whole(),
    "all": _whole(cuda_graphs=False, enable=tuple(name for name, fusion in FUSIONS.items() if not fusion.on_by_default)),
}
ROOM = 256  # rows of the cache behind the context; a variant decodes fewer tokens than that


class Decode:
    """A model that decodes one token for each of `batch` sequences after `context` rows of cache."""

    def __init__(self, model: Any, batch: int, context: int) -> None:
        self.model, self.batch, self.context = model, batch, context
        device = model.device
        self.tokens = torch.randint(5, model.config.vocab_size, (batch, 1), device=device)
        self.positions = torch.full((batch, 1), context, device=device)
        self.refill()

    def refill(self) -> None:
        """A fresh cache of `context` random rows."""
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.context + ROOM)
        self.eager()  # Hugging Face allocates the layers at their first use
        layer: Any
        for layer in self.cache.layers:
            if layer.keys is None:  # of a layer that shares KV: transformers 5.23 and later have one for it too
                continue
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(self.context)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = self.context

    def step(self) -> Tensor:
        """One step of the model as a user calls it: compiled, once it is optimized."""
        return self._call(self.model)

    def eager(self) -> Tensor:
        """One step of the plain model, optimized or not."""
        return self._call(self.model._call_impl)

    def _call(self, call: Callable[..., Any]) -> Tensor:
        return call(input_ids=self.tokens, position_ids=self.positions, use_cache=True, **{CACHE: self.cache}).logits

    def weight_bytes(self) -> tuple[int, float]:
        """Bytes of weights of one step, and how many distinct experts a layer chose on average (0 without experts)."""
        chosen: list[int] = []
        routers = [module for name, module in self.model.named_modules() if name.endswith(".router")]
        hooks = [r.register_forward_hook(lambda m, a, out: chosen.append(out[-1].unique().numel())) for r in routers]
        self.eager()
        for hook in hooks:
            hook.remove()
        experts = statistics.mean(chosen) if chosen else 0.0
        total = 0.0
        for name, parameter in self.model.named_parameters():  # tied weights once: the embedding is read as lm_head
            size = parameter.numel() * parameter.element_size()
            if "embed_tokens_per_layer" in name:
                size = size // parameter.shape[0] * self.batch
            elif ".experts." in name:
                size = int(size * experts / self.model.config.num_experts)
            total += size
        return int(total), experts


def wall_ms(step: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a step, each waited for."""
    times = []
    for repeat in range(repeats + 3):
        start = time.perf_counter()
        step()
        synchronize()
        if repeat >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def kernels(step: Callable[[], Any]) -> dict[str, Any]:
    """Kernels, copies and fills of one step, how long the GPU is busy with them, and the 12 names that cost most."""
    runs = []
    for _ in range(3):
        events = gpu_events(step)
        runs.append((sum(e.device_time for e in events) / 1e3, events))
    runs.sort(key=lambda one: one[0])
    busy, events = runs[1]
    count: Counter[str] = Counter(e.name[:90] for e in events)
    spent: Counter[str] = Counter()
    for event in events:
        spent[event.name[:90]] += event.device_time
    top = [{"name": n, "count": count[n], "ms": round(us / 1e3, 4)} for n, us in spent.most_common(12)]
    return {
        "kernels": len(events),
        "busy_ms": round(busy, 3),
        "busy_runs_ms": [round(b, 3) for b, _ in runs],
        "top": top,
    }


def graph_ms(step: Callable[[], Any], repeats: int) -> float:
    """Median time of a whole step as one CUDA graph: what is left without the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return wall_ms(graph.replay, repeats)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(decode: Decode, variant: str, repeats: int) -> dict[str, Any]:
    """The times of one variant; a CUDA graph that cannot be captured is reported, not raised."""
    step = decode.eager if variant == "eager" else decode.step
    decode.refill()
    result: dict[str, Any] = {"wall_ms": round(wall_ms(step, repeats), 3)}
    if decode.model.device.type != "cuda":
        return result
    result |= kernels(step)
    try:
        result["graph_ms"] = round(graph_ms(step, repeats), 3)
    except Exception as error:
        result["graph_ms"] = None
        result["graph_error"] = f"{type(error).__name__}: {error}"[:300]
    return result


def compile_step(decode: Decode, variant: str) -> dict[str, Any]:
    """The first calls, which compile."""
    seen = len(state_of(decode.model).backend.records)
    start = time.perf_counter()
    decode.step()
    synchronize()
    seconds = time.perf_counter() - start
    for _ in range(2):
        decode.step()
    records = state_of(decode.model).backend.records[seen:]
    fusions = report(decode.model).fusions.values()
    return {
        "compile_s": round(seconds, 2),
        "graphs": len(records),
        "passes_s": round(sum(sum(record.seconds.values()) for record in records), 3),
        "sites": {f.name: [f.matched, f.expected] for f in fusions if f.enabled and f.expected},
    }


def child(options: argparse.Namespace, model_name: str, variant: str, pipe: Connection) -> None:
    """One model and one compiled variant: for each batch compile, say so, wait for the turn, measure."""
    cuda = options.device == "cuda"
    with tempfile.TemporaryDirectory() as cache_dir, torch.no_grad():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_dir
        try:
            small: dict[str, Any] = {"vocab_size": 512, "vocab_size_per_layer_input": 512} if options.quick else {}
            model = random_model(model_name, options.layers, options.device, **small)
            if getattr(model.config, "enable_moe_block", False):
                model.set_experts_implementation(options.experts)
            optimize(model, VARIANTS[variant])
            for batch in options.batches:
                decode = Decode(model, batch, options.context)
                compiled = compile_step(decode, variant)
                pipe.send({"ready": True} | compiled)
                if pipe.recv() == "with eager":
                    size, experts = decode.weight_bytes()
                    common = {"weight_bytes": size, "experts_read": round(experts, 1)}
                    pipe.send(common | {"eager": measure(decode, "eager", options.repeats)})
                pipe.send(compiled | measure(decode, variant, options.repeats))
                del decode
                if cuda:
                    torch.cuda.empty_cache()
        except Exception:
            pipe.send({"error": traceback.format_exc()[-3000:]})


def bench(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All models and variants, batch by batch; `save` gets the result each time it grows."""
    bandwidth = copy_bandwidth() if options.device == "cuda" else None
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if bandwidth else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "bfloat16",
        "context": options.context,
        "layers": options.layers,
        "experts": options.experts,
        "copy_bandwidth_TB_per_s": bandwidth and round(bandwidth / 1e12, 3),
        "command": " ".join(["python", *sys.argv]),
        "rows": [],
    }
    if bandwidth:
        torch.cuda.empty_cache()
    spawn = multiprocessing.get_context("spawn")
    running: dict[tuple[str, str], tuple[Any, Connection]] = {}
    for model in options.models:
        for variant in options.variants:
            if variant == "eager":
                continue
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=child, args=(options, model, variant, theirs), daemon=False)
            process.start()
            theirs.close()
            running[model, variant] = (process, mine)
    for batch in options.batches:
        ready = {case: _receive(case, pipe) for case, (_, pipe) in list(running.items())}
        running = {case: value for case, value in running.items() if ready[case]}
        eager_done: set[str] = set()
        for (model, variant), (_, pipe) in running.items():
            with_eager = "eager" in options.variants and model not in eager_done
            pipe.send("with eager" if with_eager else "alone")
            row = {"model": model, "batch": batch}
            if with_eager:
                common = _receive((model, "eager"), pipe)
                if not common:
                    continue
                eager_done.add(model)
                floor = bandwidth and round(common["weight_bytes"] / bandwidth * 1e3, 3)
                sizes = {"weight_bytes": common["weight_bytes"], "experts_read": common["experts_read"]}
                result["rows"].append(row | {"variant": "eager", "floor_ms": floor} | sizes | common["eager"])
            timed = _receive((model, variant), pipe)
            if timed:
                result["rows"].append(row | {"variant": variant} | timed)
            save(result)
            print(table(result["rows"][-2:] if with_eager else result["rows"][-1:]), flush=True)
    for process, _ in running.values():
        process.join(30)
    return result


def _receive(case: tuple[str, str], pipe: Connection) -> dict[str, Any]:
    """What the child says, or nothing when it failed; then the reason is printed."""
    try:
        message = pipe.recv()
    except EOFError:
        message = {"error": "the process ended"}
    if "error" in message:
        print(f"{' '.join(case)} failed:\n{message['error']}", file=sys.stderr, flush=True)
        return {}
    if "ready" in message:
        print(f"{' '.join(case)} compiled in {message['compile_s']} s", file=sys.stderr, flush=True)
    return message


def passes_seconds(hidden: int = 64) -> dict[str, Any]:
    """Seconds of raise, fuse and lower on the 60 layers of 31B; widths do not matter to them, so these are small."""
    widths: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 128,
        "vocab_size": 512,
        "head_dim": 16,
        "global_head_dim": 32,
    }
    model = random_model("31B", **widths).requires_grad_(False)
    prepare()
    found: dict[str, Any] = {}

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        nodes = len(gm.graph.nodes)
        record = run(pipeline(VARIANTS["fused"].enabled()), gm.graph)  # type: ignore[union-attr]
        sites = Counter(site.fusion for site in record.sites)
        found.update(nodes=nodes, seconds=round(sum(record.seconds.values()), 3), sites=dict(sites))
        found["by_pass"] = {name: round(seconds, 3) for name, seconds in record.seconds.items()}
        gm.recompile()
        return gm.forward

    step = torch.compile(own_code(lambda ids: model(ids, use_cache=False).logits), backend=backend, fullgraph=True)
    with torch.no_grad():
        step(torch.randint(5, 512, (1, 4)))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row."""
    lines = []
    for row in rows:
        sites = row.get("sites", {})
        matched = f"{sum(m for m, _ in sites.values())}/{sum(e for _, e in sites.values())}" if sites else "-"
        cells = [
            f"{row['model']:8} b{row['batch']:<3} {row['variant']:9} wall {row['wall_ms']:8.2f} ms",
            f"busy {row.get('busy_ms', '-')} ms, {row.get('kernels', '-')} kernels",
            f"graph {row.get('graph_ms', '-')} ms",
            f"compile {row.get('compile_s', '-')} s, passes {row.get('passes_s', '-')} s, sites {matched}",
        ]
        lines.append("  ".join(cells) + (f"  floor {row['floor_ms']} ms" if row.get("floor_ms") else ""))
    return "\n".join(lines)


def names(allowed: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        values = [value for value in text.split(",") if value]
        if wrong := [value for value in values if value not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: choose from {', '.join(allowed)}")
        return values

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names(TEXT_CONFIGS), default=["E2B", "26B-A4B"])
    parser.add_argument("--variants", type=names(VARIANTS), default=["eager", "inductor", "fused"])
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 32])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--experts", choices=("grouped_mm", "batched_mm"), default="grouped_mm")
    parser.add_argument("--layers", type=int, help="cut the models to so many layers")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="4 layers, vocabulary of 512, 3 repeats")
    parser.add_argument("--passes", action="store_true", help="time the passes on 31B's layers, nothing else")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.repeats = options.layers or 4, 3
    if options.device == "cuda" and not options.passes and not torch.cuda.is_available():
        print("bench_model needs a CUDA GPU; none is visible. --device cpu shows that it runs", file=sys.stderr)
        return 2

    def save(result: dict[str, Any]) -> None:
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    result: dict[str, Any] = {"31B passes": passes_seconds()} if options.passes else bench(options, save)
    save(result)
    print(json.dumps(result) if options.passes else "\n" + table(result["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
