"""What the plug-in gains in the vLLM that is installed: random prompts through vllm.LLM, without it and with it.

    python scripts/bench_vllm.py [--models E2B,26B-A4B] [--workloads 128/256x1,1024/128x64,7000/10x8] [--out FILE]
    python scripts/bench_vllm.py --settings off,norms,on --together --kv-gib 8    # engines side by side, measured in turn
    python scripts/bench_vllm.py --quick                                          # few layers, short: does it run?

A workload is IN/OUTxREQUESTS in tokens, all submitted at once, greedy, each to OUT tokens; the first run of one warms up, the
median of --repeats others is told, with prompts that are new in each repeat and the same in all settings. A setting is a
process of its own: `off` is vLLM as it is, `on` has all fusions, `norms` all but the products (gate_up, linear). Everything
else is vLLM's default, or what --options says. Models have their real size, no vision, and random weights (norms 1, matrices
N(0, 0.02)): they are written over vLLM's dummy weights, whose norms and layer scalars are a thousandth at most. Caches of
compiled code are new, so that start-up is a first one. TTFT and TPOT are vLLM's own counts, medians over requests. `equal` is
the share of tokens that are those of the first setting, up to the first that is not; in bf16 one last bit can turn a token, and
all behind it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is no package

from gemma4_compile.bench.workloads import Workload, random_prompts, workload
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS, UNIFIED_NAMES
from gemma4_compile.hf.loading import cut
from gemma4_compile.vllm.report import lines, written

ROOT = Path(__file__).resolve().parent.parent
# Environment of each.
SETTINGS: dict[str, dict[str, str]] = {
    "off": {"GEMMA4_COMPILE_VLLM": "0"},
    "norms": {"GEMMA4_COMPILE_VLLM": "1", "GEMMA4_COMPILE_DISABLE": "gate_up,linear"},
    "on": {"GEMMA4_COMPILE_VLLM": "1"},
}
WORKLOADS = ("128/256x1", "1024/128x64", "7000/10x8")
QUICK: dict[str, Any] = {
    "layers": 6,
    "workloads": ("24/8x1", "16/4x4"),
    "overrides": {"vocab_size": 512, "vocab_size_per_layer_input": 512},
}
Tokens = Sequence[Sequence[int]]


def randomize(model: Any) -> None:
    """Norms and scalars 1, matrices N(0, 0.02), in place; runs in vLLM's worker."""
    import torch

    with torch.no_grad():
        for seed, (_, value) in enumerate(sorted(model.state_dict().items())):
            if value.is_floating_point():
                torch.manual_seed(seed)
                value.normal_(0, 0.02) if value.ndim > 1 else value.fill_(1)


def serve(options: dict[str, Any]) -> None:
    """The process of a setting: one line of JSON for each that it is given, the first when the engine is up."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    if vllm.__version__.startswith("0.26"):  # it asks for what newer configs keep for each layer
        width = json.loads((Path(options["model"]) / "config.json").read_text())["global_head_dim"]
        options["hf_overrides"] = {"allow_global_per_layer_attribute_access": True, "global_head_dim": width}
    engine = LLM(load_format="dummy", skip_tokenizer_init=True, disable_log_stats=False, **options)
    started = time.time()
    engine.apply_model(importlib.import_module("scripts.bench_vllm").randomize)  # by a name that other processes find
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    found = engine.generate(
        [{"prompt_token_ids": ids} for ids in random_prompts(Workload(8, 1, 1), vocabulary, 0)],
        SamplingParams(temperature=0, max_tokens=1, logprobs=1, detokenize=False), use_tqdm=False,
    )  # fmt: skip
    best = max(entry.logprob for entry in found[0].outputs[0].logprobs[0].values())
    assert best > -math.log(vocabulary) + 1e-3, f"logits must differ, got {best} for the best of {vocabulary}"  # NaN fails too
    attention = getattr(
        engine.llm_engine.vllm_config.attention_config.backend, "name", None
    )  # None: vLLM's choice for each layer
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    print(json.dumps({"at": started, "machine": device, "attention": attention} | versions), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        load = workload(asked["workload"])
        params = SamplingParams(temperature=0, max_tokens=load.wanted, ignore_eos=True, detokenize=False)
        prompts: Any = [{"prompt_token_ids": ids} for ids in random_prompts(load, vocabulary, asked["seed"])]
        begin = time.perf_counter()
        requests = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        print(json.dumps(_counted(requests) | {"seconds": seconds}), file=answers)


def _counted(requests: Sequence[Any]) -> dict[str, Any]:
    """By vLLM's own clocks, in the process of its engine."""
    times = [request.metrics for request in requests]
    tokens = [list(request.outputs[0].token_ids) for request in requests]
    spans = [(t.last_token_ts - t.first_token_ts) / max(len(ids) - 1, 1) for t, ids in zip(times, tokens, strict=True)]
    return {
        "ttft_ms": 1e3 * statistics.median(t.first_token_latency for t in times),
        "tpot_ms": 1e3 * statistics.median(spans), "tokens": tokens,
    }  # fmt: skip


