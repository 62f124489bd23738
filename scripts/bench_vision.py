"""Images: the encoder alone, whole requests, and the first token, against plain Hugging Face and the FLOP floor.

    python scripts/bench_vision.py [--model E2B] [--out FILE]
    python scripts/bench_vision.py --quick --device cpu          # few layers, few small images: does it run?

Random weights (norms 1, matrices N(0, 0.02)) at real size, random pictures of --side pixels. The vision tower is that of
--config, a checkpoint's config.json, or of transformers' Gemma4VisionConfig: 16 layers of 768. Reported:

    encoder   images a second: Hugging Face one by one, and as padded batches of --batch; ours, packed; and the floor, the
              products' FLOP at the device's measured rate. Pixels are ready: preprocessing is timed by itself
    requests  seconds of --prompts prompts of --images images and --new new tokens: the engine, and the same engine with
              Hugging Face's tower one image at a time. Prompts are prepared before
    first     ms to the first token of one prompt with one image: the engine, and Hugging Face's generate() with its forward
              compiled (torch.compile), medians
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4ImageProcessorPil, Gemma4VisionConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from gemma4_compile import Engine, EngineConfig, SamplingParams
from gemma4_compile.bench.rates import product_rate
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
from gemma4_compile.hf.loading import cut, randomize
from gemma4_compile.runtime.vision.spans import Patches, PreparedPrompt

ROUNDS = 5
SMALL_RATE = 1e10  # FLOP/s that stand for the device's where it is no GPU


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="E2B", choices=[name for name in TEXT_CONFIGS if name != "12B"])
    parser.add_argument("--config", type=Path, help="config.json of a checkpoint, for its vision part")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--images", type=int, default=6, help="of a prompt")
    parser.add_argument("--side", type=int, default=480, help="pixels")
    parser.add_argument("--new", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=32, help="images of Hugging Face's batches")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few layers and images")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.images, args.side, args.new, args.batch = 3, 2, 96, 4, 4
    return args


def model_of(args: argparse.Namespace) -> Any:
    text: dict[str, Any] = dict(TEXT_CONFIGS[args.model])
    vision = json.loads(args.config.read_text())["vision_config"] if args.config else Gemma4VisionConfig().to_dict()
    if args.quick:
        text = cut(text, 4) | {"hidden_size": 256, "intermediate_size": 512}
        vision |= {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
        vision |= {"num_key_value_heads": 2}
    for name in ("model_type", "transformers_version", "architectures"):
        vision.pop(name, None)
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    return randomize(lambda: Gemma4ForConditionalGeneration(config), args.device, dtype, 0).requires_grad_(False)


def seconds(run: Callable[[], Any], device: str, rounds: int = ROUNDS) -> float:
    """Median, behind one that nobody counts."""
    found = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


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


def main() -> None:
    args = parse()
    model, processor, device = model_of(args), Gemma4ImageProcessorPil(), args.device
    chooser = np.random.default_rng(0)
    count = args.prompts * args.images
    pictures = [chooser.integers(0, 256, (args.side, args.side, 3), dtype=np.uint8) for _ in range(count)]
    config = EngineConfig(text_only=False, max_model_len=8192 if device == "cuda" else 2048, image_cache_bytes=1 << 33)
    if args.quick:
        config = EngineConfig(text_only=False, max_model_len=1024, kv_bytes=1 << 26, max_requests=8, max_batched_tokens=1024)
    engine = Engine(model, config, processor=processor)
    assert engine.runner.images is not None
    encoder, marks = engine.runner.images.encoder, model.config.image_token_id
    start = time.perf_counter()
    prompts = []
    for index in range(args.prompts):
        mine = pictures[index * args.images : (index + 1) * args.images]
        before, after = chooser.integers(100, 10_000, (2, 20)).tolist()
        ids = [2, *before, *[marks] * args.images, *after]
        prompts.append(engine.prepare({"prompt_token_ids": ids, "images": mine}))
    preparing = time.perf_counter() - start
    images = [span.image for prompt in prompts for span in prompt.images]
    plain = HuggingFace(model, device)
    few = images[: min(count, 64)]

    rate = product_rate() if device == "cuda" else SMALL_RATE
    report: dict[str, Any] = {
        "model": args.model, "vision": args.config.name if args.config else "Gemma4VisionConfig()", "prompts": args.prompts,
        "images": args.images, "side": args.side, "new": args.new, "soft tokens": images[0].tokens,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
        "transformers": transformers.__version__, "images prepared a second, one thread": round(count / preparing, 1),
    }  # fmt: skip
    took = {
        "one by one": seconds(partial(plain.encode, few), device, 2) / len(few),
        "batched": seconds(partial(plain.encode, few, args.batch), device, 2) / len(few),
        "ours": seconds(partial(encoder.encode, images), device, 2) / count,
        "ours, one image": seconds(partial(encoder.encode, images[:1]), device),
        "one image": seconds(partial(plain.encode, images[:1]), device),
        "floor": flop(model, images) / rate / count,
    }
    report["encoder, images a second"] = {name: round(1 / each, 1) for name, each in took.items()}
    packed_one, other = encoder.encode(images[:1])[0].float(), plain.encode(images[:1])[0].float()
    report["encoder, rms difference of rms"] = float((packed_one - other).square().mean().sqrt() / other.square().mean().sqrt())
    print(json.dumps(report, indent=1), flush=True)

    params = SamplingParams(max_tokens=args.new, ignore_eos=True)

    def serve(asked: list[PreparedPrompt], sampling: SamplingParams = params) -> None:
        encoder.forget()
        engine.runner.pages.reset()
        outputs = engine.generate(asked, sampling)
        assert not any(output.error for output in outputs), outputs[0].error

    whole = {"engine": seconds(partial(serve, prompts), device, 2)}
    packed = encoder.encode
    encoder.encode = plain.encode  # type: ignore[method-assign]
    whole["engine, one image at a time"] = seconds(partial(serve, prompts), device, 2)
    encoder.encode = packed  # type: ignore[method-assign]
    report["requests, s"] = {name: round(each, 3) for name, each in whole.items()}

    (alone,) = (PreparedPrompt(p.tokens[: p.images[0].end + 1], p.images[:1]) for p in prompts[:1])
    one = SamplingParams(max_tokens=1)
    first = {"engine": seconds(partial(serve, [alone], one), device)}
    compiled = torch.compile(model.forward)
    row = torch.tensor([alone.tokens], device=device)
    span = alone.images[0].image
    given = {
        "pixel_values": torch.from_numpy(span.numbers()).flatten(0, 1)[None].to(device),
        "image_position_ids": torch.from_numpy(span.positions).flatten(0, 1)[None].to(device),
    }

    @torch.no_grad()
    def plainly(forward: Callable[..., Any]) -> int:
        return int(forward(input_ids=row, **given, logits_to_keep=1).logits[0, -1].argmax())

    first["Hugging Face"] = seconds(partial(plainly, model.forward), device)
    first["Hugging Face, compiled"] = seconds(partial(plainly, compiled), device)
    report["first token, ms"] = {name: round(1000 * each, 2) for name, each in first.items()}
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
