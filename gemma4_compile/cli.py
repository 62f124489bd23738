"""gemma4-compile: the command line. Results go to stdout, the rest to stderr; exit codes 0, 1 (failed), 2 (usage)."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from . import __version__
from .cli_serve import SERVING, add_serving
from .torchrun import RanksError, launched_rank, launched_ranks

DEMO_PROMPT = 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _check_ranks(options)
        code = options.func(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"gemma4-compile: {error}", file=sys.stderr)
        return 1
    except RanksError as error:
        print(f"gemma4-compile: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # a kernel may wait for another rank for ever, and the interpreter's own end for the kernel
    if launched_ranks() > 1:
        from .parallel import leave

        leave()
    return code


def _check_ranks(options: argparse.Namespace) -> None:
    if (ranks := launched_ranks()) > 1 and options.command not in SERVING:
        raise ValueError(f"{options.command} runs on one rank, got {ranks}; start it without torchrun")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gemma4-compile", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")

    demo = commands.add_parser("demo", help="a compiled Gemma 4 writes text, then reports its fusions")
    demo.add_argument("--model", default="e", help='"e" or "moe" for an embedded demo checkpoint, or a checkpoint folder')
    demo.add_argument("--prompt", default=DEMO_PROMPT)
    demo.add_argument("--max-tokens", type=int, default=120, help="new tokens to generate (default: %(default)s)")
    demo.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=3, help="of the sampling (default: %(default)s)")
    add_common(demo)
    demo.set_defaults(func=_demo)

    add_serving(commands, add_common, DEMO_PROMPT)

    report = commands.add_parser("report", help="compile a model and print which fusions matched")
    add_model(report)
    add_common(report)
    report.set_defaults(func=_report)

    inspect = commands.add_parser("inspect", help="show each kernel of a step, from the model's line to the code, as a page")
    add_model(inspect)
    inspect.add_argument("--out", required=True, metavar="DIR", help="new or empty folder for the page and the dumps")
    inspect.add_argument("--compare", choices=("plain",), help="compile and measure the step without our passes beside it")
    inspect.add_argument("--layer", type=int, metavar="N", help="list the kernels of this layer (default: one of each kind)")
    inspect.add_argument("--step", choices=("decode", "prefill"), default="decode", help="default: %(default)s")
    inspect.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    inspect.add_argument("--context", type=int, default=1024, help="tokens: cached, or of the prefill (default: %(default)s)")
    inspect.add_argument("--cache", choices=("static", "dynamic"), default="static", help="of a decode (default: %(default)s)")
    inspect.add_argument("--force", action="store_true", help="replace what an earlier inspection left in DIR")
    add_common(inspect)
    inspect.set_defaults(func=_inspect)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that `load_model` reads, but for those that all commands share."""
    parser.add_argument(
        "model",
        help='"e", "moe", a checkpoint folder or hub id; with random weights: a config.json, E2B, E4B, 26B-A4B or 31B',
    )
    parser.add_argument("--layers", type=int, metavar="K", help="cut a bare config to so many layers")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's; bfloat16 for a config"
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Device, fusions, output form."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--disable", default="", metavar="NAME,...", help="fusions to switch off")
    parser.add_argument("--enable", default="", metavar="NAME,...", help="fusions to switch on that are off by default")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _demo(options: argparse.Namespace) -> int:
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {options.max_tokens}; use 120")
    if options.temperature < 0:
        raise ValueError(f"--temperature must be 0 (greedy) or more, got {options.temperature}; use 0.8")
    import torch
    from transformers import TextStreamer

    from . import report

    model, tokenizer = _optimized(options, dtype=None)
    if tokenizer is None:
        raise ValueError(f"the demo needs a tokenizer, got none in {options.model}; use `report` for models without")
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    sampling = {"do_sample": options.temperature > 0} | ({"temperature": options.temperature} if options.temperature else {})
    streamer = None if options.json else TextStreamer(tokenizer, skip_special_tokens=True)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)  # compiles, so that the text below comes in one go
        torch.manual_seed(options.seed)
        start = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=options.max_tokens, streamer=streamer, **sampling)
    seconds = time.perf_counter() - start
    tokens = output.shape[1] - inputs["input_ids"].shape[1]
    if options.json:
        text = tokenizer.decode(output[0], skip_special_tokens=True)
        print(json.dumps({"text": text, "tokens": tokens, "seconds": seconds, "report": as_dict(report(model))}))
    else:
        print(f"\n{tokens} tokens in {seconds:.2f} s on {model.device}\n\n{report(model)}")
    return 0


