"""Attention masks as Hugging Face's model makes them, and the padding that they were made of."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from gemma4_compile.step_cache import CACHE

_MAKERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def masks(
    config: Any, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, cache: Any, position_ids: Tensor | None,
    padding: Tensor | None = None, given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The mask of each kind of layer, those in `given` as they are.

    shape    batch and new tokens
    padding  [batch, keys] int64 or bool: not 0 where a token is none
    """
    # Only shape, dtype and device are read.
    embeds = torch.empty((), dtype=dtype, device=device).expand(*shape, config.hidden_size)
    arguments = {
        "config": config, "inputs_embeds": embeds, "attention_mask": padding, CACHE: cache, "position_ids": position_ids,
        "allow_is_causal_skip": False,
    }  # fmt: skip
    given = given or {}
    return {kind: make(**arguments) if given.get(kind) is None else given[kind] for kind, make in _MAKERS.items()}


def padding_of(
    given: Mapping[str, Any], shape: tuple[int, int], length: int, config: Any, dtype: torch.dtype, cache: Any
) -> Tensor | None:  # fmt: skip
    """[batch, length]: the padding of which generate() has made these masks, as it does for static caches; None for none.

    Raises ValueError if they are no causal masks with padding. Waits for the GPU."""
    known = {kind: mask for kind, mask in given.items() if mask is not None}
    if not known:
        return None
    full = known.get("full_attention")
    if set(known) - set(_MAKERS) or not isinstance(full, Tensor) or full.dtype != torch.bool or full.dim() != 4:
        raise ValueError("masks of four dimensions")
    padding = full[:, 0, -1, :length].expand(shape[0], -1)
    expected = masks(config, shape, dtype, full.device, cache, None, padding)
    for kind, mask in known.items():
        if not isinstance(mask, Tensor) or not torch.equal(mask.expand(shape[0], -1, -1, -1), expected[kind]):
            raise ValueError("masks that are neither causal nor padding")
    return padding
