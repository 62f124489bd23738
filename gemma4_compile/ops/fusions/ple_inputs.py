"""ple_inputs, ple_combine: the per-layer inputs of all layers, from the token table and the projected embedding.

Source: Gemma4TextModel.get_per_layer_inputs, project_per_layer_inputs and Gemma4TextScaledWordEmbedding.forward
(transformers). ple_inputs gathers the token rows itself; ple_combine is given them. L layers of width P.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.ops.library import UNFUSED, expect, fresh, jit, pinned, power_of_two, register, rounded, tl
from gemma4_compile.ops.plans import ple_inputs_plan
from gemma4_compile.ops.rms_norm import normalize


def ple_combine_reference(
    token_inputs: Tensor,
    projection: Tensor,
    norm_weight: Tensor,
    projection_scale: float,
    combine_scale: float,
    eps: float,
) -> Tensor:
    _check_combine(token_inputs, projection, norm_weight)
    projected = (projection * projection_scale).reshape(token_inputs.shape)
    return (normalize(projected, norm_weight, eps) + token_inputs) * combine_scale


def ple_inputs_reference(
    input_ids: Tensor,
    table: Tensor,
    embed_scale: Tensor,
    projection: Tensor,
    norm_weight: Tensor,
    projection_scale: float,
    combine_scale: float,
    eps: float,
) -> Tensor:
    _check_inputs(input_ids, table, projection, norm_weight)
    width = norm_weight.shape[0]
    token_inputs = F.embedding(input_ids, table) * embed_scale.to(table.dtype)
    token_inputs = token_inputs.reshape(*input_ids.shape, table.shape[1] // width, width)
    return ple_combine_reference(token_inputs, projection, norm_weight, projection_scale, combine_scale, eps)


def _check_combine(token_inputs: Tensor, projection: Tensor, norm_weight: Tensor) -> None:
    *tokens, layers, width = token_inputs.shape
    expect(
        "ple_combine",
        "norm_weight must be [P] for token_inputs [..., L, P]",
        norm_weight.shape,
        (width,),
        "pass per_layer_projection_norm.weight",
    )
    expect(
        "ple_combine",
        "projection must be [..., L * P]",
        projection.shape,
        (*tokens, layers * width),
        "pass the output of per_layer_model_projection",
    )


def _check_inputs(input_ids: Tensor, table: Tensor, projection: Tensor, norm_weight: Tensor) -> None:
    expect(
        "ple_inputs",
        "projection must be [..., L * P] for input_ids [...] and table [V, L * P]",
        projection.shape,
        (*input_ids.shape, table.shape[1]),
        "pass the output of per_layer_model_projection",
    )
    expect(
        "ple_inputs",
        "the table's width must be a multiple of norm_weight's",
        table.shape[1] % norm_weight.shape[0],
        0,
        "pass per_layer_projection_norm.weight",
    )


@jit(do_not_specialize=["rows"])  # one compilation for all token counts
def _ple_inputs_kernel(
    ids_ptr, token_ptr, embed_scale_ptr, projection_ptr, weight_ptr, out_ptr, rows,
    projection_scale, combine_scale, eps,
    LAYERS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
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


def launch_ple_combine(
    token_inputs: Tensor,
    projection: Tensor,
    norm_weight: Tensor,
    projection_scale: float,
    combine_scale: float,
    eps: float,
) -> Tensor:
    _check_combine(token_inputs, projection, norm_weight)
    out = fresh(token_inputs)
    _launch(None, token_inputs, None, projection, norm_weight, projection_scale, combine_scale, eps, out)
    return out


def launch_ple_inputs(
    input_ids: Tensor,
    table: Tensor,
    embed_scale: Tensor,
    projection: Tensor,
    norm_weight: Tensor,
    projection_scale: float,
    combine_scale: float,
    eps: float,
) -> Tensor:
    _check_inputs(input_ids, table, projection, norm_weight)
    out = _ple_inputs_fake(input_ids, table, embed_scale, projection, norm_weight, projection_scale, combine_scale, eps)
    _launch(input_ids, table, embed_scale, projection, norm_weight, projection_scale, combine_scale, eps, out)
    return out


def _launch(
    input_ids: Tensor | None,
    token_rows: Tensor,
    embed_scale: Tensor | None,
    projection: Tensor,
    norm_weight: Tensor,
    projection_scale: float,
    combine_scale: float,
    eps: float,
    out: Tensor,
) -> None:
    if not out.numel():
        return
    layers, width = out.shape[-2:]
    rows = out.numel() // width
    per_program, warps = ple_inputs_plan(rows)
    _ple_inputs_kernel[(-(-rows // per_program),)](
        None if input_ids is None else input_ids.contiguous(), token_rows.contiguous(), embed_scale,
        projection.contiguous(), norm_weight.contiguous(), out, rows, projection_scale, combine_scale, eps,
        layers, width, power_of_two(width), per_program, num_warps=warps, **UNFUSED,
    )  # fmt: skip


def _ple_combine_fake(
    token_inputs: Tensor,
    projection: Tensor,
    norm_weight: Tensor,
    projection_scale: float,
    combine_scale: float,
    eps: float,
) -> Tensor:
    _check_combine(token_inputs, projection, norm_weight)
    return fresh(token_inputs)


def _ple_inputs_fake(
    input_ids: Tensor,
    table: Tensor,
    embed_scale: Tensor,
    projection: Tensor,
    norm_weight: Tensor,
    projection_scale: float,
    combine_scale: float,
    eps: float,
) -> Tensor:
    _check_inputs(input_ids, table, projection, norm_weight)
    width = norm_weight.shape[0]
    return projection.new_empty((*input_ids.shape, table.shape[1] // width, width))


register(
    "ple_inputs(Tensor input_ids, Tensor table, Tensor embed_scale, Tensor projection, Tensor norm_weight,"
    " float projection_scale, float combine_scale, float eps) -> Tensor",
    reference=ple_inputs_reference,
    launch=launch_ple_inputs,
    fake=_ple_inputs_fake,
)
register(
    "ple_combine(Tensor token_inputs, Tensor projection, Tensor norm_weight, float projection_scale,"
    " float combine_scale, float eps) -> Tensor",
    reference=ple_combine_reference,
    launch=launch_ple_combine,
    fake=_ple_combine_fake,
)


def ple_inputs(
    input_ids: Tensor,
    table: Tensor,
    embed_scale: Tensor,
    projection: Tensor,
    norm_weight: Tensor,
    projection_scale: float,
    combine_scale: float,
    eps: float,
) -> Tensor:
    """(norm(projection * projection_scale) + table[input_ids] * embed_scale) * combine_scale, layer by layer.

    input_ids    [B, T]         int64, each below V
    table        [V, L * P]     fp32, fp16 or bf16
    embed_scale  []             cast to table's dtype first
    projection   [B, T, L * P]  the linear's output
    norm_weight  [P]
    returns      [B, T, L, P]   projection's dtype, contiguous
    """
    return torch.ops.gemma4.ple_inputs(
        input_ids, table, embed_scale, projection, norm_weight, projection_scale, combine_scale, eps
    )


def ple_combine(
    token_inputs: Tensor,
    projection: Tensor,
    norm_weight: Tensor,
    projection_scale: float,
    combine_scale: float,
    eps: float,
) -> Tensor:
    """ple_inputs with the scaled token rows given.

    token_inputs  [B, T, L, P]   fp32, fp16 or bf16
    projection    [B, T, L * P]
    norm_weight   [P]
    returns       [B, T, L, P], contiguous
    """
    return torch.ops.gemma4.ple_combine(token_inputs, projection, norm_weight, projection_scale, combine_scale, eps)
