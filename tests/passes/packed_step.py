"""A tiny model's packed step under the passes alone, and its memory: what the tests of fusions around pages share."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gemma4_compile.geometry import geometry
from gemma4_compile.packed.compile import make_step, own_attention
from gemma4_compile.packed.inputs import STEP_INPUTS, PlainKV, Request, varying_dim
from tests.models import DEVICE, tiny
from tests.passes.harness import Run, compile_passes

_REQUESTS = 3  # the most of a step: memory is no dynamic shape


class PackedStep:
    """One model, compiled with the fusions in `enabled` and no code generation, or run as it is (None).

    Each call is a step over memory of its own."""

    def __init__(self, kind: str, enabled: Collection[str] | None, dtype: torch.dtype = torch.float32):
        self.model = tiny(kind, dtype).requires_grad_(False)
        self.geometry, self.dtype = geometry(self.model.config), dtype
        step = make_step(self.model, self.geometry)
        self.run = Run(step, [], []) if enabled is None else compile_passes(step, enabled)

    def __call__(self, batch: Sequence[Request]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the keys and values that were written."""
        kv = PlainKV(self.geometry, _REQUESTS, 32, self.dtype, DEVICE)
        inputs = {name: tensor.clone() for name, tensor in kv.inputs(batch).items()}
        for name in STEP_INPUTS:
            torch._dynamo.mark_dynamic(inputs[name], varying_dim(name))
        with own_attention(self.model), torch.no_grad():
            logits = self.run.call(inputs)
        return logits, {name: tensor for name, tensor in inputs.items() if name.startswith(("keys.", "values."))}
