"""A fusion of your own beside ours: the cap of the logits, tanh(logits / cap) * cap, as one op."""

import sys

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gemma4_compile import OptimizeConfig, demo_checkpoint
from gemma4_compile.inductor import Gemma4Pass
from gemma4_compile.passes import PatternPass, pipeline, prepare, run
from gemma4_compile.patterns.rewrite import Rewrite, same_dtype


def search(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def replace(logits: Tensor, cap: float) -> Tensor:
    return torch.ops.example.softcap(logits, cap)


softcap = torch.library.custom_op("example::softcap", search, mutates_args=())  # here your kernel would be
softcap.register_fake(lambda logits, cap: torch.empty_like(logits))
REWRITE = Rewrite("softcap", search, replace, lambda: {"logits": torch.randn(2, 8), "cap": 30.0}, same_dtype("logits"))


class WithOwnFusion(Gemma4Pass):
    def __call__(self, graph: torch.fx.Graph) -> None:
        *ours, lower = pipeline(self.enabled)
        self.records.append(run((*ours, PatternPass("softcap", lambda: (REWRITE,)), lower), graph))

    def uuid(self) -> str:
        return super().uuid() + "softcap 1"  # Inductor's cache asks for it: count up when the fusion changes


if __name__ == "__main__":
    prepare()
    name = sys.argv[1] if sys.argv[1:] else demo_checkpoint("e") / "target"
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").requires_grad_(False)
    passes = WithOwnFusion(OptimizeConfig())
    compiled = torch.compile(model, options={"pre_grad_custom_pass": passes, "fx_graph_cache": False})  # so that they run
    ids = torch.arange(3, 19)[None]
    print(f"largest difference of logits: {(compiled(ids).logits - model(ids).logits).abs().max():.1e}")
    for fusion in ("qkv_norm_rope", "softcap"):
        print(fusion, "sites:", len(passes.records[0].matched(fusion)))
