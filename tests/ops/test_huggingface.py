"""The references against Hugging Face's own modules, bit for bit: the references are what the kernels are held to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

modeling = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")

from gemma4_compile import ops  # noqa: E402

EPS = 1e-6
H, D, P, E, K, L = 48, 32, 16, 10, 3, 4
both = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def norm_module(width: int, dtype: torch.dtype, with_scale: bool = True) -> Any:
    module = modeling.Gemma4RMSNorm(width, eps=EPS, with_scale=with_scale)
    if with_scale:
        module.weight.copy_(1 + 0.1 * torch.randn(width))
    return module.to(dtype)


def equal(actual, wanted) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@both
def test_rms_norm(dtype: torch.dtype):
    x = draw(2, 5, H, dtype=dtype)
    module = norm_module(H, dtype)
    equal(ops.rms_norm(x, module.weight, EPS), module(x))
    equal(ops.rms_norm_noscale(x, EPS), norm_module(H, dtype, with_scale=False)(x))


@both
def test_rope(dtype: torch.dtype):
    x, cos, sin = draw(2, 5, 3, D, dtype=dtype), draw(2, 5, D, dtype=dtype), draw(2, 5, D, dtype=dtype)
    equal(ops.rope(x, cos, sin), modeling.apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2))


@both
def test_qkv_norm_rope(dtype: torch.dtype):
    q, k, v = draw(2, 5, 4, D, dtype=dtype), draw(2, 5, 2, D, dtype=dtype), draw(2, 5, 2, D, dtype=dtype)
    cos, sin = draw(1, 5, D, dtype=dtype), draw(1, 5, D, dtype=dtype)
    q_norm, k_norm, v_norm = norm_module(D, dtype), norm_module(D, dtype), norm_module(D, dtype, with_scale=False)
    wanted_q = modeling.apply_rotary_pos_emb(q_norm(q), cos, sin, unsqueeze_dim=2)
    wanted_k = modeling.apply_rotary_pos_emb(k_norm(k), cos, sin, unsqueeze_dim=2)
    equal(ops.qkv_norm_rope(q, k, v, q_norm.weight, k_norm.weight, cos, sin, EPS), (wanted_q, wanted_k, v_norm(v)))
    shared = ops.qkv_norm_rope(q, k, k, q_norm.weight, k_norm.weight, cos, sin, EPS)
    equal(shared, (wanted_q, wanted_k, v_norm(k)))
    equal(ops.q_norm_rope(q, q_norm.weight, cos, sin, EPS), wanted_q)


@both
def test_two_dimensions(dtype: torch.dtype):
    q, k, v = draw(2, 5, 4, D, dtype=dtype), draw(2, 5, 2, D, dtype=dtype), draw(2, 5, 2, D, dtype=dtype)
    cos, sin = draw(2, 5, D, dtype=dtype), draw(2, 5, D, dtype=dtype)
    positions = torch.zeros(2, 5, 2, dtype=torch.int64)
    q_norm, k_norm, v_norm = norm_module(D, dtype), norm_module(D, dtype), norm_module(D, dtype, with_scale=False)
    equal(ops.rope_2d(q, cos, sin), modeling.apply_multidimensional_rope(q, cos, sin, positions))
    wanted = [modeling.apply_multidimensional_rope(x, cos, sin, positions) for x in (q_norm(q), k_norm(k))]
    actual = ops.qkv_norm_rope_2d(q, k, v, q_norm.weight, k_norm.weight, cos, sin, EPS)
    equal(actual, (*wanted, v_norm(v)))


@both
def test_clipped(dtype: torch.dtype):
    """Projections of Gemma4ClippableLinear whose bounds are in the middle of what passes; NaN stays."""
    config = modeling.Gemma4VisionConfig(use_clipped_linears=True)
    x, cos, sin = draw(2, 5, H, dtype=dtype), draw(2, 5, D, dtype=dtype), draw(2, 5, D, dtype=dtype)
    x[1, 2, 3] = torch.nan
    positions = torch.zeros(2, 5, 2, dtype=torch.int64)
    norms = [norm_module(D, dtype), norm_module(D, dtype), norm_module(D, dtype, with_scale=False)]
    heads, wanted, bounds = [], [], []
    for norm, count, (least, most) in zip(norms, (4, 2, 2), ((-0.3, 0.4), (0.1, 0.5), (-0.2, 0.1)), strict=True):
        linear = modeling.Gemma4ClippableLinear(config, H, count * D)
        linear.output_min.fill_(least)
        linear.output_max.fill_(most)
        linear = linear.to(dtype)
        heads.append(linear.linear(x).view(2, 5, count, D))
        bounds += [linear.output_min, linear.output_max]
        wanted.append(norm(linear(x).view(2, 5, count, D)))
    wanted[:2] = [modeling.apply_multidimensional_rope(one, cos, sin, positions) for one in wanted[:2]]
    q, k, v = heads
    actual = ops.qkv_norm_rope_2d_clipped(q, k, v, norms[0].weight, norms[1].weight, cos, sin, EPS, bounds)
    for mine, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
    assert all(bool(one.isnan().any()) and not bool(one.isnan().all()) for one in actual)


def text_config(**changes):
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

    fields = {
        "vocab_size": 31,
        "hidden_size": H,
        "intermediate_size": 64,
        "num_hidden_layers": L,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": D,
        "global_head_dim": D,
        "hidden_size_per_layer_input": P,
        "vocab_size_per_layer_input": 31,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": EPS,
        "pad_token_id": 0,
    }
    return Gemma4TextConfig(**{**fields, **changes})


def randomized(module: Any, dtype: torch.dtype) -> Any:
    for name, parameter in module.named_parameters():
        parameter.copy_(1 + 0.1 * torch.randn(parameter.shape) if "norm" in name else torch.randn(parameter.shape) * 0.2)
    for name, buffer in module.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)
    return module.to(dtype).eval()


@both
def test_route(dtype: torch.dtype):
    config = text_config(enable_moe_block=True, num_experts=E, top_k_experts=K, moe_intermediate_size=8)
    router = randomized(modeling.Gemma4TextRouter(config), dtype)
    x = draw(7, H, dtype=dtype)
    scaled = ops.rms_norm_noscale(x, EPS) * router.scale * router.scalar_root_size
    _, wanted_weights, wanted_indices = router(x)
    weights, indices = ops.route(router.proj(scaled), router.per_expert_scale, K)
    equal(weights, wanted_weights)
    equal(indices, wanted_indices)


@both
@pytest.mark.parametrize("implementation", ("grouped_mm", "batched_mm"))
def test_experts(dtype: torch.dtype, implementation: str):
    """To the bit in fp32 and bf16 where rows are grouped alike; batched_mm adds its products in another order."""
    config = text_config(enable_moe_block=True, num_experts=E, top_k_experts=K, moe_intermediate_size=24)
    config._experts_implementation = implementation
    module = modeling.Gemma4TextExperts(config).to(dtype)
    for weight in (module.gate_up_proj, module.down_proj):
        weight.copy_(0.2 * torch.randn_like(weight))
    x, weights = draw(7, H, dtype=dtype), torch.rand(7, K).softmax(-1)
    indices = torch.rand(7, E).argsort(-1)[:, :K]
    wanted = module(x, indices, weights)
    actual = ops.experts(x, indices, weights, module.gate_up_proj, module.down_proj)
    if implementation == "grouped_mm":
        equal(actual, wanted)
    torch.testing.assert_close(actual, wanted, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


class Attention(nn.Module):
    """Stands in for self_attn: the layer's norms and sums are what is compared here."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output = output

    def forward(self, **_):
        return self.output, None


