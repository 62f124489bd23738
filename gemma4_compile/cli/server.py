"""gemma4-compile serve: an OpenAI-compatible server. What it says goes to stderr."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_compile.torchrun import launched_rank

from .common import add_common, config_of, load_model
from .engines import add_engine, speculative_of

if TYPE_CHECKING:
    from gemma4_compile.runtime.engine import Engine
    from gemma4_compile.serve.config import ServeConfig

API_KEY_VARIABLE = "GEMMA4_COMPILE_API_KEY"


def add_server(commands: Any) -> None:
    """Add the command to the parser's."""
    serve = commands.add_parser("serve", help="an OpenAI-compatible server", usage="%(prog)s [--demo | MODEL] [options]")
    serve.add_argument("model", nargs="?", help='a model as in `generate`: "e", "moe", a checkpoint folder or hub id')
    serve.add_argument("--demo", action="store_true", help="the embedded demo checkpoint; it has no chat template of its own")
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s, which only this machine can reach")
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    serve.add_argument(
        "--api-key", metavar="KEY", help=f"clients must send it; better in {API_KEY_VARIABLE}, where ps shows none"
    )
    serve.add_argument("--served-model-name", metavar="NAME", help="what clients ask for (default: MODEL)")
    serve.add_argument("--tokenizer", metavar="PATH", help="of this folder, where the model has none")
    serve.add_argument("--chat-template", metavar="FILE", help="Jinja, instead of the checkpoint's own")
    serve.add_argument("--max-requests", type=int, default=256, metavar="N", help="that run at a time (default: %(default)s)")
    serve.add_argument("--max-waiting", type=int, default=1024, metavar="N", help="beyond those, 429 (default: %(default)s)")
    serve.add_argument("--max-body-bytes", type=int, default=4 * 2**20, metavar="N", help="of a request (default: %(default)s)")
    serve.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="for running requests after SIGTERM (default: %(default)s)",
    )
    serve.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="may call from a browser; repeatable"
    )
    serve.add_argument("--no-access-log", action="store_true", help="no line for each request")
    serve.add_argument("--images", action="store_true", help="messages may have images; larger bodies with --max-body-bytes")
    serve.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add_engine(serve)
    add_common(serve)
    serve.set_defaults(func=_serve)


def _serve(options: argparse.Namespace) -> int:
    if options.demo == (options.model is not None):
        raise ValueError("serve needs one model, got " + ("two" if options.demo else "none") + "; name one, or use --demo")
    options.model = options.model or ("vision" if options.images else "e")
    config = _config(options)  # wrong values must not cost the time of loading
    if launched_rank():
        _engine(options).run_worker()
        return 0
    from gemma4_compile import AsyncEngine
    from gemma4_compile.serve.server import serve

    print(f"gemma4-compile: loading {options.model}", file=sys.stderr, flush=True)
    with _engine(options) as engine:
        running = AsyncEngine(engine)
        try:
            serve(running, config, lambda url: print(f"gemma4-compile: {config.model} at {url}", file=sys.stderr, flush=True))
        finally:
            running.close()
    return 0


def _config(options: argparse.Namespace) -> "ServeConfig":
    try:
        from gemma4_compile.serve.config import ServeConfig
        from gemma4_compile.serve.templates import PLAIN
    except ImportError as error:
        raise ImportError(f"serve needs an extra, got no {error.name}; pip install 'gemma4-compile[serve]'") from None
    from gemma4_compile.demo import DEMO_NAMES

    template = Path(options.chat_template).read_text() if options.chat_template else None
    return ServeConfig(
        options.served_model_name or options.model, options.host, options.port,
        options.api_key or os.environ.get(API_KEY_VARIABLE) or None, options.max_waiting, options.drain_seconds,
        options.max_body_bytes, cors_origins=tuple(options.cors_origin),
        chat_template=template or (PLAIN if options.model in DEMO_NAMES else None), access_log=not options.no_access_log,
    )  # fmt: skip


def _engine(options: argparse.Namespace) -> "Engine":

    from gemma4_compile import Engine, EngineConfig
    from gemma4_compile.hf.loading import tokenizer_of

    config = EngineConfig(
        max_model_len=options.max_model_len, kv_dtype=options.kv_dtype, progress=sys.stderr.isatty(),
        optimize=config_of(options), max_requests=options.max_requests, chat=False,
    )  # fmt: skip
    speculative = speculative_of(options)
    if options.images:
        import torch

        from gemma4_compile import demo_checkpoint
        from gemma4_compile.demo import VISION_DEMO

        folder = demo_checkpoint(VISION_DEMO) / "target" if options.model == VISION_DEMO else options.model
        dtype = getattr(torch, options.dtype) if options.dtype else None
        with_images = replace(config, text_only=False, device=options.device, dtype=dtype)
        tokenizer = None if options.tokenizer is None else tokenizer_of(options.tokenizer)
        return Engine(folder, with_images, tokenizer, speculative=speculative)
    model, tokenizer = load_model(options, text_only=True)
    if options.tokenizer is not None:
        tokenizer = tokenizer_of(options.tokenizer)
    return Engine(model, config, tokenizer, speculative=speculative)
