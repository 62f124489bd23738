"""ple_tail, ple_tail_norm: the per-layer input at the end of a layer, with its two small matrix products.

Source: Gemma4TextDecoderLayer.forward (transformers), the hidden_size_per_layer_input branch:
    y = per_layer_projection(gelu_tanh(per_layer_input_gate(hidden)) * per_layer_input)
    hidden = (hidden + post_per_layer_input_norm(y)) * layer_scalar
and, in the `_norm` form, the norm that reads the result next. hidden [..., H], per_layer_input [..., P].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .feed_forward_tail import scale_by
from .library import expect, fresh, register
from .rms_norm import normalize


def ple_tail_reference(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    _check("ple_tail", hidden, per_layer_input, gate_weight, projection_weight, norm_weight)
    gated = F.gelu(F.linear(hidden, gate_weight), approximate="tanh") * per_layer_input
    return scale_by(hidden + normalize(F.linear(gated, projection_weight), norm_weight, eps), layer_scalar)


def ple_tail_norm_reference(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check("ple_tail_norm", hidden, per_layer_input, gate_weight, projection_weight, norm_weight, next_weight)
    hidden = ple_tail_reference(hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, eps)
    return hidden, normalize(hidden, next_weight, eps)


def _check(op: str, hidden: Tensor, per_layer_input: Tensor, gate: Tensor, projection: Tensor, *norms: Tensor) -> None:
    h, p = hidden.shape[-1], per_layer_input.shape[-1]
    expect(
        f"{op}: per_layer_input must be [..., P] for hidden [..., H]",
        per_layer_input.shape[:-1],
        hidden.shape[:-1],
        "pass this layer's slice",
    )
    expect(f"{op}: gate_weight must be [P, H]", gate.shape, (p, h), "pass per_layer_input_gate.weight")
    expect(f"{op}: projection_weight must be [H, P]", projection.shape, (h, p), "pass per_layer_projection.weight")
    for weight in norms:
        expect(f"{op}: each norm weight must be [H]", weight.shape, (h,), "pass this layer's weights")


def launch_ple_tail(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    return ple_tail_reference(hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, eps)


def launch_ple_tail_norm(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return ple_tail_norm_reference(
        hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, next_weight, eps
    )


def _ple_tail_fake(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    _check("ple_tail", hidden, per_layer_input, gate_weight, projection_weight, norm_weight)
    return fresh(hidden)


def _ple_tail_norm_fake(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check("ple_tail_norm", hidden, per_layer_input, gate_weight, projection_weight, norm_weight, next_weight)
    return fresh(hidden), fresh(hidden)


register(
    "ple_tail(Tensor hidden, Tensor per_layer_input, Tensor gate_weight, Tensor projection_weight, Tensor norm_weight,"
    " Tensor? layer_scalar, float eps) -> Tensor",
    reference=ple_tail_reference,
    launch=launch_ple_tail,
    fake=_ple_tail_fake,
)
register(
    "ple_tail_norm(Tensor hidden, Tensor per_layer_input, Tensor gate_weight, Tensor projection_weight,"
    " Tensor norm_weight, Tensor? layer_scalar, Tensor next_weight, float eps) -> (Tensor hidden, Tensor normed)",
    reference=ple_tail_norm_reference,
    launch=launch_ple_tail_norm,
    fake=_ple_tail_norm_fake,
)


def ple_tail(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    eps: float,
) -> Tensor:
    """(hidden + norm(linear(gelu_tanh(linear(hidden, gate)) * per_layer_input, projection), norm)) [* layer_scalar].

    hidden             [..., H]  fp32, fp16 or bf16
    per_layer_input    [..., P]  any strides: a slice [:, :, i, :] is read in place
    gate_weight        [P, H]
    projection_weight  [H, P]
    norm_weight        [H]
    layer_scalar       [1] or None
    returns            [..., H], contiguous
    """
    return torch.ops.gemma4.ple_tail(
        hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, eps
    )


def ple_tail_norm(
    hidden: Tensor,
    per_layer_input: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    norm_weight: Tensor,
    layer_scalar: Tensor | None,
    next_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """hidden as ple_tail gives it, and normed = norm(hidden, next_weight).

    next_weight  [H], the norm that reads hidden next
    returns      hidden, normed  [..., H], contiguous
    """
    return torch.ops.gemma4.ple_tail_norm(
        hidden, per_layer_input, gate_weight, projection_weight, norm_weight, layer_scalar, next_weight, eps
    )
