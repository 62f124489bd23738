"""gemma4-compile generate and chat: an Engine on the command line. Text goes to stdout as it comes, the rest to stderr."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_compile.torchrun import launched_rank

from .common import DEMO_PROMPT, add_common, config_of, load_model
from .engines import add_engine, speculative_of

if TYPE_CHECKING:
    from gemma4_compile.runtime.engine import Engine
    from gemma4_compile.runtime.outputs import RequestOutput
    from gemma4_compile.runtime.sampling_params import SamplingParams


SERVING = ("generate", "chat", "serve")  # which also run under torchrun


def add_serving(commands: Any) -> None:
    """Add both commands to the parser's."""
    generate = commands.add_parser(
        "generate", help="an engine continues prompts", usage="%(prog)s [--demo | MODEL] [options] [PROMPT ...] [-f FILE ...]"
    )
    generate.add_argument(
        "words", nargs="*", metavar="MODEL PROMPT",
        help='a model as in `report` ("e", "moe", a checkpoint folder or hub id, ...), then prompts; with --demo prompts alone',
    )  # fmt: skip
    generate.add_argument(
        "--demo", action="store_true", help="the embedded demo checkpoint, and a prompt for it if there is none"
    )
    generate.add_argument("-f", "--file", action="append", default=[], metavar="FILE", help="its text is a prompt; - for stdin")
    generate.set_defaults(func=_generate)
    chat = commands.add_parser("chat", help="talk with a model; without a chat template it continues the text")
    chat.add_argument("model", nargs="?", default="e", help='default: the demo checkpoint "e"')
    chat.set_defaults(func=_chat)
    for parser in (generate, chat):
        parser.add_argument("--max-tokens", type=int, default=128, help="new tokens of each answer (default: %(default)s)")
        parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
        parser.add_argument("--top-k", type=int, default=0, help="of the k likeliest tokens; 0 for all (default)")
        parser.add_argument("--top-p", type=float, default=1.0, help="of the likeliest tokens that reach this (default: 1)")
        parser.add_argument("--seed", type=int, help="the same text again")
        parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
        add_engine(parser)
        add_common(parser)


def _params(options: argparse.Namespace) -> "SamplingParams":
    from gemma4_compile import SamplingParams

    return SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        seed=options.seed, stop=options.stop,
    )  # fmt: skip


def _engine(options: argparse.Namespace) -> "Engine":
    from gemma4_compile import Engine, EngineConfig

    config = EngineConfig(  # before loading: wrong values must not cost its time
        max_model_len=options.max_model_len, kv_dtype=options.kv_dtype, progress=sys.stderr.isatty(),
        optimize=config_of(options), max_requests=16, capture_at_start=False,
    )  # fmt: skip
    speculative = speculative_of(options)
    model, tokenizer = load_model(options, text_only=True)
    engine = Engine(model, config, tokenizer, speculative=speculative)
    if engine.tokenizer is None:
        raise ValueError(f"text needs a tokenizer, got none in {options.model}; use a checkpoint folder with one")
    return engine


def _generate(options: argparse.Namespace) -> int:
    params = _params(options)  # wrong values must not cost the time of loading
    options.model, prompts = ("e", options.words) if options.demo else (options.words[:1], options.words[1:])
    if not options.model:
        raise ValueError("generate needs a model, got none; name one, or use --demo")
    options.model = options.model if options.demo else options.model[0]
    if launched_rank():
        return _run_worker(options)
    prompts = [*prompts, *map(_text_of, options.file)]
    if not prompts and options.demo:
        prompts = [DEMO_PROMPT]
    if not prompts:
        raise ValueError("generate needs a prompt, got none; give a text, or -f FILE")
    engine = _engine(options)
    start = time.perf_counter()
    outputs = _stream(engine, prompts, params, quiet=options.json)
    seconds = time.perf_counter() - start
    engine.close()
    if options.json:
        print(json.dumps([_as_dict(output) for output in outputs]))
    tokens = sum(len(output.token_ids) for output in outputs)
    print(f"{tokens} tokens in {seconds:.2f} s on {engine.runner.device}; {_times(outputs)}", file=sys.stderr)
    if engine.assistant is not None:
        print(_acceptance(engine), file=sys.stderr)
    failed = [output.error for output in outputs if output.error]
    for error in failed:
        print(f"gemma4-compile: {error}", file=sys.stderr)
    return 1 if failed else 0