class Served:
    """A setting's process, from here; what it compiles goes to `folder`.

    Raises RuntimeError with the end of its log if it ends, or does not answer in `patience` seconds."""

    def __init__(self, setting: str, options: dict[str, Any], folder: Path, log: Path, patience: float):
        self.setting, self._patience, self._cache, self._log = setting, patience, folder / setting, log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GEMMA4_COMPILE_")}
        environment |= SETTINGS[setting] | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # for apply_model
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= {"VLLM_CACHE_ROOT": str(self._cache), "TRITON_CACHE_DIR": str(self._cache / "triton")}
        # What is imported here before vLLM asks whether there is a GPU; without this CUDA could not start in vLLM's fork.
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        self._began = time.time()
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--serve", json.dumps(options)], env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=output, text=True, bufsize=1, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Served:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if failed else 30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # vLLM's engine is a process of its own
        self._process.wait()

    def started(self) -> dict[str, Any]:
        """Wait until it is up; what it says of itself, seconds that the start took, and the plug-in's own account."""
        answer = self._answer()
        answer["start_seconds"] = answer.pop("at") - self._began
        found = [line for _, graph, report in written(self._cache) for line in lines(graph, report)]
        return answer | {"plugin": found}

    def run(self, load: str, seed: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"workload": load, "seed": seed}), file=self._process.stdin)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self._patience)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            end = "\n".join(self._log.read_text().splitlines()[-60:])
            why = "ended" if ready else f"did not answer within {self._patience:.0f} s"
            raise RuntimeError(f"vLLM, {self.setting}, {why}; the end of its log:\n{end}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def equal_share(one: Tokens, other: Tokens) -> float:
    """Of the tokens, those that are the other's, of each request up to the first that is not."""
    pairs = (zip(mine, theirs, strict=True) for mine, theirs in zip(one, other, strict=True))
    equal = sum(len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], tokens))) for tokens in pairs)
    return equal / sum(map(len, other))


