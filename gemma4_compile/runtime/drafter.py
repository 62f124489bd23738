"""Drafts tokens with a Gemma-4 assistant over the target's frozen keys and values."""

from pathlib import Path

from torch import Tensor, nn


class Drafter:
    """Drafts `speculative_tokens` tokens of each request; greedy.

    model               the optimized Gemma4ForCausalLM whose keys and values are read
    assistant           Gemma4AssistantForCausalLM, or its folder
    speculative_tokens  K, 1 or more
    kv                  keys.N and values.N of the target's layers that own them, [pages, page size, Hk, D]
    rope_offset         RoPE position of the drafts, from the position p of the last token whose key is in the pages: 0 or 1
    """

    def __init__(
        self, model: nn.Module, assistant: nn.Module | str | Path, speculative_tokens: int, kv: dict[str, Tensor],
        rope_offset: int = 0, recorder: object | None = None,
    ):  # fmt: skip
        raise NotImplementedError

    def draft(self, tokens: Tensor, hidden: Tensor, positions: Tensor, tables: dict[str, Tensor]) -> Tensor:
        """Draft tokens [R, K] int64, without waiting for the GPU.

        tokens     [R] int64     the token chosen last, of position p + 1
        hidden     [R, H]        the target's final-normed state of position p
        positions  [R] int64     p: the last position whose key is in the pages
        tables     kind -> [R, pages] int32
        """
        raise NotImplementedError
