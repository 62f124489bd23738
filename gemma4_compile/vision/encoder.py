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

# Inputs whose number of images and patches varies.
_VARYING = ("inputs_embeds", "attention_mask", "pixel_position_ids")


class EncoderCalls:
    """Stands where nn.Module.compile() puts its callable of a Gemma4VisionEncoder.

    backend   says which fusions are enabled; `records` has those of the encoder

    `broken` says why calls run uncompiled, empty if they do not; `note` what is left alone in a graph, and why."""

    def __init__(self, encoder: Any, backend: Backend):
        self._encoder, self.backend = encoder, replace(backend, records=[])
        self._signature = inspect.signature(encoder.forward)
        self.broken = ""
        clipped = getattr(encoder.config, "use_clipped_linears", False)
        self.note = "products with clipped inputs and outputs stay with Inductor (use_clipped_linears)" if clipped else ""

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
        if torch.compiler.is_compiling() or switched_off() or self.broken or torch.is_grad_enabled():
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
            found = encoder._call_impl(*args, **kwargs)  # a call that was wrong raises Hugging Face's own error here
            self.broken = first_line(error)
            warnings.warn(f"gemma4_compile leaves the vision encoder plain: {self.broken}", stacklevel=2)
            return found