class Recorded(nn.Module):
    """Stands in for the MLP or the experts: keeps what it was given, returns a fixed output."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output, self.given = output, None

    def forward(self, x, *_):
        self.given = x
        return self.output


def decoder_layer(dtype: torch.dtype, **changes):
    layer = randomized(modeling.Gemma4TextDecoderLayer(text_config(**changes), 0), dtype)
    x, attention, mlp = (draw(2, 5, H, dtype=dtype) for _ in range(3))
    layer.self_attn, layer.mlp = Attention(attention), Recorded(mlp)
    return layer, x, attention, mlp


@both
def test_dense_layer(dtype: torch.dtype):
    layer, x, attention, mlp = decoder_layer(dtype, hidden_size_per_layer_input=0)
    wanted = layer(x.clone())
    hidden, normed = ops.post_attention_norm(
        attention, x, layer.post_attention_layernorm.weight, layer.pre_feedforward_layernorm.weight, EPS
    )
    equal(normed, layer.mlp.given)
    weight, following = layer.post_feedforward_layernorm.weight, layer.input_layernorm
    equal(ops.feed_forward_tail(mlp, hidden, weight, layer.layer_scalar, EPS), wanted)
    equal(
        ops.feed_forward_tail_norm(mlp, hidden, weight, layer.layer_scalar, following.weight, EPS),
        (wanted, following(wanted)),
    )


@both
def test_layer_with_experts(dtype: torch.dtype):
    layer, x, attention, mlp = decoder_layer(
        dtype,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=E,
        top_k_experts=K,
        moe_intermediate_size=8,
    )
    experts = draw(10, H, dtype=dtype)
    layer.experts = Recorded(experts)
    routed: dict[str, torch.Tensor] = {}
    layer.router.proj.register_forward_pre_hook(lambda _, inputs: routed.update(x=inputs[0]))
    wanted = layer(x.clone())
    hidden, feed_forward_in, router_in, expert_in = ops.post_attention_norms(
        attention,
        x,
        layer.post_attention_layernorm.weight,
        layer.pre_feedforward_layernorm.weight,
        layer.router.scale,
        layer.router.scalar_root_size,
        layer.pre_feedforward_layernorm_2.weight,
        EPS,
    )
    equal(feed_forward_in, layer.mlp.given)
    equal(router_in.reshape(-1, H), routed["x"])
    equal(expert_in.reshape(-1, H), layer.experts.given)
    weights = (
        layer.post_feedforward_layernorm_1.weight,
        layer.post_feedforward_layernorm_2.weight,
        layer.post_feedforward_layernorm.weight,
    )
    for given in (experts, experts.view(2, 5, H)):
        equal(ops.moe_feed_forward_tail(mlp, given, hidden, *weights, layer.layer_scalar, EPS), wanted)
    following = layer.input_layernorm
    equal(
        ops.moe_feed_forward_tail_norm(mlp, experts, hidden, *weights, layer.layer_scalar, following.weight, EPS),
        (wanted, following(wanted)),
    )


@both
def test_layer_with_per_layer_inputs(dtype: torch.dtype):
    layer, x, attention, mlp = decoder_layer(dtype)
    per_layer = draw(2, 5, L, P, dtype=dtype)[:, :, 1, :]
    wanted = layer(x.clone(), per_layer_input=per_layer)
    hidden, _ = ops.post_attention_norm(
        attention, x, layer.post_attention_layernorm.weight, layer.pre_feedforward_layernorm.weight, EPS
    )
    hidden = ops.feed_forward_tail(mlp, hidden, layer.post_feedforward_layernorm.weight, None, EPS)
    arguments = (
        hidden,
        per_layer,
        layer.per_layer_input_gate.weight,
        layer.per_layer_projection.weight,
        layer.post_per_layer_input_norm.weight,
        layer.layer_scalar,
    )
    equal(ops.ple_tail(*arguments, EPS), wanted)
    following = layer.input_layernorm
    equal(ops.ple_tail_norm(*arguments, following.weight, EPS), (wanted, following(wanted)))


@both
def test_geglu(dtype: torch.dtype):
    mlp = randomized(modeling.Gemma4TextMLP(text_config(), 0), dtype)
    x = draw(2, 5, H, dtype=dtype)
    equal(mlp.down_proj(ops.geglu(mlp.gate_proj(x), mlp.up_proj(x))), mlp(x))


@both
def test_ple_inputs(dtype: torch.dtype):
    model = randomized(modeling.Gemma4TextModel(text_config()), dtype)
    ids = torch.randint(1, 31, (2, 5))
    embeddings = model.embed_tokens(ids)
    tokens = model.get_per_layer_inputs(ids, embeddings)
    wanted = model.project_per_layer_inputs(embeddings, tokens)
    projection = model.per_layer_model_projection(embeddings)
    scales = model.per_layer_model_projection_scale, model.per_layer_input_scale, EPS
    weight, table = model.per_layer_projection_norm.weight, model.embed_tokens_per_layer
    equal(ops.ple_inputs(ids, table.weight, table.embed_scale, projection, weight, *scales), wanted)
    equal(ops.ple_combine(tokens, projection, weight, *scales), wanted)
