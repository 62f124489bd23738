"""Attention masks as Hugging Face's model makes them, and the padding that they were made of."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from gemma4_compile.hf.step_cache import CACHE

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
    if set(known) - set(_MAKERS) or any(
        not isinstance(m, Tensor) or m.dtype != torch.bool or m.dim() != 4 for m in known.values()
    ):
        raise ValueError("masks that generate() does not make")
    full = known.get("full_attention")
    if not known:
        return None
    candidates = [None, *([] if full is None else [full[:, 0, -1, :length].expand(shape[0], -1)])]
    device = next(iter(known.values())).device
    for padding in candidates:
        expected = masks(config, shape, dtype, device, cache, None, padding)
        if all(_equal(mask, expected[kind], shape[0]) for kind, mask in known.items()):
            return padding
    raise ValueError("masks that are neither causal nor padding")


def _equal(mask: Tensor, expected: Any, batch: int) -> bool:
    if not isinstance(expected, Tensor) or mask.shape[1:] != expected.shape[1:]:
        return False
    return torch.equal(mask.expand(batch, -1, -1, -1), expected.expand(batch, -1, -1, -1))
