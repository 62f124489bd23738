"""gemma4-compile bench: times under load. The table or JSON goes to stdout, the rest to stderr."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_common, config_of, load_model

if TYPE_CHECKING:
    from gemma4_compile.bench.matrix import Plan, Subject
    from gemma4_compile.bench.records import Row


def add_bench(commands: Any) -> None:
    """Add the command to the parser's."""
    bench = commands.add_parser(
        "bench",
        help="times under load: ours, a server's, other systems'",
        usage="%(prog)s [MODEL ... | --demo | --url URL] [options]",
    )
    bench.add_argument("models", nargs="*", metavar="MODEL", help="as in `report`: with E2B or a config.json random weights")
    bench.add_argument("--demo", action="store_true", help="the embedded demo checkpoint, on text that it never saw")
    bench.add_argument("--url", help="a server instead, such as http://127.0.0.1:8000")
    bench.add_argument("--api-key", metavar="KEY", help="for --url")
    bench.add_argument(
        "--vocabulary", type=int, default=1000, metavar="N", help="random tokens for --url (default: %(default)s)"
    )
    bench.add_argument(
        "--workloads", default="", metavar="W,...",
        help="IN/OUTxREQUESTS in tokens, or names: one, even, long, summary, chat, write, classify, quick (default: quick with "
        "--demo, else one)",
    )  # fmt: skip
    bench.add_argument("--concurrency", default="", metavar="N,...", help="so many requests at a time (default: all at once)")
    bench.add_argument("--rate", default="", metavar="R,...", help="so many new requests a second, at random")
    bench.add_argument(
        "--mtp", default="off", metavar="off,on,T", help="without and with an assistant; T forces T tokens a round"
    )
    bench.add_argument("--assistant", metavar="PATH", help="of a checkpoint; the demo and the released sizes have one here")
    bench.add_argument(
        "--speculative-tokens", type=int, default=3, metavar="K", help="drafts of a round (default: %(default)s)"
    )
    bench.add_argument(
        "--against", default="", metavar="PEER,...", help="hf-eager, hf-compile, optimize, vllm: run in this call, too"
    )
    bench.add_argument("--vllm-command", default="vllm serve", metavar="COMMAND", help="default: %(default)s")
    bench.add_argument(
        "--agreement", type=int, default=0, metavar="N", help="let plain Hugging Face judge N requests of each row"
    )
    bench.add_argument("--repeats", type=int, default=1, metavar="N", help="report the median of N runs (default: %(default)s)")
    bench.add_argument("--layers", type=int, metavar="K", help="cut a bare config to so many layers")
    bench.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's; bfloat16 for a config"
    )
    bench.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="default: the weights'")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="throughput against latency, .png, .svg or .pdf")
    add_common(bench)
    bench.set_defaults(func=_bench)


def _bench(options: argparse.Namespace) -> int:
    if bool(options.url) + options.demo + bool(options.models) != 1 and not (options.url and options.models):
        raise ValueError("bench needs MODEL, --demo or --url, got none or two; name one")
    from gemma4_compile.bench.records import as_json, plot, table

    plan = _plan(options)  # wrong values must not cost the time of loading
    rows: list[Row] = []
    for row in _rows(options, plan):
        rows.append(row)
        print(table([row]).splitlines()[1], file=sys.stderr, flush=True)
    if options.plot:
        plot(rows, options.plot)
    print(as_json(rows, **_about()) if options.json else table(rows))
    return 1 if any(row.summary.failed for row in rows) else 0


def _rows(options: argparse.Namespace, plan: "Plan") -> "Iterator[Row]":
    from gemma4_compile.bench import at_url, matrix

    if options.url:
        name = options.models[0] if options.models else at_url.model_at(options.url, options.api_key)
        yield from matrix.measure_url(options.url, name, options.vocabulary, plan, options.api_key)
        return
    for model in ["e"] if options.demo else options.models:
        yield from matrix.measure(_subject(options, plan, model), plan)


def _plan(options: argparse.Namespace) -> "Plan":
    from gemma4_compile import EngineConfig
    from gemma4_compile.bench.matrix import Plan
    from gemma4_compile.bench.workloads import Arrivals, workload

    at_a_time: list[int | None] = [int(n) for n in options.concurrency.split(",") if n] or [None]
    rates: list[float | None] = [float(rate) for rate in options.rate.split(",") if rate] or [None]
    names = options.workloads or ("quick" if options.demo else "one")
    return Plan(
        tuple(map(workload, names.split(","))), tuple(Arrivals(n, rate) for rate in rates for n in at_a_time),
        tuple(options.mtp.split(",")), options.speculative_tokens, tuple(peer for peer in options.against.split(",") if peer),
        options.repeats, options.agreement,
        EngineConfig(kv_dtype=options.kv_dtype, optimize=config_of(options)), options.vllm_command,
    )  # fmt: skip


def _subject(options: argparse.Namespace, plan: "Plan", name: str) -> "Subject":

    from gemma4_compile import demo_checkpoint
    from gemma4_compile.bench.matrix import Subject
    from gemma4_compile.demo import DEMO_NAMES, held_out_prompts
    from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
    from gemma4_compile.hf.loading import checkpoint, random_assistant, text_part

    options.model = name
    loaded, tokenizer = load_model(options, text_only=True)
    model = text_part(loaded).requires_grad_(False)
    if name in DEMO_NAMES:
        longest = max(load.given for load in plan.workloads)
        texts = held_out_prompts(tokenizer, 32, longest, longest)
        folder = demo_checkpoint(name)
        return Subject(f"demo {name}", model, folder / "target", texts, options.assistant or folder / "assistant")
    if tokenizer is not None:
        return Subject(name, model, checkpoint(name)[0], None, options.assistant)
    assistant = options.assistant
    if assistant is None and name in TEXT_CONFIGS and plan.mtp != ("off",):
        assistant = random_assistant(name, str(model.device), model.dtype)
    return Subject(name + (f", {options.layers} layers" if options.layers else ""), model, None, None, assistant)


def _about() -> dict[str, Any]:
    import torch
    import transformers

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    command = "gemma4-compile " + shlex.join(sys.argv[1:])
    return {"machine": machine, "torch": torch.__version__, "transformers": transformers.__version__, "command": command}
