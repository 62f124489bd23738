"""Our attention op behind transformers' attention interface: what a model's layers call when they run a packed batch.

The op writes and reads the pages itself. So K and V never leave a layer's graph, and layers that share KV pass none.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gemma4_compile import ops  # noqa: F401  (registers the ops)

NAME = "gemma4_compile"


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float,
    packed: dict[str, Tensor], owners: tuple[int, ...], sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """One layer's attention, as Gemma4TextAttention calls it; Dynamo traces through it.

    query       [1, Hq, T, D]; key and value [1, Hk, T, D]
    packed      a step's inputs by name, see inputs.py
    owners      for each layer the layer whose pages it reads
    returns     [1, T, Hq, D], and no weights

    `packed` and `owners` come from the model's call: transformers hands unknown keyword arguments down to here.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    kind, owner = module.layer_type, owners[layer]
    more: tuple[Tensor | None, ...] = (packed["visible"],) if "visible" in packed else ()
    if sliding_window and "until" in packed:
        more = packed.get("visible"), packed["until"]
    own = not module.is_kv_shared_layer  # not by index: an assistant's layer may have that of the target's owner
    mixed = torch.ops.gemma4.attention(
        query.transpose(1, 2), key.transpose(1, 2) if own else None, value.transpose(1, 2) if own else None,
        packed[f"keys.{owner}"], packed[f"values.{owner}"], packed[f"slots.{kind}"], packed[f"table.{kind}"],
        packed["positions"], packed["starts"], layer, sliding_window or 0, scaling, *more,
    )  # fmt: skip
    return mixed, None


AttentionInterface.register(NAME, attention_forward)
