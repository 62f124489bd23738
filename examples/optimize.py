"""Optimize a plain Hugging Face model in place, generate with it, and see which fusions matched.

python examples/optimize.py [MODEL] [--max-tokens N]          MODEL: a checkpoint folder or hub id; else the demo's
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gemma4_compile

PROMPT = 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=gemma4_compile.demo_checkpoint("e") / "target")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device)
    gemma4_compile.optimize(model)  # in place; compiles at the first call
    inputs = tokenizer(options.prompt, return_tensors="pt").to(options.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=options.max_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(gemma4_compile.report(model))
    gemma4_compile.restore(model)  # the plain model again


if __name__ == "__main__":
    main()
