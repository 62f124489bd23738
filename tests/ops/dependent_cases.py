"""Which ops dependent launches are tested with, and which of their arguments are weights."""

from typing import Any

from torch import Tensor

from gemma4_compile.ops import OPS
from gemma4_compile.ops.distributed.all_reduce_norm import PREFIX

KEPT = [name for name in OPS if name != "verify" and not name.startswith(PREFIX)]  # which samples, behind graphs; on one rank
_WEIGHTS = {
    "weight", "gate_weight", "up_weight", "first", "second", "third", "projection_weight", "norm_weight", "next_weight",
    "feed_forward_weight", "router_scale", "expert_weight", "dense_weight", "q_weight", "k_weight", "per_expert_scale", "table",
    "embed_scale", "layer_scalar", "gate_up", "down",
}  # fmt: skip


def weights_of(name: str, args: tuple[Any, ...]) -> set[int]:
    """The places of a model's weights among an op's arguments."""
    return {place for field, place in OPS[name].places.items() if field in _WEIGHTS and isinstance(args[place], Tensor)}
