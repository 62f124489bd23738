"""Speculative decoding with an assistant (multi-token prediction): the same greedy tokens in fewer steps.

python examples/mtp.py [MODEL ASSISTANT] [--max-tokens N]     folders or hub ids; else the demo's
"""

import argparse

from gemma4_compile import Engine, EngineConfig, SamplingParams, SpeculativeConfig, demo_checkpoint

PROMPT = 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=demo_checkpoint("e") / "target")
    parser.add_argument("assistant", nargs="?", default=demo_checkpoint("e") / "assistant")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    config = EngineConfig(max_model_len=512, device=options.device)
    engine = Engine(options.model, config, speculative=SpeculativeConfig(options.assistant, tokens=3))
    (output,) = engine.generate(PROMPT, SamplingParams(max_tokens=options.max_tokens))
    metrics = engine.metrics
    print(PROMPT + output.text)
    print(f"{metrics.output_tokens} tokens in {metrics.steps} steps: "
          f"{metrics.accepted_draft_tokens} of {metrics.draft_tokens} draft tokens accepted")  # fmt: skip


if __name__ == "__main__":
    main()
