"""`gemma4-compile bench` for what that command has no options for: models divided between GPUs, and an engine's inner knobs.

    torchrun --nproc-per-node 2 scripts/bench_engine.py 31B --workloads one,even --mtp off,2.8
    python scripts/bench_engine.py E2B --workloads even --page-size 128 --no-reuse
    python scripts/bench_engine.py E2B --quick --device cpu      # few layers, short: does it run?

Models have their real size and random weights (norms 1, matrices N(0, 0.02)); workloads, MTP and the rows are the bench's
(docs/bench.md). The floor of a divided model is not told.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile import EngineConfig
from gemma4_compile.bench.matrix import Plan, Subject, measure
from gemma4_compile.bench.records import as_json, table
from gemma4_compile.bench.workloads import workload
from gemma4_compile.hf.loading import random_assistant, random_model
from gemma4_compile.torchrun import launched_ranks
from scripts._divided import divided_assistant, divided_model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--workloads", default="one,even", help="as the bench's")
    parser.add_argument("--mtp", default="off", help="off, or tokens a round; several with commas")
    parser.add_argument("--speculative-tokens", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--kv-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--max-batched-tokens", type=int, default=8192)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--no-reuse", action="store_true", help="without the prefix cache")
    parser.add_argument("--lazy", action="store_true", help="capture graphs when they are first used, not at the start")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def subject(name: str, options: argparse.Namespace) -> Subject:
    small: dict[str, Any] = {"layers": 6, "vocab_size": 512} if options.quick else {}
    vocabulary, assistant = small.get("vocab_size"), None
    if launched_ranks() > 1:
        model = divided_model(name, **small)
        torch.manual_seed(0)  # as --mtp draws what is right, on all ranks alike
    else:
        model = random_model(name, device=options.device, **small).requires_grad_(False)
    if options.mtp != "off":
        assistant = (
            divided_assistant(name, model, vocabulary)
            if launched_ranks() > 1
            else random_assistant(name, options.device, vocab_size=vocabulary)
        )
    return Subject(name, model, assistant=assistant)


def main() -> None:
    options = parse()
    config = EngineConfig(
        max_batched_tokens=options.max_batched_tokens, kv_dtype=options.kv_dtype, prefix_caching=not options.no_reuse,
        capture_at_start=not options.lazy, page_size=options.page_size,
    )  # fmt: skip
    plan = Plan(
        tuple(map(workload, (options.workloads if not options.quick else "48/8x4,32/16x1").split(","))),
        mtp=tuple(options.mtp.split(",")), drafts=options.speculative_tokens, repeats=options.repeats, config=config,
    )  # fmt: skip
    rows = [row for name in options.models for row in measure(subject(name, options), plan)]
    if not rows:  # a rank that follows
        return
    print(table(rows))
    if options.out:
        about = {
            "machine": torch.cuda.get_device_name() if options.device == "cuda" else "cpu", "torch": torch.__version__,
            "transformers": transformers.__version__, "ranks": launched_ranks(),
            "command": " ".join(["python scripts/bench_engine.py", *sys.argv[1:]]),
        }  # fmt: skip
        options.out.write_text(as_json(rows, **about) + "\n")


if __name__ == "__main__":
    main()
