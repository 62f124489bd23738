"""Tensor parallel: transformers' own plan, and the one thing that it lacks, KV heads where there are fewer of them than ranks.

Transformers gives each rank an equal share of the rows of a projection. Of one KV head that is half a head, which no attention
can read. Here such projections are loaded whole, and each rank keeps the head that its query heads read.

`local_parts` shows a divided model to those who trace it: plain tensors, and logits of each rank's own tokens.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gemma4 import modeling_gemma4 as hf

from gemma4_compile.geometry import geometry
from gemma4_compile.ops.distributed.symmetric import forget
from gemma4_compile.ops.sampling.vocabulary import Vocabulary

from .assistant import load_assistant as whole_assistant
from .families import ATTENTION
from .loading import checkpoint, quiet, read

_KEYS_AND_VALUES = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Division:
    """Between how many ranks a model is divided, and this process's place among them.

    group   name of the ranks' process group; "" for a whole model
    """

    ranks: int = 1
    rank: int = 0
    group: str = ""


def load(
    folder: str | Path, ranks: int | None = None, dtype: torch.dtype | None = None, device: str | None = None
) -> Any:  # fmt: skip
    """The model of a checkpoint, divided between the ranks of a torchrun, in eval mode; each rank calls it.

    folder   what from_pretrained takes: a folder, or the id of a checkpoint on the hub. Of a multimodal one, its text part
    ranks    size of the group; None: all ranks of the torchrun
    dtype    of the weights; the checkpoint's own unless given
    device   None or what transformers takes: "cuda", a GPU a rank, where there is one, else "cpu"

    Raises ValueError for a checkpoint that is missing, broken or no Gemma-4, where the heads cannot be divided between the
    ranks, for ranks without torchrun, and for another device; ImportError without accelerate; ConnectionError where the ranks
    do not find each other."""
    from transformers.distributed import DistributedConfig

    if ranks not in (None, 1) and "RANK" not in os.environ and not dist.is_initialized():
        raise ValueError(f"ranks={ranks} must be so many processes, got this one alone; use torchrun --nproc-per-node {ranks}")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in (None, there):
        raise ValueError(f"the ranks' device must be {there} here, got {device}; leave it out, or hide GPUs from the ranks")
    folder, model_type = checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    chosen = DistributedConfig(tp_size=ranks, tp_plan="auto")
    chosen.tp_plan = plan(config, int(chosen.tp_size or 1))
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("dividing a model takes accelerate, got none; pip install 'gemma4-compile[tensor-parallel]'")
    # Without towers: 5.24 mixes the divided embedding with whole tensors in front of them.
    model = read(folder, dtype, not model_type.endswith("_text"), distributed_config=chosen)
    for module in model.modules():  # 5.17 sums gradients in hooks, at which Dynamo breaks a graph
        module._backward_hooks.clear()
    return share_kv_heads(model.eval().requires_grad_(False))


def load_assistant(folder: str | Path, division: Division, dtype: torch.dtype | None = None) -> Any:
    """The MTP assistant of a divided model, in eval mode. Its heads are divided as the target's, whose keys they read; all else
    is whole on each rank, as it takes less time to read than a sum of the ranks' parts takes.

    division   of the target
    """
    from transformers.distributed import DistributedConfig

    config = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    _check_heads("num_attention_heads of the assistant", config.num_attention_heads, division.ranks, False)
    attention = "model.layers.*.self_attn."
    rules = {f"{attention}q_proj": "colwise", f"{attention}o_proj": "rowwise"}
    if _whole_style() == "replicate":  # 5.17 takes rules for all of the plan
        whole = ("lm_head", "model.embed_tokens", *(f"model.layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")))
        rules |= dict.fromkeys(whole, "replicate")
    chosen = DistributedConfig(tp_size=division.ranks, tp_plan="auto")
    chosen.tp_plan = rules
    with quiet():  # rules for projections that no assistant has
        assistant = whole_assistant(folder, dtype=dtype, distributed_config=chosen)
    return assistant.eval().requires_grad_(False)


def leave() -> None:
    """Give up what ranks share, at the end of a process whose engines are closed. Harmless alone."""
    forget()
    if dist.is_initialized():
        dist.destroy_process_group()


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
    for attention in (module for module in model.modules() if isinstance(module, ATTENTION)):
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


def division_of(module: nn.Module) -> Division:
    """As the model's first query projection says."""
    for part in module.modules():
        if isinstance(part, ATTENTION):
            mesh = _mesh(part.q_proj)
            if mesh is not None and mesh.size() > 1:
                return Division(int(mesh.size()), int(mesh.get_local_rank()), mesh.get_group().group_name)
            return Division()
    return Division()


