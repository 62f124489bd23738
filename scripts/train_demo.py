"""Train the demo checkpoints: on Python's own standard library, and on drawn pictures.

    python scripts/train_demo.py [--model e|moe|vision|all] [--steps N] [--device cuda|cpu] [--out DIR] [--smoke]

Writes OUT/<model>/target, OUT/<model>/assistant and OUT/<model>/metrics.json. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemma4_compile.demo import DEMO_NAMES, VISION_DEMO, demo_checkpoint, evaluate, held_out_prompts
from gemma4_compile.hf.assistant import load_assistant
from gemma4_compile.hf.loading import text_part
from scripts._demo_assistant import read_text, train_assistant
from scripts._demo_data import Batches, load_corpus, log, token_stream, train_tokenizer
from scripts._demo_models import DRAFTS, VOCAB, new_assistant, new_target
from scripts._demo_pictures import (
    PICTURE_VOCAB,
    TEXT,
    PictureBatches,
    answers_of,
    new_picture_model,
    picture_processor,
    picture_tokenizer,
    read_pictures,
    train_picture_model,
)
from scripts._demo_table import read_records, table, write_table
from scripts._demo_target import train_target

SEED = 20
PACKAGE = demo_checkpoint("e").parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*DEMO_NAMES, VISION_DEMO, "all"], default="all")
    parser.add_argument("--steps", type=int, default=2000, help="steps of a target; its assistant gets 2/5 of them")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--picture-steps", type=int, default=2800, help="of the vision target, 16 pictures each")
    parser.add_argument("--picture-rate", type=float, default=2e-3, help="its highest learning rate")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=PACKAGE, help="default: in the package")
    parser.add_argument("--stdlib", type=Path, help="folder of the sources to train on (default: this interpreter's)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile the target in training (cuda: yes)"
    )
    parser.add_argument("--stage", choices=["train", "measure", "both"], default="both", help="measure: files in --out")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps: does the script run to its end?")
    args = parser.parse_args()
    if args.compile is None:
        args.compile = args.device == "cuda"
    if args.smoke:
        args.steps, args.batch, args.length = 4, 2, 256
    return args


def save(model: Any, folder: Path) -> None:
    """bf16 safetensors; integer buffers (the token ordering) keep their type."""
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def measure(folder: Path, device: str, smoke: bool) -> dict[str, Any]:
    """Held-out loss and acceptance of the saved bf16 files, loaded as a user loads them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "target")
    target: Any = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.bfloat16)
    assistant: Any = load_assistant(folder / "assistant", dtype=torch.bfloat16)
    for model in (target, assistant):
        model.to(device).eval()
    count, new = (2, 16) if smoke else (32, 96)
    cut = held_out_prompts(tokenizer, 4 * count, 192, 300, seed=1)
    prompts = [prompt[:192] for prompt in cut]  # one length: they run as one batch
    first = prompts[:count]
    report: dict[str, Any] = {"held_out": evaluate.held_out_loss(target, tokenizer, max_windows=2 if smoke else None)}
    report["accepted"] = evaluate.accepted_drafts(target, assistant, first, new, DRAFTS)
    report["accepted_at_position_p"] = evaluate.accepted_drafts(target, assistant, first, new, DRAFTS, shift=0)
    report["accepted_in_first_8"] = evaluate.accepted_drafts(target, assistant, prompts, 8, DRAFTS)
    try:
        report["accepted_hf"] = evaluate.accepted_drafts_hf(target, assistant, prompts[:8], new, DRAFTS)
    except Exception as error:  # a version whose own assisted generation fails: say so in the record, keep the training
        report["accepted_hf"] = {"error": f"{type(error).__name__}: {error}"}
    for prompt in held_out_prompts(tokenizer, 5, 150, 250, seed=4):
        reply = evaluate.greedy(target, [prompt], new)[0]
        tail = "\n".join(tokenizer.decode(prompt[1:]).splitlines()[-8:])
        print(f"--- end of the prompt\n{tail}\n--- completion\n{tokenizer.decode(reply)}\n")
    return report


