"""A fusion of your own beside ours: the cap of the logits, tanh(logits / cap) * cap, as one op."""

import sys
from functools import cache

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gemma4_compile import OptimizeConfig, demo_checkpoint, optimize, report
from gemma4_compile.passes import Fusion
from gemma4_compile.patterns.rewrite import Rewrite, same_dtype


def search(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def replace(logits: Tensor, cap: float) -> Tensor:
    return torch.ops.example.softcap(logits, cap)


@cache
def rewrites() -> tuple[Rewrite, ...]:
    return (Rewrite("softcap", search, replace, lambda: {"logits": torch.randn(2, 8), "cap": 30.0}, same_dtype("logits")),)


softcap = torch.library.custom_op("example::softcap", search, mutates_args=())  # here your kernel would be
softcap.register_fake(lambda logits, cap: torch.empty_like(logits))
SOFTCAP = Fusion("softcap", "the cap of the logits", sites=lambda geometry: ("model",), rewrites=rewrites)

if __name__ == "__main__":
    name = sys.argv[1] if sys.argv[1:] else demo_checkpoint("e") / "target"
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").requires_grad_(False)
    ids = torch.arange(3, 19)[None]
    expected = model(ids).logits
    optimize(model, OptimizeConfig(fusions=(SOFTCAP,)))
    print(f"largest difference of logits: {(model(ids).logits - expected).abs().max():.1e}")
    print(report(model))
