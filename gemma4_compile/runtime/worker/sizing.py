"""What an engine's memory holds: the largest step, and with what is left the pools of keys and values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4_compile.config import EngineConfig
from gemma4_compile.packed.inputs import KINDS

from .memory import PoolSizes, allocate, divide
from .model import PackedModel
from .ranks import Ranks

_CPU_KV_BYTES = 2**30
_EXPECTED_TOKENS = 4096


def padding_step(
    tokens: int, rows: int, width: int, page_size: int, device: torch.device, requests: int | None = None
) -> dict[str, Tensor]:  # fmt: skip
    """A step whose tokens are stored nowhere.

    rows      that want logits
    width     pages that each request has
    requests  of about the same length; None: one, or `tokens` ones if all want logits"""
    decode = tokens == rows
    requests = requests or (tokens if decode else 1)
    step = {
        "input_ids": torch.zeros((1, tokens), dtype=torch.int64, device=device),
        "positions": (torch.zeros if decode else torch.arange)(tokens, dtype=torch.int64, device=device) % (
            width * page_size
        ),
        "rows": torch.arange(rows, device=device),
        "starts": torch.linspace(0, tokens, requests + 1, device=device).to(torch.int32),
    }  # fmt: skip
    for kind in KINDS:
        step[f"slots.{kind}"] = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        step[f"table.{kind}"] = torch.zeros((requests, width), dtype=torch.int32, device=device)
    return step


@dataclass
class Sizing:
    """
    windows    kind -> sliding window in tokens, 0 for all
    kv_dtype   of the pools
    rows       of a step that want logits at most, but for those of prompts
    """

    packed: PackedModel
    config: EngineConfig
    ranks: Ranks
    windows: dict[str, int]
    kv_dtype: torch.dtype
    rows: int

    @property
    def _device(self) -> torch.device:
        return self.packed.model.device

    def kv_bytes(self, steps: int) -> int:
        """For the pools of each rank beside steps of so many bytes: pages have the same numbers on all ranks."""
        if self.config.kv_bytes is not None:
            return self.config.kv_bytes
        if self._device.type != "cuda":
            return _CPU_KV_BYTES
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return self.ranks.least(int(free - (1 - self.config.memory_fraction) * total - steps))

    def divide(self, memory: int) -> PoolSizes:
        """So many bytes between the pools. Raises ValueError where they do not hold one request of the longest length."""
        config = self.config
        context = int(self.packed.model.config.max_position_embeddings)
        if config.max_model_len is not None and config.max_model_len > context:
            raise ValueError(
                f"max_model_len must be at most the model's context, {context}, got {config.max_model_len}; lower it"
            )
        longest = config.max_model_len or context
        while True:
            try:
                return divide(
                    self.packed.geometry, self.windows, memory, config.page_size, self.kv_dtype.itemsize,
                    min(config.expected_tokens or _EXPECTED_TOKENS, longest), longest, config.max_requests,
                    config.max_batched_tokens,
                )  # fmt: skip
            except ValueError:
                if config.max_model_len is not None or longest < 2 * config.page_size:
                    raise
                longest //= 2  # nobody asked for the whole context

    def measure_step(self, graphs: bool) -> int:
        """Bytes of activations and logits of the largest step; twice that where graphs keep a pool of their own beside.

        Raises ValueError if it does not fit."""
        config = self.config
        tokens, fitting = config.max_batched_tokens, 0
        while tokens >= 16 and not fitting:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            try:
                kv = allocate(
                    self.packed.geometry, dict.fromkeys(self.windows, 1), config.page_size, self.kv_dtype, self._device
                )
                width = -(-tokens // config.page_size)
                step = padding_step(tokens, min(tokens, self.rows), width, config.page_size, self._device)
                self.packed(step | kv)
                fitting = tokens
            except torch.cuda.OutOfMemoryError:
                if self.ranks.several:  # the others are in the middle of the step
                    break
                tokens //= 2
        if fitting < config.max_batched_tokens:
            # Half of what fits, as the pools want memory too.
            unknown = "lower it, free memory or take more GPUs" if self.ranks.several else "free memory or take a larger GPU"
            remedy = f"lower max_batched_tokens to {fitting // 2}" if fitting else unknown
            raise ValueError(
                f"a step of max_batched_tokens={config.max_batched_tokens} must fit into the GPU's memory beside the weights, "
                f"got out of memory; {remedy}"
            )
        used = torch.cuda.max_memory_allocated(self._device) - before
        return used * (2 if graphs else 1)
