"""How an engine drafts."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .length import DraftLength, SpeculativeTokens

VERIFICATIONS = ("block", "match")


@dataclass(frozen=True)
class SpeculativeConfig:
    """Multi-token prediction: an assistant drafts tokens, the model verifies them. The same tokens in fewer steps.

    assistant     Gemma4AssistantForCausalLM, a folder or hub id
    tokens        K, the draft tokens of a request that a step verifies; or {requests: K}, which depends on how many run; or
                  "adaptive", the K up to 6 that gives most tokens a second by measured acceptance and times
    verification  of sampled requests: "block", rejection sampling of all draft tokens at once, which keeps the distribution
                  (arXiv 2403.10444); or "match", which accepts fewer and keeps the very tokens of each seed. Greedy requests
                  have theirs anyway

    Raises ValueError for tokens that are no such number, and for another verification.
    """

    assistant: nn.Module | str | Path
    tokens: SpeculativeTokens = 3
    verification: str = "block"

    def __post_init__(self) -> None:
        DraftLength(self.tokens)
        if self.verification not in VERIFICATIONS:
            known = ", ".join(VERIFICATIONS)
            raise ValueError(f"verification must be one of {known}, got {self.verification!r}; choose one")
