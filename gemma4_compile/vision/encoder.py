"""The encoder of a vision tower where Hugging Face calls it: model(...) and model.generate(...) with images.

Only the encoder is compiled: what stands around it strips padding by a mask, whose size no graph knows. Images are a padded
batch here, as Hugging Face makes them; an Engine packs them instead, see tower.py.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from gemma4_compile.backend import Backend
from gemma4_compile.dynamo import first_line, own_code, switched_off
from gemma4_compile.geometry import vision_geometry
from gemma4_compile.patterns import qkv_norm_rope

# Inputs whose number of images and patches varies.
_VARYING = ("inputs_embeds", "attention_mask", "pixel_position_ids")


def fusions_in(config: Any, enabled: frozenset[str]) -> frozenset[str]:
    """Of the enabled fusions, those of a tower, by its config: where its linears are clipped, that of q, k and v alone, which
    clamps too. Bounds stand on both sides of each product, and Inductor clamps in its kernel of the norm or of gelu, which a
    fused one would part into three. Two layers are 31 calls without a fusion and 29 with this one; with `feed_forward_tail`
    beside it 30, with `geglu` 33, with `post_attention_norms` 35, and with `linear`, whose products of so many rows are
    cuBLAS's as well, 29."""
    return enabled & {qkv_norm_rope.FUSION.name} if getattr(config, "use_clipped_linears", False) else enabled


class EncoderCalls:
    """Stands where nn.Module.compile() puts its callable of a Gemma4VisionEncoder.

    backend   says which fusions are enabled; `records` has those of the encoder

    `falls_back` is whether what does not compile runs plain from then on; else the error comes out. `eager_reason` says why
    calls run uncompiled, empty if they do not; `note` what is left alone in a graph, and why."""

    def __init__(self, encoder: Any, backend: Backend):
        self._encoder = encoder
        self.backend = replace(backend, records=[], enabled=fusions_in(encoder.config, backend.enabled))
        self._signature = inspect.signature(encoder.forward)
        self.geometry = vision_geometry(encoder.config)
        self.falls_back, self.eager_reason = True, ""
        clipped = getattr(encoder.config, "use_clipped_linears", False)
        self.note = "its linears are clipped (use_clipped_linears): Inductor clamps in its own norms" if clipped else ""

        def step(inputs: dict[str, Any]) -> Any:
            return encoder._call_impl(**inputs)

        self._step = torch.compile(own_code(step), backend=self.backend, fullgraph=True, dynamic=None)

    @property
    def records(self) -> list[Any]:
        return self.backend.records

    def install(self) -> None:
        self._encoder._compiled_call_impl = self

    def uninstall(self) -> None:
        self._encoder.__dict__.pop("_compiled_call_impl", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoder = self._encoder
        if torch.compiler.is_compiling() or switched_off() or self.eager_reason or torch.is_grad_enabled():
            return encoder._call_impl(*args, **kwargs)
        bound = self._signature.bind(*args, **kwargs).arguments
        inputs = dict(bound) | bound.get("kwargs", {})
        inputs.pop("kwargs", None)
        for name in _VARYING:
            if isinstance(value := inputs.get(name), Tensor):
                for dim in (0, 1):
                    if value.shape[dim] > 1:
                        torch._dynamo.maybe_mark_dynamic(value, dim)
        try:
            return self._step(inputs)
        except TorchDynamoException as error:
            if not self.falls_back:
                raise
            found = encoder._call_impl(*args, **kwargs)  # a call that was wrong raises Hugging Face's own error here
            self.eager_reason = first_line(error)
            warnings.warn(f"gemma4_compile leaves the vision encoder plain: {self.eager_reason}", stacklevel=2)
            return found
