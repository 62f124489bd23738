"""Serve several prompts at a time: continuous batching, sampling parameters of each request, tokens as they come.

python examples/engine.py [MODEL] [--max-tokens N]            MODEL: a checkpoint folder or hub id; else the demo's
"""

import argparse

from gemma4_compile import Engine, EngineConfig, SamplingParams, demo_checkpoint

PROMPTS = ["import os\nimport sys\n", "def read(path):\n    with open(", "class Queue:\n    def put(self, item):"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=demo_checkpoint("e") / "target")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    engine = Engine(options.model, EngineConfig(max_model_len=512, device=options.device))
    greedy = SamplingParams(max_tokens=options.max_tokens)
    drawn = SamplingParams(max_tokens=options.max_tokens, temperature=0.8, top_p=0.95, seed=1)
    for output in engine.generate(PROMPTS, [greedy, drawn, greedy]):
        print(f"{output.finish_reason}, {len(output.token_ids)} tokens, TTFT {output.metrics.ttft:.3f} s: {output.text!r}")
    for chunk in engine.stream(PROMPTS[0], greedy):
        print(chunk.text, end="", flush=True)
    print(f"\n{engine.metrics.output_tokens} tokens in {engine.metrics.steps} steps")


if __name__ == "__main__":
    main()