def _run_worker(options: argparse.Namespace) -> int:
    """Another rank than the one that reads and prints."""
    _engine(options).run_worker()
    return 0


def _stream(engine: "Engine", prompts: list[str], params: "SamplingParams", quiet: bool) -> "list[RequestOutput]":
    """All prompts at a time; printed one after the other, the first of those that are not complete as it comes."""
    texts: dict[str, list[str]] = {engine.add_request(prompt, params): [] for prompt in prompts}
    outputs: dict[str, Any] = {}
    order = list(texts)
    current = 0

    def show() -> None:
        nonlocal current
        while current < len(order):
            name = order[current]
            if not quiet:
                print("".join(texts[name]), end="", flush=True)
            texts[name].clear()
            if name not in outputs:
                return
            if not quiet:
                print("\n" if current + 1 < len(order) else "", flush=True)
            current += 1

    while len(outputs) < len(order):
        for chunk in engine.step():
            texts[chunk.request_id].append(chunk.text)
            if chunk.output is not None:
                outputs[chunk.request_id] = chunk.output
        show()
    return [outputs[name] for name in order]


def _chat(options: argparse.Namespace) -> int:
    if options.json:
        raise ValueError("chat prints text as it comes, got --json; use generate")
    params = _params(options)
    if launched_rank():
        return _run_worker(options)
    engine = _engine(options)
    has_template = bool(getattr(engine.tokenizer, "chat_template", None))
    what = "" if has_template else " This model has no chat template: it continues the text."
    print(f"An empty line or Ctrl-D ends, /reset begins anew.{what}", file=sys.stderr)
    messages: list[dict[str, str]] = []
    text = ""
    for line in _lines():
        if line == "/reset":
            messages, text = [], ""
            continue
        messages.append({"role": "user", "content": line})
        text += line
        said = ""
        try:
            for chunk in engine.stream(messages if has_template else text, params):
                said += chunk.text
                print(chunk.text, end="", flush=True)
                if chunk.output is not None and chunk.output.error:
                    print(f"gemma4-compile: {chunk.output.error}", file=sys.stderr)
        except ValueError as error:  # too long, most of all: what was said stays, the user may go on or begin anew
            print(f"gemma4-compile: {error}; /reset begins anew", file=sys.stderr)
            messages.pop()
            text = text[: -len(line)]
            continue
        print()
        messages.append({"role": "assistant", "content": said})
        text += said + "\n"
    engine.close()
    return 0


def _lines() -> Iterable[str]:
    """What the user says, until an empty line or the end."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield line


def _text_of(name: str) -> str:
    return sys.stdin.read() if name == "-" else Path(name).read_text()


def _acceptance(engine: "Engine") -> str:
    metrics = engine.metrics
    drafted, accepted = metrics.draft_tokens, metrics.accepted_draft_tokens
    if not drafted:
        return "no drafts verified"
    at = metrics.accepted_draft_tokens_at
    shares = " ".join(f"{at.get(place, 0) / count:.0%}" for place, count in sorted(metrics.draft_tokens_at.items()))
    return (
        f"{accepted} of {drafted} drafts accepted ({accepted / drafted:.0%}; by place {shares}), "
        f"{metrics.output_tokens} tokens in {metrics.steps} steps"
    )


def _times(outputs: "list[RequestOutput]") -> str:
    metrics = [output.metrics for output in outputs]
    ttft = [m.ttft for m in metrics if m.ttft is not None]
    tpot = [m.tpot for m in metrics if m.tpot is not None]
    mean = [f"{name} {1e3 * sum(times) / len(times):.1f} ms" for name, times in (("TTFT", ttft), ("TPOT", tpot)) if times]
    return ", ".join(mean) or "no tokens"


def _as_dict(output: "RequestOutput") -> dict[str, Any]:
    times = {name: getattr(output.metrics, name) for name in ("ttft", "tpot", "queue_time")}
    return {
        "text": output.text, "token_ids": output.token_ids, "finish_reason": output.finish_reason,
        "prompt_token_ids": output.prompt_token_ids, "error": output.error,
        "metrics": dataclasses.asdict(output.metrics) | times,
    }  # fmt: skip