def vocabulary_of(model: Any, division: Division) -> Vocabulary:
    """The tokens whose logits a Gemma4ForCausalLM gives within `local_parts`."""
    size, here = model.config.vocab_size, local_part(model.lm_head.weight).shape[0]
    return Vocabulary(size, division.rank * here, here, division.group) if here < size else Vocabulary(size, 0, size)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, on the same memory; the tensor itself where it is not divided."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def local_parts(*modules: nn.Module) -> Iterator[None]:
    """For the time, divided modules hold this rank's parts as plain tensors, and heads give the logits of this rank's tokens,
    where transformers gathers them all. Harmless for what is whole."""
    heads = [getattr(module, "lm_head", None) for module in modules]
    owned: list[tuple[Any, str, Any]] = [
        (part, name, parameter)
        for module in modules
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if hasattr(parameter, "to_local")
    ]
    parts = {id(p): nn.Parameter(local_part(p.data), requires_grad=p.requires_grad) for _, _, p in owned}  # tied ones stay so
    forwards: dict[Any, Any] = {}
    try:
        for part, name, parameter in owned:
            part._parameters[name] = parts[id(parameter)]
            forward = _local_forward(part, parameter.device_mesh, any(part is head for head in heads))
            if forward is not None and part not in forwards:
                forwards[part] = part.forward
                part.forward = forward
        yield
    finally:
        for part, name, parameter in owned:
            part._parameters[name] = parameter
        for part, forward in forwards.items():
            part.forward = forward


def _local_forward(part: Any, mesh: Any, is_head: bool) -> Callable[..., Tensor] | None:
    """The forward of a module of plain parts, where what transformers puts around it asks for its own kind of tensors."""
    plain, collectives, group = partial(type(part).forward, part), torch.ops._c10d_functional, mesh.get_group().group_name

    def total(x: Tensor) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(x, "sum", group))

    def summed(*args: Any) -> Tensor:
        return total(plain(*args))

    def embedding(input_ids: Tensor) -> Tensor:
        """The rows of this rank's tokens, and the sum over the ranks, of which one alone is not zero."""
        here = part.weight.shape[0]
        places = input_ids - mesh.get_local_rank() * here
        rows = plain(places.clamp(0, here - 1))
        return total(torch.where(((places >= 0) & (places < here))[..., None], rows, torch.zeros_like(rows)))

    if isinstance(part, nn.Embedding):
        return embedding
    if isinstance(part, hf.Gemma4TextExperts):
        return summed
    return plain if is_head else None


def check_kv_heads(module: nn.Module) -> None:
    """Raises ValueError if a rank holds a part of a KV head."""
    for part in module.modules():
        if isinstance(part, ATTENTION) and hasattr(part, "k_proj"):
            weight: Any = part.k_proj.weight
            rows = (weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]
            if rows % part.head_dim:
                raise ValueError(
                    f"each rank must hold whole KV heads of {part.head_dim}, got {rows} rows of k_proj in layer "
                    f"{part.layer_idx}; load the model with gemma4_compile.hf.parallel.load(folder)"
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
