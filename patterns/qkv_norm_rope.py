"""Q, K and V head norms + rotary embedding      HF: Gemma4TextAttention.forward, Gemma4VisionAttention.forward

Five forms: own K and V; the same of image patches, whose positions are two, with projections that are clipped or not; V is the
raw K projection (attention_k_eq_v); Q only, where the layer shares another layer's KV.
The projections are part of the search, as only their common input says which q, k and v belong together. They are put back
as they were, but for the bounds of their outputs, which the fused op takes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from transformers import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

from .capture import capture
from .fusion import Fusion, every_layer
from .rewrite import Rewrite, all_guards, one_element, same_dtype, vectors_of_last_dim
from .template import Match, value_of

ops = torch.ops.gemma4


def own_keys(rope: Any, fused: Any) -> tuple[Any, Any]:
    """Search and replacement for a layer with keys and values of its own, by its rotation and the op in their place."""

    def search(
        x: Tensor, q_proj: Tensor, k_proj: Tensor, v_proj: Tensor, q_bias: Any, k_bias: Any, v_bias: Any, heads: Any,
        q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q = rope(ops.rms_norm(F.linear(x, q_proj, q_bias).view(heads), q_weight, eps), cos, sin)
        k = rope(ops.rms_norm(F.linear(x, k_proj, k_bias).view(heads), k_weight, eps), cos, sin)
        return q, k, ops.rms_norm_noscale(F.linear(x, v_proj, v_bias).view(heads), eps)

    def replace(
        x: Tensor, q_proj: Tensor, k_proj: Tensor, v_proj: Tensor, q_bias: Any, k_bias: Any, v_bias: Any, heads: Any,
        q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q = F.linear(x, q_proj, q_bias).view(heads)
        k = F.linear(x, k_proj, k_bias).view(heads)
        v = F.linear(x, v_proj, v_bias).view(heads)
        q, k, v = fused(q, k, v, q_weight, k_weight, cos, sin, eps)
        return q, k, v

    return search, replace


@cache
def clipped_linear() -> Callable[..., Any]:
    """Gemma4ClippableLinear.forward, as Dynamo traces it, of its input, its weight and its four bounds."""
    module = Gemma4ClippableLinear(Gemma4VisionConfig(use_clipped_linears=True), 16, 16).requires_grad_(False)
    bounds = {name: getattr(module, name) for name in ("input_min", "input_max", "output_min", "output_max")}
    given = {"x": torch.randn(3, 16), "weight": module.linear.weight} | bounds
    template = capture(lambda x, *_: module(x), given, source=Gemma4ClippableLinear.forward)
    forward = GraphModule({}, template.graph).forward  # not the module, which a trace would take for one operation
    return lambda *args: forward(*args)[0]


def clipped_layer(linear: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """A layer of image patches whose projections are clipped, by its linear, and by what becomes of q, k and v."""

    def layer(
        x: Tensor, q_proj: Tensor, k_proj: Tensor, v_proj: Tensor, heads: Any, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
        sin: Tensor, eps: float, q_input_min: Tensor, q_input_max: Tensor, q_min: Tensor, q_max: Tensor, k_input_min: Tensor,
        k_input_max: Tensor, k_min: Tensor, k_max: Tensor, v_input_min: Tensor, v_input_max: Tensor, v_min: Tensor,
        v_max: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q = linear(x, q_proj, q_input_min, q_input_max, q_min, q_max).view(heads)
        k = linear(x, k_proj, k_input_min, k_input_max, k_min, k_max).view(heads)
        v = linear(x, v_proj, v_input_min, v_input_max, v_min, v_max).view(heads)
        return then(q, k, v, q_weight, k_weight, cos, sin, eps, [q_min, q_max, k_min, k_max, v_min, v_max])

    return layer


def search_then(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, _: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = ops.rms_norm(q, q_weight, eps), ops.rms_norm(k, k_weight, eps)
    return ops.rope_2d(q, cos, sin), ops.rope_2d(k, cos, sin), ops.rms_norm_noscale(v, eps)


def replace_linear(x: Tensor, weight: Tensor, input_min: Tensor, input_max: Tensor, *_: Tensor) -> Tensor:
    return F.linear(torch.clamp(x, input_min, input_max), weight, None)


def replace_then(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = ops.qkv_norm_rope_2d_clipped(*args)
    return q, k, v


def search_k_eq_v(
    x: Tensor, q_proj: Tensor, k_proj: Tensor, q_bias: Any, k_bias: Any, heads: Any, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q = ops.rope(ops.rms_norm(F.linear(x, q_proj, q_bias).view(heads), q_weight, eps), cos, sin)
    kv = F.linear(x, k_proj, k_bias).view(heads)
    return q, ops.rope(ops.rms_norm(kv, k_weight, eps), cos, sin), ops.rms_norm_noscale(kv, eps)


def replace_k_eq_v(
    x: Tensor, q_proj: Tensor, k_proj: Tensor, q_bias: Any, k_bias: Any, heads: Any, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q = F.linear(x, q_proj, q_bias).view(heads)
    kv = F.linear(x, k_proj, k_bias).view(heads)
    q, k, v = ops.qkv_norm_rope(q, kv, kv, q_weight, k_weight, cos, sin, eps)
    return q, k, v


def search_q(q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return ops.rope(ops.rms_norm(q, q_weight, eps), cos, sin)


def replace_q(q: Tensor, q_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return ops.q_norm_rope(q, q_weight, cos, sin, eps)


def inputs(form: str) -> dict[str, Any]:
    rotary = {name: torch.randn(2, 3, 8) for name in ("cos", "sin")} | {"q_weight": torch.rand(8) + 0.5, "eps": 1e-6}
    if form == "q":
        return rotary | {"q": torch.randn(2, 3, 4, 8)}
    common = {
        "x": torch.randn(2, 3, 16), "q_proj": torch.randn(32, 16), "k_proj": torch.randn(16, 16), "q_bias": None,
        "k_bias": None, "heads": (2, 3, -1, 8), "k_weight": torch.rand(8) + 0.5,
    }  # fmt: skip
    return rotary | common | ({"v_proj": torch.randn(16, 16), "v_bias": None} if form == "qkv" else {})


def inputs_clipped() -> dict[str, Any]:
    bounds: dict[str, Tensor] = {}
    for name, least in (("q", -2.0), ("k", -1.0), ("v", 0.5)):
        for bound, value in ((f"{name}_input", 1.0), (name, 2.0)):
            bounds |= {f"{bound}_min": torch.tensor(value * least), f"{bound}_max": torch.tensor(value)}
    return {name: value for name, value in inputs("qkv").items() if not name.endswith("_bias")} | bounds


def rotary_shapes(match: Match) -> str | None:
    """cos and sin are [batch or 1, tokens, head_dim], as long as the heads are."""
    cos, weight = value_of(match.binding["cos"]), value_of(match.binding["q_weight"])
    if cos is None or weight is None or cos.dim() != 3 or cos.shape[-1] != weight.shape[0]:
        return "cos must be [batch or 1, tokens, head_dim]"
    return None


@cache
def rewrites() -> tuple[Rewrite, ...]:
    # q, k and v have the dtype of x: a GEMM of one dtype.
    both = all_guards(same_dtype("x", "q_weight", "k_weight", "cos", "sin"), rotary_shapes)
    bounds = ("q_min", "q_max", "k_min", "k_max", "v_min", "v_max")
    numbers = all_guards(both, same_dtype("x", *bounds), *map(one_element, bounds))
    alone = all_guards(same_dtype("q", "q_weight", "cos", "sin"), vectors_of_last_dim("q", "q_weight"), rotary_shapes)
    return (
        Rewrite("qkv_norm_rope", *own_keys(ops.rope, ops.qkv_norm_rope), lambda: inputs("qkv"), both),
        Rewrite("qkv_norm_rope_2d", *own_keys(ops.rope_2d, ops.qkv_norm_rope_2d), lambda: inputs("qkv"), both),
        Rewrite(
            "qkv_norm_rope_2d_clipped",
            clipped_layer(clipped_linear(), search_then),
            clipped_layer(replace_linear, replace_then),
            inputs_clipped,
            numbers,
        ),  # fmt: skip
        Rewrite("kv_norm_rope", search_k_eq_v, replace_k_eq_v, lambda: inputs("k_eq_v"), both),
        # Last: the q of the forms above looks like this too, and so does their k.
        Rewrite("q_norm_rope", search_q, replace_q, lambda: inputs("q"), alone),
    )


FUSION = Fusion(
    "qkv_norm_rope", "Q, K and V head norms + RoPE", every_layer, rewrites,
    ops=("qkv_norm_rope", "q_norm_rope", "qkv_norm_rope_2d", "qkv_norm_rope_2d_clipped"),
    launches_saved={"qkv_norm_rope": 2, "kv_norm_rope": 1},
)  # fmt: skip
