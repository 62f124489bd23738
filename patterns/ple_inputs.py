"""per-layer inputs: projection norm + token embeddings, combined for all layers at once      HF: Gemma4TextModel

get_per_layer_inputs and project_per_layer_inputs. The multimodal class gathers the token part outside of the text model; then
only the combining is left here."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_compile.geometry import WHOLE_MODEL

from .fusion import Fusion
from .rewrite import Rewrite, all_guards, one_element, same_dtype, same_shape, vectors_of_last_dim
from .template import Match, value_of

ops = torch.ops.gemma4


def search_gather(
    input_ids: Tensor, table: Tensor, embed_scale: Tensor, projection: Tensor, norm_weight: Tensor, projection_scale: float,
    combine_scale: float, eps: float, dtype: Any, padding: Any, b: Any, t: Any, layers: Any, width: Any,
) -> Tensor:  # fmt: skip
    # Positional as nn.Embedding passes them: padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse.
    embeds = F.embedding(input_ids, table, padding, None, 2.0, False, False) * embed_scale.to(dtype)
    token_inputs = embeds.reshape(b, t, layers, width)
    projected = (projection * projection_scale).reshape(b, t, layers, width)
    return (ops.rms_norm(projected, norm_weight, eps) + token_inputs) * combine_scale


def replace_gather(
    input_ids: Tensor, table: Tensor, embed_scale: Tensor, projection: Tensor, norm_weight: Tensor, projection_scale: float,
    combine_scale: float, eps: float, dtype: Any, padding: Any, b: Any, t: Any, layers: Any, width: Any,
) -> Tensor:  # fmt: skip
    return ops.ple_inputs(input_ids, table, embed_scale, projection, norm_weight, projection_scale, combine_scale, eps)


def search(
    token_inputs: Tensor, projection: Tensor, norm_weight: Tensor, projection_scale: float, combine_scale: float, eps: float,
    b: Any, t: Any, layers: Any, width: Any,
) -> Tensor:  # fmt: skip
    projected = (projection * projection_scale).reshape(b, t, layers, width)
    return (ops.rms_norm(projected, norm_weight, eps) + token_inputs) * combine_scale


def replace(
    token_inputs: Tensor, projection: Tensor, norm_weight: Tensor, projection_scale: float, combine_scale: float, eps: float,
    b: Any, t: Any, layers: Any, width: Any,
) -> Tensor:  # fmt: skip
    return ops.ple_combine(token_inputs, projection, norm_weight, projection_scale, combine_scale, eps)


def scaled_as_the_table(match: Match) -> str | None:
    """The op rounds the scale to the table's dtype."""
    table = value_of(match.binding["table"])
    wanted = match.binding["dtype"]
    return None if table is None or table.dtype == wanted else f"embed_scale is made {wanted}, the table is {table.dtype}"


def inputs(gather: bool) -> dict[str, Any]:
    shape = {"b": 2, "t": 3, "layers": 5, "width": 8}
    common = {
        "projection": torch.randn(2, 3, 40), "norm_weight": torch.rand(8) + 0.5, "projection_scale": 0.25,
        "combine_scale": 2.0**-0.5, "eps": 1e-6,
    }  # fmt: skip
    if not gather:
        return {"token_inputs": torch.randn(2, 3, 5, 8)} | common | shape
    tokens = {"input_ids": torch.randint(11, (2, 3)), "table": torch.randn(11, 40), "embed_scale": torch.tensor(8**0.5)}
    return tokens | common | {"dtype": torch.float32, "padding": 0} | shape


@cache
def rewrites() -> tuple[Rewrite, ...]:
    combine = all_guards(
        same_dtype("token_inputs", "projection", "norm_weight"),
        same_shape("token_inputs", "reshape"),
        vectors_of_last_dim("token_inputs", "norm_weight"),
    )
    gather = all_guards(same_dtype("table", "projection", "norm_weight"), one_element("embed_scale"), scaled_as_the_table)
    return (
        Rewrite("ple_inputs", search_gather, replace_gather, lambda: inputs(True), gather),
        Rewrite("ple_combine", search, replace, lambda: inputs(False), combine),
    )


FUSION = Fusion(
    "ple_inputs", "per-layer embedding gather + projection norm + combine",
    lambda geometry: (WHOLE_MODEL,) if geometry.per_layer_input else (), rewrites, ops=("ple_inputs", "ple_combine"),
)  # fmt: skip
