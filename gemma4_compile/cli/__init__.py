"""gemma4-compile: the command line. Results go to stdout, the rest to stderr; exit codes 0, 1 (failed), 2 (usage)."""

import argparse
import os
import sys
from collections.abc import Sequence

from gemma4_compile import __version__
from gemma4_compile.torchrun import RanksError, launched_ranks

from .bench import add_bench
from .compiled import add_compiled
from .serve import SERVING, add_serving
from .server import add_server
from .vllm import add_vllm


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
        from gemma4_compile.hf.parallel import leave

        leave()
    return code


def _check_ranks(options: argparse.Namespace) -> None:
    if (ranks := launched_ranks()) > 1 and options.command not in SERVING:
        raise ValueError(f"{options.command} runs on one rank, got {ranks}; start it without torchrun")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gemma4-compile", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")

    add_compiled(commands)
    add_serving(commands)
    add_server(commands)
    add_bench(commands)
    add_vllm(commands)
    return parser
