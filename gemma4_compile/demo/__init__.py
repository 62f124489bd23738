"""Small trained Gemma 4 models with their MTP assistants, to judge a language-model tool on text and pictures, not on noise.

Owns where the checkpoints lie and which text they never saw. scripts/train_demo.py makes them; docs/demo.md tells how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from gemma4_compile.demo.corpus import HELD_OUT_MODULES, held_out_prompts

DemoName = Literal["e", "moe"]
DEMO_NAMES: tuple[str, ...] = get_args(DemoName)  # of text
VISION_DEMO = "vision"

__all__ = ["DEMO_NAMES", "VISION_DEMO", "HELD_OUT_MODULES", "DemoName", "demo_checkpoint", "held_out_prompts"]


def demo_checkpoint(name: str) -> Path:
    """Folder of a demo checkpoint, holding `target/` and `assistant/` (Hugging Face format, bf16) and `metrics.json`.

    name  "e" (per-layer embeddings, KV sharing, double-wide MLP), "moe" (experts, k = v on full layers) or "vision" (as "e",
          with a vision tower: names the colour and shape of a drawn picture)

    Raises ValueError for another name.
    """
    if name not in (*DEMO_NAMES, VISION_DEMO):
        raise ValueError(f"a demo checkpoint must be one of {', '.join(DEMO_NAMES)}, {VISION_DEMO}, got {name!r}; use 'e'")
    return Path(__file__).parent / name
