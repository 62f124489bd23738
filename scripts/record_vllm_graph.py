"""Record the graph that vLLM hands to its backend, for tests that need no vLLM: tests/vllm/graphs/.

    VENV/bin/python scripts/record_vllm_graph.py e tests/vllm/graphs/0.32-e.json

with a CPU build of vLLM in VENV. The model is a cut of Gemma 4's config with random weights, so that a graph is small.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.vllm import host, small
from tests.vllm.recorded import encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=small.CONFIGS)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    os.environ |= {"VLLM_DISABLE_COMPILE_CACHE": "1", "GEMMA4_COMPILE_VLLM": "0"}

    import transformers
    import vllm
    from vllm.compilation.backends import VllmBackend

    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    call = VllmBackend.__call__

    def recorded(backend: Any, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        options.out.write_text(encode(graph.graph, versions))
        return call(backend, graph, inputs)

    VllmBackend.__call__ = recorded
    with tempfile.TemporaryDirectory() as folder:
        model = small.run(options.kind, Path(folder))
        host.run(model | {"out": f"{folder}/tokens.json", "dtype": "bfloat16", "mode": "piecewise"})


if __name__ == "__main__":
    main()
