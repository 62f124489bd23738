"""Images: the encoder alone, whole requests, and the first token, against plain Hugging Face and the FLOP floor.

    python scripts/bench_vision.py [--model E2B] [--parts encoder,requests,first] [--out FILE]
    python scripts/bench_vision.py --quick --device cpu          # few layers, few small images: does it run?

Random weights (norms 1, matrices N(0, 0.02)) at real size, random pictures of --side pixels. The vision tower is the released
model's: the products of E2B's and E4B's are clipped (`use_clipped_linears`), here at three times the rms of what passes for a
random picture. Reported:

    encoder   images a second: Hugging Face one by one, and as padded batches of --batch; ours, packed; and the floor, the
              products' FLOP at the device's measured rate. Pixels are ready: preprocessing is timed by itself. And how far
              features are apart, of their rms: bf16 of random weights is far from fp32 for Hugging Face itself, since each
              head's softmax has nearly one winner
    requests  seconds of --prompts prompts of --images images and --new new tokens: the engine, and the same engine with
              Hugging Face's tower one image at a time. Prompts are prepared before
    first     ms to the first token of one prompt with one image: the engine, and Hugging Face's generate() with its forward
              compiled (torch.compile), medians
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import Gemma4ImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile import Engine, EngineConfig, SamplingParams
from gemma4_compile.bench.rates import product_rate
from gemma4_compile.hf.checkpoints import VISION_CONFIGS
from gemma4_compile.hf.loading import random_multimodal
from gemma4_compile.runtime.vision.spans import Patches, PreparedPrompt

ROUNDS = 5
PARTS = ("encoder", "requests", "first")
SMALL_RATE = 1e10  # FLOP/s that stand for the device's where it is no GPU


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="E2B", help=f"{', '.join(VISION_CONFIGS)}, or a config.json")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--images", type=int, default=6, help="of a prompt")
    parser.add_argument("--side", type=int, default=480, help="pixels")
    parser.add_argument("--new", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=32, help="images of Hugging Face's batches")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS, help="comma-separated")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few layers and images")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts takes {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if args.quick:
        args.prompts, args.images, args.side, args.new, args.batch = 3, 2, 96, 4, 4
    return args


def model_of(args: argparse.Namespace) -> Any:
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    small: dict[str, Any] = {}
    if args.quick:
        small = {"layers": 4, "hidden_size": 256, "intermediate_size": 512} | {
            "vision": {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2,
                       "num_key_value_heads": 2, "head_dim": 64},
        }  # fmt: skip
    return random_multimodal(args.model, device=args.device, dtype=dtype, **small).requires_grad_(False)


def seconds(run: Callable[[], Any], device: str, rounds: int = ROUNDS, warm_up: bool = True) -> float:
    """Median, behind one that nobody counts."""
    if warm_up:
        run()
    found = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class HuggingFace:
    """A model's own tower over patches."""

    def __init__(self, model: Any, device: str):
        self.model, self.device = model, device

    @torch.no_grad()
    def encode(self, images: Sequence[Patches], batch: int = 1) -> list[Tensor]:
        """In padded batches of so many."""
        found: list[Tensor] = []
        for first in range(0, len(images), batch):
            part = images[first : first + batch]
            values = [torch.from_numpy(image.numbers()).flatten(0, 1) for image in part]
            places = [torch.from_numpy(image.positions).flatten(0, 1) for image in part]
            pixels = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
            positions = torch.nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)
            features = self.model.model.get_image_features(pixels.to(self.device), positions.to(self.device), return_dict=True)
            found += features.pooler_output
        return found


def flop(model: Any, images: Sequence[Patches]) -> float:
    """Of the tower's products: each weight twice a patch, and attention's two."""
    tower = model.model.vision_tower
    config = tower.config
    weights = sum(p.numel() for name, p in tower.named_parameters() if p.dim() == 2 and "table" not in name)
    inner = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    counts = [image.values.shape[0] * image.values.shape[1] for image in images]
    return float(sum(2 * n * weights + 4 * n * n * inner for n in counts))


