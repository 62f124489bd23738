"""Draft tokens accepted on held-out text: the Engine beside transformers' assisted generation.

    python scripts/acceptance.py [--names e,moe] [--prompts 32] [--out FILE]

Greedy, fp32, the demo checkpoints. The measure of all three is that of gemma4_compile/demo/evaluate.py: new tokens a
verification, less the one that is free. Also sampled text, by each kind of verification.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile import Engine, EngineConfig, SamplingParams, SpeculativeConfig, demo_checkpoint
from gemma4_compile.demo import held_out_prompts
from gemma4_compile.demo.evaluate import accepted_drafts_hf
from gemma4_compile.hf.assistant import load_assistant
from gemma4_compile.hf.loading import load
from gemma4_compile.runtime.speculative.config import VERIFICATIONS

DRAFTS = 3


def served(
    folder: Path,
    prompts: list[list[int]],
    new_tokens: int,
    device: str,
    verification: str = "block",
    **params: Any,
) -> dict[str, float]:
    """Tokens a round less one, and rounds, of an engine that verifies so."""
    config = EngineConfig(max_requests=16, dtype="float32", device=device, progress=False, capture_at_start=False)
    engine = Engine(
        folder / "target",
        config,
        speculative=SpeculativeConfig(folder / "assistant", DRAFTS, verification),
    )
    outputs = engine.generate(prompts, SamplingParams(max_tokens=new_tokens, ignore_eos=True, **params))
    tokens = sum(len(output.token_ids) - 1 for output in outputs)  # a prompt's first token needs no round
    rounds = tokens - engine.metrics.accepted_draft_tokens
    return {"mean": tokens / rounds - 1, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="e,moe")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.names.split(","):
        folder = demo_checkpoint(name)
        target, tokenizer = load(folder / "target", arguments.device, torch.float32)
        assistant: Any = load_assistant(folder / "assistant", dtype=torch.float32)
        prompts = held_out_prompts(tokenizer, arguments.prompts, arguments.length, arguments.length)
        row: dict[str, Any] = {"name": name, "hugging_face": accepted_drafts_hf(
            target, assistant.to(arguments.device).eval(), prompts, arguments.new_tokens, DRAFTS
        )}  # fmt: skip
        row["engine"] = served(folder, prompts, arguments.new_tokens, arguments.device)
        for temperature in (0.7, 1.0):
            for verification in VERIFICATIONS:
                row[f"{temperature}_{verification}"] = served(
                    folder, prompts, arguments.new_tokens, arguments.device, verification, temperature=temperature, seed=0
                )
        rows.append(row)
        print(name, *(f"{key} {value['mean']:.3f}" for key, value in row.items() if key != "name"), sep="  ", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"drafts": DRAFTS, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
