"""apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2) <-> gemma4::rope(x, cos, sin)

And of image patches, whose positions are two: apply_multidimensional_rope <-> gemma4::rope_2d(x, cos, sin)"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import apply_multidimensional_rope, apply_rotary_pos_emb

from .capture import capture
from .rewrite import Rewrite
from .template import Match, Template, value_of

HALF = 37  # stands for head_dim / 2 in the capture


def hf(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2)


def replace(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    return torch.ops.gemma4.rope(x, cos, sin)


def replace_2d(x: Tensor, cos: Tensor, sin: Tensor, half: int, part: int) -> Tensor:
    return torch.ops.gemma4.rope_2d(x, cos, sin)


def inputs_2d() -> dict[str, Any]:
    return inputs() | {"half": 4, "part": 8}


def inputs() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 4, 16), "cos": torch.randn(2, 3, 16), "sin": torch.randn(2, 3, 16), "half": 8}


def guard(match: Match) -> str | None:
    x, half = value_of(match.binding["x"]), match.binding["half"]
    if x is None or x.dim() != 4:
        return "x must be [batch, tokens, heads, head_dim]"
    return None if x.shape[-1] == 2 * half else f"rotates at {half}, not at half of head_dim {x.shape[-1]}"


def guard_2d(match: Match) -> str | None:
    x, half, part = value_of(match.binding["x"]), match.binding["half"], match.binding["part"]
    if x is None or x.dim() != 4:
        return "x must be [batch, tokens, heads, head_dim]"
    if x.shape[-1] != 2 * part or part != 2 * half:
        return f"rotates parts of {part} at {half}, not two halves of head_dim {x.shape[-1]} at theirs"
    return None


@cache
def captured_2d() -> Template:
    positions = torch.zeros(2, 3, 2, dtype=torch.int64)  # of which only the number of dimensions is asked
    x, cos, sin = torch.randn(2, 3, 4, 4 * HALF), torch.randn(2, 3, 4 * HALF), torch.randn(2, 3, 4 * HALF)

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return apply_multidimensional_rope(x, cos, sin, positions)

    literals = {"half": HALF, "part": 2 * HALF}
    return capture(rotate, {"x": x, "cos": cos, "sin": sin}, literals, source=apply_multidimensional_rope)


@cache
def captured() -> Template:
    x, cos, sin = torch.randn(2, 3, 4, 2 * HALF), torch.randn(2, 3, 2 * HALF), torch.randn(2, 3, 2 * HALF)
    return capture(hf, {"x": x, "cos": cos, "sin": sin}, {"half": HALF}, source=apply_rotary_pos_emb)


@cache
def rewrites() -> tuple[Rewrite, ...]:
    return (
        Rewrite("rope_2d", captured_2d(), replace_2d, inputs_2d, guard_2d),  # first: its parts look like ropes
        Rewrite("rope", captured(), replace, inputs, guard),
    )
