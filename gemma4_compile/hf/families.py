"""The two families of transformers' Gemma-4 classes: `gemma4`, and `gemma4_unified` of the 12B, whose modules are the same
under other names."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.gemma4_unified import modeling_gemma4_unified as unified


class Family(NamedTuple):
    """The classes of one.

    model_type   of a multimodal checkpoint; that of its text part ends in _text, that of its assistant in _assistant
    """

    model_type: str
    causal: Any
    text: Any
    multimodal: Any
    attention: Any
    text_config: Any
    assistant: Any
    assistant_config: Any

    @property
    def model_types(self) -> tuple[str, str]:
        """Of checkpoints that it loads."""
        return self.model_type, f"{self.model_type}_text"


GEMMA4 = Family(
    "gemma4", gemma4.Gemma4ForCausalLM, gemma4.Gemma4TextModel, gemma4.Gemma4ForConditionalGeneration,
    gemma4.Gemma4TextAttention, transformers.Gemma4TextConfig, transformers.Gemma4AssistantForCausalLM,
    transformers.Gemma4AssistantConfig,
)  # fmt: skip
UNIFIED = Family(
    "gemma4_unified", unified.Gemma4UnifiedForCausalLM, unified.Gemma4UnifiedTextModel,
    unified.Gemma4UnifiedForConditionalGeneration, unified.Gemma4UnifiedTextAttention, transformers.Gemma4UnifiedTextConfig,
    transformers.Gemma4UnifiedAssistantForCausalLM, transformers.Gemma4UnifiedAssistantConfig,
)  # fmt: skip
FAMILIES = (GEMMA4, UNIFIED)
CAUSAL, TEXT, MULTIMODAL, ATTENTION, ASSISTANT = (
    tuple(getattr(family, name) for family in FAMILIES) for name in ("causal", "text", "multimodal", "attention", "assistant")
)


def family_of(model_type: str) -> Family | None:
    """The family of a checkpoint; None for one of neither."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def family_of_model(model: Any) -> Family:
    """That of a model, a text part or a multimodal one."""
    kinds = ((f, (f.causal, f.text, f.multimodal)) for f in FAMILIES)
    return next(family for family, classes in kinds if isinstance(model, classes))