def _report(options: argparse.Namespace) -> int:
    import torch

    from . import report

    model, _ = _optimized(options, dtype=getattr(torch, options.dtype) if options.dtype else None)
    prompt = torch.randint(3, model.config.get_text_config().vocab_size, (1, 8), device=model.device)
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=2, do_sample=False)
    print(json.dumps(as_dict(report(model))) if options.json else report(model))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from . import inspect
    from .inspection.files import check_folder
    from .inspection.tables import check_layer, only_layer, summary

    check_folder(Path(options.out), options.force)  # before the model is loaded
    model, _ = load_model(options, getattr(torch, options.dtype) if options.dtype else None)
    check_layer(options.layer, model.config.get_text_config().num_hidden_layers)
    name = options.model + (f" cut to {options.layers} layers" if options.layers else "")
    found = inspect(
        model,
        out=options.out,
        step=options.step,
        batch=options.batch,
        context=options.context,
        static_cache=options.cache == "static",
        compare=options.compare,
        config=config_of(options),
        force=options.force,
        name=name,
    )
    if options.json:
        print(json.dumps(asdict(found if options.layer is None else only_layer(found, options.layer))))
        return 0
    print(summary(found, options.layer))
    files = sorted(path for path in Path(options.out).rglob("*") if path.is_file())
    print("\n" + "\n".join(f"{path.stat().st_size:>10,} B  {path}" for path in files))
    return 0


def _optimized(options: argparse.Namespace, dtype: Any) -> tuple[Any, Any]:
    from . import optimize

    model, tokenizer = load_model(options, dtype)
    return optimize(model, config_of(options)), tokenizer


def config_of(options: argparse.Namespace) -> Any:
    """The OptimizeConfig of --enable and --disable."""
    from . import OptimizeConfig

    def names(text: str) -> tuple[str, ...]:
        return tuple(name for name in text.split(",") if name)

    return OptimizeConfig(enable=names(options.enable), disable=names(options.disable), progress=launched_rank() == 0)


def load_model(options: argparse.Namespace, dtype: Any, text_only: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer or None) of what the command line names; `text_only` leaves towers out. Raises ValueError for what
    cannot be loaded."""
    import torch

    from . import demo_checkpoint
    from .checkpoints import TEXT_CONFIGS
    from .demo import DEMO_NAMES
    from .loading import checkpoint, load, random_model, tokenizer_of

    config_of(options)  # a wrong name must not cost the time of loading
    if launched_ranks() > 1:
        from . import parallel

        folder = demo_checkpoint(options.model) / "target" if options.model in DEMO_NAMES else checkpoint(options.model)[0]
        return parallel.load(folder, dtype=dtype, device=options.device), tokenizer_of(folder)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can see, got none; use --device cpu")
    if options.model.endswith(".json") or options.model in TEXT_CONFIGS:
        return random_model(options.model, options.layers, device, dtype or torch.bfloat16), None
    if getattr(options, "layers", None):
        raise ValueError(f"--layers cuts a bare config, got {options.model}; leave it out")
    folder = demo_checkpoint(options.model) / "target" if options.model in DEMO_NAMES else options.model
    return load(folder, device, dtype, text_only)


def as_dict(report: Any) -> dict[str, Any]:
    """A Report as plain JSON data."""
    from dataclasses import asdict

    return asdict(report)
