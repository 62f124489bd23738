"""Write the page that shows each kernel of a decode step, with the lines of the model that it computes.

python examples/inspect_a_step.py [--out DIR]                 then open DIR/report.html
"""

import argparse
import tempfile
from collections import Counter

from transformers import AutoModelForCausalLM

import gemma4_compile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=gemma4_compile.demo_checkpoint("e") / "target")
    parser.add_argument("--out", help="new or empty folder; a temporary one unless given")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device)
    out = options.out or tempfile.mkdtemp(prefix="inspect-")
    found = gemma4_compile.inspect(model, out=out, context=64)  # compare="plain" compiles the step without our passes too
    print(f"{len(found.ours.kernels)} kernels a step: {dict(Counter(kernel.kind for kernel in found.ours.kernels))}")
    for kernel in found.ours.of_layer(3):
        print(f"  {kernel.kind:10} {kernel.name:40} {kernel.module}")
    print(f"the page: {out}/report.html")


if __name__ == "__main__":
    main()
