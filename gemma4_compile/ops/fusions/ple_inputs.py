"""ple_inputs, ple_combine: the per-layer inputs of all layers, from the token table and the projected embedding.

Source: Gemma4TextModel.get_per_layer_inputs, project_per_layer_inputs and Gemma4TextScaledWordEmbedding.forward
(transformers). ple_inputs gathers the token rows itself; ple_combine is given them. L layers of width P.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.ops.dependent import alone, start
from gemma4_compile.ops.examples import Draw
from gemma4_compile.ops.library import UNFUSED, expect, fresh, jit, op, pinned, power_of_two, rounded, tl
from gemma4_compile.ops.plans import ple_inputs_plan
from gemma4_compile.ops.rms_norm import normalize


def _check_combine(op: str, token_inputs: Tensor, projection: Tensor, norm_weight: Tensor) -> None:
    *tokens, layers, width = token_inputs.shape
    expect(
        op, "norm_weight must be [P] for token_inputs [..., L, P]", norm_weight.shape, (width,),
        "pass per_layer_projection_norm.weight",
    )  # fmt: skip
    expect(
        op, "projection must be [..., L * P]", projection.shape, (*tokens, layers * width),
        "pass the output of per_layer_model_projection",
    )  # fmt: skip


def _check_inputs(op: str, input_ids: Tensor, table: Tensor, projection: Tensor, norm_weight: Tensor) -> None:
    expect(
        op, "projection must be [..., L * P] for input_ids [...] and table [V, L * P]", projection.shape,
        (*input_ids.shape, table.shape[1]), "pass the output of per_layer_model_projection",
    )  # fmt: skip
    expect(
        op, "the table's width must be a multiple of norm_weight's", table.shape[1] % norm_weight.shape[0], 0,
        "pass per_layer_projection_norm.weight",
    )  # fmt: skip


@jit(do_not_specialize=["rows"])  # one compilation for all token counts
def _ple_inputs_kernel(
    ids_ptr, token_ptr, embed_scale_ptr, projection_ptr, weight_ptr, out_ptr, rows,
    projection_scale, combine_scale, eps,
    LAYERS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    start(DEPENDENT)
    eps = pinned(eps)
    projection_scale = pinned(projection_scale)
    combine_scale = pinned(combine_scale)
    dtype = out_ptr.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)

    projection = tl.load(projection_ptr + row * WIDTH + column, inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, column < WIDTH, other=0.0).to(tl.float32)
    source = row
    if ids_ptr is not None:  # the table has a row of all layers for each token; its offsets pass 2**31
        source = tl.load(ids_ptr + row // LAYERS, row < rows, other=0) * LAYERS + row % LAYERS
    token = tl.load(token_ptr + source * WIDTH + column, inside, other=0.0).to(tl.float32)
    if ids_ptr is not None:
        token = rounded(token * tl.load(embed_scale_ptr).to(dtype).to(tl.float32), dtype)

    projection = rounded(projection * projection_scale, dtype)
    scale = tl.rsqrt(tl.sum(projection * projection, axis=1)[:, None] / WIDTH + eps)
    projection = rounded(projection * scale * weight, dtype)
    out = rounded(projection + token, dtype) * combine_scale

    tl.store(out_ptr + row * WIDTH + column, out, inside)


def _launch(
    out: Tensor, input_ids: Tensor | None, token_rows: Tensor, embed_scale: Tensor | None, projection: Tensor,
    norm_weight: Tensor, projection_scale: float, combine_scale: float, eps: float,
) -> Tensor:  # fmt: skip
    if out.numel():
        layers, width = out.shape[-2:]
        rows = out.numel() // width
        per_program, warps = ple_inputs_plan(rows)
        dependent, options = alone()
        _ple_inputs_kernel[(-(-rows // per_program),)](
            None if input_ids is None else input_ids.contiguous(), token_rows.contiguous(), embed_scale,
            projection.contiguous(), norm_weight.contiguous(), out, rows, projection_scale, combine_scale, eps,
            layers, width, power_of_two(width), per_program, dependent, num_warps=warps, **UNFUSED, **options,
        )  # fmt: skip
    return out


def _empty(input_ids: Tensor, table: Tensor, embed_scale: Tensor, projection: Tensor, norm_weight: Tensor, *_: float) -> Tensor:
    width = norm_weight.shape[0]
    return projection.new_empty((*input_ids.shape, table.shape[1] // width, width))


def _inputs_example(d: Draw) -> tuple[Any, ...]:
    s = d.sizes
    table = 0.02 * d.normal(s.vocabulary, s.layers * s.ple)
    scale = torch.tensor(s.ple**0.5, device=d.device)
    return d.ids(), table, scale, d.states(s.layers * s.ple), d.weight(s.ple), s.hidden**-0.5, 2**-0.5, d.eps


@op(launch=lambda *args: _launch(_empty(*args), *args), fake=_empty, check=_check_inputs, example=_inputs_example)
def ple_inputs(
    input_ids: Tensor, table: Tensor, embed_scale: Tensor, projection: Tensor, norm_weight: Tensor, projection_scale: float,
    combine_scale: float, eps: float,
) -> Tensor:  # fmt: skip
    """(norm(projection * projection_scale) + table[input_ids] * embed_scale) * combine_scale, layer by layer.

    input_ids    [B, T]         int64, each below V
    table        [V, L * P]     fp32, fp16 or bf16
    embed_scale  []             cast to table's dtype first
    projection   [B, T, L * P]  the linear's output
    norm_weight  [P]
    returns      [B, T, L, P]   projection's dtype, contiguous

    Raises ValueError for shapes that do not fit.
    """
    width = norm_weight.shape[0]
    token_inputs = F.embedding(input_ids, table) * embed_scale.to(table.dtype)
    token_inputs = token_inputs.reshape(*input_ids.shape, table.shape[1] // width, width)
    return ple_combine.reference(token_inputs, projection, norm_weight, projection_scale, combine_scale, eps)


def _combine_example(d: Draw) -> tuple[Any, ...]:
    s = d.sizes
    token_inputs = d.normal(d.batch, d.tokens, s.layers, s.ple)
    return token_inputs, d.states(s.layers * s.ple), d.weight(s.ple), s.hidden**-0.5, 2**-0.5, d.eps


@op(
    launch=lambda token_inputs, *rest: _launch(fresh(token_inputs), None, token_inputs, None, *rest),
    like="token_inputs",
    check=_check_combine,
    example=_combine_example,
)
def ple_combine(
    token_inputs: Tensor, projection: Tensor, norm_weight: Tensor, projection_scale: float, combine_scale: float, eps: float
) -> Tensor:
    """ple_inputs with the scaled token rows given.

    token_inputs  [B, T, L, P]   fp32, fp16 or bf16
    projection    [B, T, L * P]
    norm_weight   [P]
    returns       [B, T, L, P], contiguous

    Raises ValueError for shapes that do not fit.
    """
    projected = (projection * projection_scale).reshape(token_inputs.shape)
    return (normalize(projected, norm_weight, eps) + token_inputs) * combine_scale