def summarize(load: str, runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of one workload, medians of the runs of each setting. `gain` is of TPOT where one request runs, else of the whole
    time, how many times as long the first setting takes; the first one's tokens are what others are compared with."""
    figure = "tpot_ms" if workload(load).requests == 1 else "seconds"
    rows: list[dict[str, Any]] = []
    base = next(iter(runs.values()))
    for setting, found in runs.items():
        row: dict[str, Any] = {"workload": load, "setting": setting}
        row |= {key: statistics.median(run[key] for run in found) for key in ("seconds", "ttft_ms", "tpot_ms")}
        row["all_" + figure] = [run[figure] for run in found]
        if found is not base:
            row["gain"] = rows[0][figure] / row[figure]
            row["equal"] = statistics.mean(equal_share(a["tokens"], b["tokens"]) for a, b in zip(found, base, strict=True))
        rows.append(row)
    return rows


def describe(row: dict[str, Any]) -> str:
    times = f"{row['seconds']:8.3f} s  TTFT {row['ttft_ms']:8.1f}  TPOT {row['tpot_ms']:7.3f} ms"
    return f"{row['workload']:>12}  {row['setting']:<6} {times}" + (
        f"  gain {row['gain']:.3f}  equal {row['equal']:.0%}" if "gain" in row else ""
    )


def bench(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One model in all settings."""
    layers, overrides = (arguments.layers or QUICK["layers"], QUICK["overrides"]) if arguments.quick else (arguments.layers, {})
    loads = [workload(text) for text in arguments.workloads]
    logs = arguments.logs or folder
    config = cut(TEXT_CONFIGS[name], layers) | overrides | {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {
        "model": str(folder), "dtype": arguments.dtype, "max_model_len": max(load.longest for load in loads) + 1,
        "max_num_seqs": max(load.requests for load in loads),
    }  # fmt: skip
    if arguments.kv_gib:
        options |= {"kv_cache_memory_bytes": int(arguments.kv_gib * 2**30), "gpu_memory_utilization": 0.05}
    options |= json.loads(arguments.options)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {str(load): {} for load in loads}
    starts: dict[str, Any] = {}
    for group in [arguments.settings] if arguments.together else [[setting] for setting in arguments.settings]:
        with ExitStack() as stack:
            engines = [
                stack.enter_context(Served(s, options, folder, logs / f"{name}-{s}.log", arguments.patience)) for s in group
            ]
            for engine in engines:
                start = starts[engine.setting] = engine.started()
                up = f"{name}, {engine.setting}: up after {start['start_seconds']:.0f} s"
                print(up, *start["plugin"], sep="\n", flush=True)
            for load, found in runs.items():
                for repeat, engine in itertools.product(range(arguments.repeats + 1), engines):
                    run = engine.run(load, repeat)
                    if repeat:
                        found.setdefault(engine.setting, []).append(run)
    rows = [row for load, found in runs.items() for row in summarize(load, found)]
    print(name, *map(describe, rows), sep="\n", flush=True)
    del options["model"]  # a folder that is gone
    return {"model": name, "layers": layers, "options": options, "starts": starts, "rows": rows}


def listed(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in TEXT_CONFIGS if name not in UNIFIED_NAMES]
    parser.add_argument("--models", type=listed, default=["E2B", "26B-A4B"], help=f"of {', '.join(names)}")
    parser.add_argument("--workloads", type=listed, help=f"default: {','.join(WORKLOADS)}")
    parser.add_argument(
        "--settings",
        type=listed,
        default=["off", "on"],
        help=f"of {', '.join(SETTINGS)}; the first is what others are compared with",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="cut the models to so many")
    parser.add_argument(
        "--together", action="store_true", help="start all settings at once and measure in turn; asks for --kv-gib"
    )
    parser.add_argument("--kv-gib", type=float, help="memory of each engine's keys and values; default: vLLM's choice")
    parser.add_argument("--options", default="{}", metavar="JSON", help="further arguments of vllm.LLM")
    parser.add_argument("--patience", type=float, default=900, help="seconds that a start may take, or a run")
    parser.add_argument("--logs", type=Path, help="keep vLLM's logs there")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(json.loads(arguments.serve))
        return
    for given, known in ((arguments.models, names), (arguments.settings, SETTINGS)):
        if unknown := set(given) - set(known):
            parser.error(f"expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if arguments.together and not arguments.kv_gib:
        parser.error("engines side by side must be told their memory; add --kv-gib 8")
    arguments.workloads = arguments.workloads or list(QUICK["workloads"] if arguments.quick else WORKLOADS)
    found = []
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.models:
            folder = Path(temporary) / name
            folder.mkdir()
            found.append(bench(name, arguments, folder))
            if arguments.out:  # the first model's numbers are there if the second fails
                command = " ".join(["python scripts/bench_vllm.py", *sys.argv[1:]])
                arguments.out.write_text(json.dumps({"command": command, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
