"""Asks the vision demo checkpoint, divided between ranks, of held-out pictures; started under torchrun by test_images.py."""

import json

import torch

from gemma4_compile import Engine, EngineConfig, SamplingParams, demo_checkpoint
from gemma4_compile.demo import VISION_DEMO
from gemma4_compile.demo.pictures import QUESTION, held_out_pictures
from gemma4_compile.hf import parallel

PICTURES = 8


def main() -> None:
    torch.set_num_threads(1)
    config = EngineConfig(text_only=False, kv_bytes=1 << 24, max_requests=8, max_batched_tokens=256, dtype=torch.float32)
    asked = [
        [{"role": "user", "content": [{"type": "image", "image": drawn.image}, {"type": "text", "text": QUESTION}]}]
        for drawn in held_out_pictures()[:PICTURES]
    ]
    with Engine(demo_checkpoint(VISION_DEMO) / "target", config) as engine:
        outputs = engine.generate(asked, SamplingParams(max_tokens=8))
        if engine.is_driver:
            print(json.dumps([output.text for output in outputs]))
    parallel.leave()


if __name__ == "__main__":
    main()
