"""Load a Gemma 4 MTP assistant on every supported transformers.

Owns one thing: a class that builds where plain `Gemma4AssistantForCausalLM.from_pretrained` does not. transformers 5.23
asks the assistant's config which of its layers produces keys and values; in an assistant none does, and the question
ends in a ValueError. The answer is given here by a config class of our own; the installed package stays as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Gemma4AssistantForCausalLM as _Base
from transformers import Gemma4TextConfig, Gemma4TextModel, PreTrainedConfig
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import (
    Gemma4AssistantMaskedEmbedder,
    Gemma4AssistantPreTrainedModel,
)

from .families import GEMMA4, Family, family_of


class AllSharedTextConfig(Gemma4TextConfig):
    """A Gemma4TextConfig whose layers may all read keys and values that another model stored."""

    model_type = "gemma4_text"

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """One mode a layer: "reuse" for each when all are shared, else what transformers says."""
        if self.num_kv_shared_layers == self.num_hidden_layers:
            return ["reuse"] * self.num_hidden_layers
        return super().kv_sharing_modes


class Gemma4AssistantForCausalLM(_Base):
    """The assistant of transformers, with its text model built from an `AllSharedTextConfig`.

    Parameters, forward, saved files and the class name (assisted generation looks for it) are the parent's.
    """

    def __init__(self, config):
        # Not the parent's __init__: it asks AutoModel for the text model, which knows no config class but its own.
        attention = config.get_text_config()._attn_implementation
        text = AllSharedTextConfig(**config.get_text_config().to_dict())
        text._attn_implementation = attention
        config.text_config = text
        Gemma4AssistantPreTrainedModel.__init__(self, config)
        self.vocab_size, self.hidden_size = text.vocab_size, text.hidden_size
        self.backbone_hidden_size = config.backbone_hidden_size
        self.model = Gemma4TextModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.pre_projection = nn.Linear(2 * config.backbone_hidden_size, text.hidden_size, bias=False)
        self.post_projection = nn.Linear(text.hidden_size, config.backbone_hidden_size, bias=False)
        self.masked_embedding = Gemma4AssistantMaskedEmbedder(config) if config.use_ordered_embeddings else None
        self.post_init()


def assistant_class(family: Family = GEMMA4) -> Any:
    """The class to build a family's assistants with: transformers' where it builds one, ours where it raises (5.23)."""
    if family is not GEMMA4:
        return family.assistant
    probe = Gemma4TextConfig(num_hidden_layers=1, num_kv_shared_layers=1, layer_types=["full_attention"])
    try:
        getattr(probe, "kv_sharing_modes", None)
    except ValueError:
        return Gemma4AssistantForCausalLM
    return _Base


def load_assistant(path: str | Path, **kwargs: Any) -> Any:
    """`Gemma4AssistantForCausalLM.from_pretrained(path, **kwargs)`, or that of Gemma4Unified, also where transformers itself
    cannot build one.

    path    folder (or hub id) of the assistant
    kwargs  handed to from_pretrained: dtype, attn_implementation, device_map, ...

    Raises what from_pretrained raises: OSError for a folder without config.json.
    """
    return assistant_class(_family_at(path)).from_pretrained(str(path), **kwargs)


def _family_at(path: str | Path) -> Family:
    """Of an assistant's folder or hub id, by its config."""
    read, _ = PreTrainedConfig.get_config_dict(str(path))
    return family_of(str(read.get("model_type", "")).removesuffix("_assistant")) or GEMMA4