class Bench:
    """One model, its engine, and all prompts prepared."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, args.device
        self.model, chooser = model_of(args), np.random.default_rng(0)
        shape = (args.images, args.side, args.side, 3)
        asked = []
        for _ in range(args.prompts):
            before, after = chooser.integers(100, 10_000, (2, 20)).tolist()
            ids = [2, *before, *[self.model.config.image_token_id] * args.images, *after]
            asked.append({"prompt_token_ids": ids, "images": list(chooser.integers(0, 256, shape, dtype=np.uint8))})
        config = EngineConfig(text_only=False, max_model_len=8192, image_cache_bytes=1 << 33, memory_fraction=0.6)
        if args.quick:
            config = EngineConfig(
                text_only=False, max_model_len=1024, kv_bytes=1 << 28, max_requests=8, max_batched_tokens=1024
            )
        self.engine = Engine(self.model, config, processor=Gemma4ImageProcessorPil())
        assert self.engine.runner.images is not None
        self.encoder, self.plain = self.engine.runner.images.encoder, HuggingFace(self.model, self.device)
        threads = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            self.prompts = list(pool.map(self.engine.prepare, asked))
            preparing = time.perf_counter() - start
        self.images = [span.image for prompt in self.prompts for span in prompt.images]
        vision = self.model.config.vision_config
        self.about = {
            "model": Path(args.model).name, "tower": f"{vision.num_hidden_layers} layers of {vision.hidden_size}",
            "clipped": vision.use_clipped_linears,
            "prompts": args.prompts, "images": args.images, "side": args.side, "new": args.new,
            "soft tokens": self.images[0].tokens,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "torch": torch.__version__, "transformers": transformers.__version__,
            f"images prepared a second, {threads} threads": round(len(self.images) / preparing, 1),
        }  # fmt: skip

    def encoder_alone(self) -> dict[str, Any]:
        rate = product_rate() if self.device == "cuda" else SMALL_RATE
        plain, encoder, images = self.plain, self.encoder, self.images
        few, one, count = images[:64], images[:1], len(images)
        took = {
            "one by one": seconds(partial(plain.encode, few), self.device, 2) / len(few),
            "batched": seconds(partial(plain.encode, few, self.args.batch), self.device, 2) / len(few),
            "ours": seconds(partial(encoder.encode, images), self.device, 2) / count,
            "ours, one image": seconds(partial(encoder.encode, one), self.device),
            "one image": seconds(partial(plain.encode, one), self.device),
            "floor": flop(self.model, images) / rate / count,
        }
        ours, theirs = encoder.encode(one)[0], plain.encode(one)[0]
        exact = HuggingFace(in_fp32(self.model), self.device).encode(one)[0]
        return {
            "encoder, images a second": {name: round(1 / each, 1) for name, each in took.items()},
            "encoder, rms difference of rms": {
                "ours to fp32": apart(ours, exact),
                "Hugging Face to fp32": apart(theirs, exact),
                "ours to Hugging Face": apart(ours, theirs),
            },
        }

    def whole_requests(self) -> dict[str, Any]:
        params = SamplingParams(max_tokens=self.args.new, ignore_eos=True)
        found, packed = {}, self.encoder.encode
        for name, encode in (("engine", packed), ("engine, one image at a time", self.plain.encode)):
            self.encoder.encode = encode  # type: ignore[method-assign]
            self.serve(self.prompts[:8], params)
            found[name] = round(seconds(partial(self.serve, self.prompts, params), self.device, 1, warm_up=False), 3)
        self.encoder.encode = packed  # type: ignore[method-assign]
        return {"requests, s": found}

    def serve(self, asked: list[PreparedPrompt], sampling: SamplingParams) -> None:
        """With no image encoded before, and no key or value."""
        self.encoder.forget()
        self.engine.runner.pages.reset()
        outputs = self.engine.generate(asked, sampling)
        assert not any(output.error for output in outputs), outputs[0].error

    def first_token(self) -> dict[str, Any]:
        prompt = self.prompts[0]
        alone = PreparedPrompt(prompt.tokens[: prompt.images[0].end + 1], prompt.images[:1])
        first = {"engine": seconds(partial(self.serve, [alone], SamplingParams(max_tokens=1)), self.device)}
        span = alone.images[0].image
        given = {
            "input_ids": torch.tensor([alone.tokens], device=self.device),
            "pixel_values": torch.from_numpy(span.numbers()).flatten(0, 1)[None].to(self.device),
            "image_position_ids": torch.from_numpy(span.positions).flatten(0, 1)[None].to(self.device),
        }

        @torch.no_grad()
        def plainly(forward: Callable[..., Any]) -> int:
            return int(forward(**given, logits_to_keep=1).logits[0, -1].argmax())

        first["Hugging Face"] = seconds(partial(plainly, self.model.forward), self.device)
        print(first, flush=True)  # compiling takes minutes
        first["Hugging Face, compiled"] = seconds(partial(plainly, torch.compile(self.model.forward)), self.device)
        return {"first token, ms": {name: round(1000 * each, 2) for name, each in first.items()}}


def in_fp32(model: Any) -> Any:
    """A copy whose vision part is; the text part is the model's own, for which a GPU may have no room twice."""
    text = (model.model.language_model, model.lm_head)
    found = copy.deepcopy(model, {id(part): part for part in text})
    for part in (found.model.vision_tower, found.model.embed_vision):
        part.float()
    return found


def apart(one: Tensor, other: Tensor) -> float:
    difference, size = (one.float() - other.float()).square().mean().sqrt(), other.float().square().mean().sqrt()
    return round(float(difference / size), 4)


def main() -> None:
    args = parse()
    bench = Bench(args)
    run = {"encoder": bench.encoder_alone, "requests": bench.whole_requests, "first": bench.first_token}
    report = dict(bench.about)
    for part in args.parts:
        found = run[part]()
        print(json.dumps(found, indent=1), flush=True)
        report |= found
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
