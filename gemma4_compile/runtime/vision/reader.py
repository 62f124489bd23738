"""Prompts of any form as token ids and images: pictures are opened beside the steps."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from gemma4_compile.config import EngineConfig
from gemma4_compile.runtime.text import Prompt, encode

from .pictures import ImageLimits
from .prompts import ImagePrompts, MarkTokens, has_images
from .source import VisionSource
from .spans import PreparedPrompt

_THREADS = 16  # at most, that open pictures


class PromptReader:
    """Reads what an engine is asked.

    tokenizer   of texts and messages; None: token ids alone are taken
    config      whether images are, and how large
    source      of the vision part; None: a model of text alone
    """

    def __init__(self, tokenizer: Any, config: EngineConfig, source: VisionSource | None):
        self._tokenizer, self._chat = tokenizer, config.chat
        self._images: ImagePrompts | None = None
        self._why_not = "a model of text alone" if source is None else "text_only=True"
        if source is not None and not config.text_only:
            limits = ImageLimits(config.image_bytes, config.image_pixels, http=config.image_urls)
            self._images = ImagePrompts(lambda: source.processor, MarkTokens.of(source.config), limits, lambda: source.frames)

    def read(self, prompt: Prompt) -> PreparedPrompt:
        """Raises ValueError for a prompt, or an image, that can never be served."""
        if isinstance(prompt, PreparedPrompt):
            if self._images is not None and not prompt.images:
                self._images.placed(prompt.tokens, ())  # text may hold a placeholder
            return prompt
        if self._images is not None:
            return PreparedPrompt(*self._images.encode(prompt, self._tokenizer, self._chat))
        if has_images(prompt):
            raise ValueError(
                f"an image needs a model with its vision part, got {self._why_not}; load the multimodal checkpoint"
            )
        return PreparedPrompt(encode(prompt, self._tokenizer, self._chat))

    def read_ahead(self, prompts: Sequence[Prompt]) -> Iterator[Callable[[], PreparedPrompt]]:
        """For each prompt what reads it, as `read`; those with images are read by threads that work ahead."""
        pictured = [has_images(prompt) for prompt in prompts]
        if not any(pictured):
            yield from (partial(self.read, prompt) for prompt in prompts)
            return
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            futures = [threads.submit(self.read, p) if has else None for p, has in zip(prompts, pictured, strict=True)]
            for prompt, future in zip(prompts, futures, strict=True):
                yield partial(self.read, prompt) if future is None else future.result
