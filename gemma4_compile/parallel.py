"""Tensor parallel: transformers' own plan, and the one thing that it lacks, KV heads where there are fewer of them than ranks.

Transformers gives each rank an equal share of the rows of a projection. Of one KV head that is half a head, which no attention
can read. Here such projections are loaded whole, and each rank keeps the head that its query heads read.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma4 import modeling_gemma4 as hf

from .geometry import geometry
from .loading import text_of_multimodal

_KEYS_AND_VALUES = ("k_proj", "v_proj")


def load(folder: str | Path, ranks: int | None = None, dtype: torch.dtype | None = None) -> Any:
    """The model of a checkpoint, divided between the ranks of a torchrun, in eval mode; each rank calls it.

    folder   what from_pretrained takes: a folder, or the id of a checkpoint on the hub. Of a multimodal one, its text part
    ranks    size of the group; None: all ranks of the torchrun
    dtype    of the weights; the checkpoint's own unless given

    Raises ValueError for a checkpoint that is no Gemma-4, and where the heads cannot be divided between the ranks."""
    from transformers.distributed import DistributedConfig

    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("gemma4", "gemma4_text"):
        raise ValueError(
            f"a checkpoint must have model_type gemma4 or gemma4_text, got {config.model_type!r} in {folder}; use a Gemma-4"
        )
    chosen = DistributedConfig(tp_size=ranks, tp_plan="auto")
    chosen.tp_plan = plan(config, int(chosen.tp_size or 1))
    if config.model_type == "gemma4":  # transformers 5.24 mixes the divided embedding with whole tensors in front of the towers
        model = text_of_multimodal(folder, dtype, distributed_config=chosen)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", distributed_config=chosen)
    for module in model.modules():  # 5.17 sums gradients in hooks, at which Dynamo breaks a graph
        module._backward_hooks.clear()
    return share_kv_heads(model.eval().requires_grad_(False))


def plan(config: Any, ranks: int) -> Any:
    """The tp_plan of a DistributedConfig for a Gemma4ForCausalLM: "auto", or the rules that replace some of the model's own.

    config   of the checkpoint, Gemma4Config or Gemma4TextConfig

    Raises ValueError where the heads cannot be divided between the ranks. A model that was loaded with rules still needs
    share_kv_heads()."""
    text = config.get_text_config(decoder=True)
    _check_heads("num_attention_heads", text.num_attention_heads, ranks, False)
    counts = _kv_heads(text)
    for count in counts:
        _check_heads("num_key_value_heads", count, ranks, True)
    if all(count % ranks == 0 for count in counts):
        return "auto"
    # A rule names a projection of all layers: those that could be divided are loaded whole too, and lose rows afterwards.
    style = _whole_style()
    rules = {f"model.layers.*.self_attn.{name}": style for name in _KEYS_AND_VALUES}
    if style == "replicate":
        return rules
    model_rules = {f"model.{name}": rule for name, rule in (text.base_model_tp_plan or {}).items()}
    return model_rules | dict(hf.Gemma4ForCausalLM._tp_plan or {}) | rules  # 5.17 takes rules for all of the plan


def share_kv_heads(model: Any) -> Any:
    """Keep of each projection for keys and values that was loaded whole the heads that this rank's query heads read.

    Harmless for projections that transformers has divided, and for a model that is not sharded. Returns the model."""
    for attention in (module for module in model.modules() if isinstance(module, hf.Gemma4TextAttention)):
        mesh = _mesh(attention.q_proj)
        if mesh is None:
            continue
        ranks, rank = mesh.size(), mesh.get_local_rank()
        total, heads = _kv_heads(attention.config)[attention.layer_idx], attention.config.num_attention_heads
        here = max(1, total // ranks)
        attention.num_key_value_groups = heads // ranks // here
        for name in _KEYS_AND_VALUES:
            projection = getattr(attention, name, None)
            if projection is not None and hasattr(projection, "weight"):
                _keep_heads(projection, rank * total // ranks, here, attention.head_dim, total)
    rules = getattr(model, "_tp_plan", None) or {}
    for name, rule in rules.items():  # generate() sizes a static cache by it, and no projection is whole any more
        if rule == _whole_style() and name.rsplit(".", 1)[-1] in _KEYS_AND_VALUES:
            rules[name] = "colwise"
    return model


def _mesh(projection: Any) -> Any:
    """The ranks that a projection is divided between, or None: transformers 5.24 keeps them with the weight, 5.17 with the
    module."""
    return getattr(projection.weight, "device_mesh", None) or getattr(projection, "_hf_device_mesh", None)


def _whole_style() -> str:
    """The installed transformers' name for a projection that each rank has whole: 5.17 knows one with gradients alone."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    return "replicate" if "replicate" in ALL_PARALLEL_STYLES else "replicated_with_grad_allreduce"


def ranks_of(module: nn.Module) -> int:
    """How many ranks a model is divided between, as its first query projection says; 1 for a model that is whole."""
    for part in module.modules():
        if isinstance(part, hf.Gemma4TextAttention):
            mesh = _mesh(part.q_proj)
            return 1 if mesh is None else int(mesh.size())
    return 1


def check_kv_heads(module: nn.Module) -> None:
    """Raises ValueError if a rank holds a part of a KV head."""
    for part in module.modules():
        if isinstance(part, hf.Gemma4TextAttention) and hasattr(part, "k_proj"):
            weight: Any = part.k_proj.weight
            rows = (weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]
            if rows % part.head_dim:
                raise ValueError(
                    f"each rank must hold whole KV heads of {part.head_dim}, got {rows} rows of k_proj in layer "
                    f"{part.layer_idx}; load the model with gemma4_compile.parallel.load(folder)"
                )


def _keep_heads(projection: Any, first: int, count: int, head_dim: int, total: int) -> None:
    """Rows of `count` heads from `first` on, unless the projection has lost rows already."""
    for name in ("weight", "bias"):
        whole = getattr(projection, name, None)
        if whole is None or hasattr(whole, "device_mesh") or whole.shape[0] != total * head_dim:
            continue
        rows = whole.data[first * head_dim : (first + count) * head_dim].clone()  # the rest is freed
        setattr(projection, name, nn.Parameter(rows, requires_grad=whole.requires_grad))
        projection.out_features = count * head_dim


def _kv_heads(config: Any) -> list[int]:
    return [layer.kv_heads for layer in geometry(config).layers]


def _check_heads(name: str, heads: int, ranks: int, may_be_shared: bool) -> None:
    if heads % ranks == 0 or (may_be_shared and ranks % heads == 0):
        return
    rule = "divide or be divided by the number of ranks" if may_be_shared else "be a multiple of the number of ranks"
    raise ValueError(f"{name} must {rule}, got {heads} for {ranks} ranks; use {heads & -heads}, or a smaller power of two")