def machine(device: str) -> dict[str, str]:
    """Device and versions a number was made with."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"device": name, **versions, "transformers": transformers.__version__}


def train(name: str, args: argparse.Namespace, tokenizer: Any, streams: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Train one target and its assistant, and save both; returns the record of the training."""
    folder = args.out / name

    def batches(rows: int, seed: int) -> Batches:
        return Batches(*streams, rows, args.length, tokenizer.bos_token_id, args.device, seed)

    @torch.no_grad()
    def watch() -> float:
        with torch.autocast(args.device, dtype=torch.bfloat16):
            return evaluate.held_out_loss(target, tokenizer, max_windows=64)["loss"]

    target = new_target(name, SEED)
    label = f"{name} target"
    first = train_target(target, batches(args.batch, SEED), args.steps, args.rate, args.device, label, args.compile, watch)
    save(target, folder / "target")
    tokenizer.save_pretrained(folder / "target")
    frozen = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)  # bf16-rounded values
    assistant, steps = new_assistant(name, SEED), max(2, args.steps * 2 // 5)
    rows = max(1, args.batch // 2)
    seen = batches(rows, SEED + 1)
    second = train_assistant(
        frozen, assistant, lambda: read_text(frozen, seen), steps, args.rate, args.device, f"{name} assistant"
    )
    second["tokens"] = steps * seen.batch * seen.length
    save(assistant, folder / "assistant")
    count = {"target": target, "assistant": assistant}
    return {
        "parameters": {role: sum(p.numel() for p in model.parameters()) for role, model in count.items()},
        "training": {
            "target": first,
            "assistant": second,
            "batch": args.batch,
            "length": args.length,
            "rate": args.rate,
            **machine(args.device),
        },
    }


def train_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """Train the vision demo and its assistant, save both, and ask it of the held-out pictures."""
    folder, device = args.out / VISION_DEMO, args.device
    tokenizer, processor = picture_tokenizer(), picture_processor()
    steps, batch = (3, 2) if args.smoke else (args.picture_steps, 16)
    target = new_picture_model(tokenizer, SEED)
    first = train_picture_model(target, PictureBatches(tokenizer, processor, batch, 1), steps, args.picture_rate, device)
    save(target, folder / "target")
    tokenizer.save_pretrained(folder / "target")
    processor.save_pretrained(folder / "target")
    frozen = AutoModelForImageTextToText.from_pretrained(folder / "target", dtype=torch.float32).to(device).eval()
    assistant, seen = new_assistant(VISION_DEMO, SEED, {**TEXT, "vocab_size": PICTURE_VOCAB}), max(2, steps // 5)
    batches = PictureBatches(tokenizer, processor, batch, 2)
    second = train_assistant(
        text_part(frozen), assistant, lambda: read_pictures(frozen, batches, device), seen, args.rate, device,
        f"{VISION_DEMO} assistant",
    )  # fmt: skip
    save(assistant, folder / "assistant")
    count = {"target": target, "assistant": assistant}
    return {
        "model": VISION_DEMO,
        "parameters": {role: sum(p.numel() for p in model.parameters()) for role, model in count.items()},
        "training": {"target": first, "assistant": second, "batch": batch, "rate": args.picture_rate, **machine(device)},
        "measured": {"held_out_right": answers_of(folder / "target"), **machine("cpu")},
    }


def main() -> None:
    args = parse()
    if args.model in (VISION_DEMO, "all"):
        report = train_pictures(args)
        (args.out / VISION_DEMO / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2))
        if args.model == VISION_DEMO:
            return
    names = DEMO_NAMES if args.model == "all" else (args.model,)
    if args.stage != "measure":
        library, tests = load_corpus(args.stdlib, args.smoke)
        began = time.perf_counter()
        tokenizer = train_tokenizer(library + tests, VOCAB)
        streams = token_stream(tokenizer, library), token_stream(tokenizer, tests)
        corpus = {
            kind: {"files": len(texts), "bytes": sum(len(t.encode()) for t in texts), "tokens": len(stream)}
            for kind, texts, stream in zip(("library", "tests"), (library, tests), streams, strict=True)
        }
        log(f"corpus {corpus}, {time.perf_counter() - began:.0f} s")
        torch.backends.cuda.matmul.allow_tf32 = True
    for name in names:
        record = args.out / name / "metrics.json"
        if args.stage != "measure":
            report = {"model": name, "corpus": corpus, **train(name, args, tokenizer, streams)}
            record.write_text(json.dumps(report, indent=2) + "\n")
        if args.stage != "train":
            report = json.loads(record.read_text())
            report["measured"] = {**measure(args.out / name, args.device, args.smoke), **machine(args.device)}
            record.write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2))
    if args.stage != "train":
        print(table(read_records(args.out, names)))
        if args.out == PACKAGE:
            write_table(PACKAGE.parent.parent / "docs" / "demo.md", read_records(PACKAGE, DEMO_NAMES))


if __name__ == "__main__":
    main()
