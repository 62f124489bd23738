"""Arguments of an Engine that several commands share."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma4_compile.runtime.speculative.config import SpeculativeConfig
    from gemma4_compile.runtime.speculative.length import SpeculativeTokens


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Length, assistant, keys and values."""
    parser.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt and answer together")
    parser.add_argument("--mtp", action="store_true", help="draft with the demo checkpoint's own assistant")
    parser.add_argument("--assistant", metavar="PATH", help="draft with this assistant, a folder or hub id")
    parser.add_argument(
        "--speculative-tokens", default="3", metavar="K",
        help="drafts of a step (default: 3), by running requests as in 1:4,16:2,64:0, or 'adaptive'",
    )  # fmt: skip
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="default: the weights'")


def speculative_of(options: argparse.Namespace) -> "SpeculativeConfig | None":
    """With the assistant that is asked for, if one is. Raises ValueError for --mtp with a model that has none here."""
    from gemma4_compile import SpeculativeConfig, demo_checkpoint
    from gemma4_compile.demo import DEMO_NAMES

    found = SpeculativeConfig(options.assistant or "", _drafts(options.speculative_tokens))
    if options.assistant or not options.mtp:
        return found if options.assistant else None
    if options.model not in DEMO_NAMES:
        raise ValueError(f"--mtp knows the assistants of the demo checkpoints, got {options.model}; give --assistant PATH")
    return dataclasses.replace(found, assistant=demo_checkpoint(options.model) / "assistant")


def _drafts(given: str) -> "SpeculativeTokens":
    try:
        if ":" in given:
            return {int(requests): int(drafts) for requests, drafts in (pair.split(":") for pair in given.split(","))}
        return int(given)
    except ValueError:
        return given  # "adaptive", or what an engine refuses
