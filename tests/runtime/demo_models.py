"""The demo checkpoints for tests of engines: plain and to be served, held-out prompts, what greedy decoding must give."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from gemma4_compile import demo_checkpoint
from gemma4_compile.demo import held_out_prompts
from gemma4_compile.geometry import geometry
from gemma4_compile.hf.loading import load
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.runtime.outputs import RequestOutput
from gemma4_compile.runtime.worker.memory import token_bytes


@dataclass
class Demo:
    """A checkpoint twice: as Hugging Face has it, and one for engines."""

    plain: Any
    served: Any
    tokenizer: Any

    def prompts(self, count: int, longest: int, seed: int = 0) -> list[list[int]]:
        """Held-out text of 1 to `longest` tokens, evenly spread, not in order of length."""
        texts = held_out_prompts(self.tokenizer, count, longest, longest, seed)
        order = [(37 * i) % count for i in range(count)]
        assert sorted(order) == list(range(count)), "count must have no factor in common with 37"
        return [text[: 1 + i * (longest - 1) // max(count - 1, 1)] for text, i in zip(texts, order, strict=True)]

    def room_for(self, tokens: int) -> int:
        """Bytes of keys and values of so many tokens."""
        found = geometry(self.plain.config)
        return tokens * sum(token_bytes(found.kv_owners(kind), self.plain.dtype.itemsize) for kind in KINDS)

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """Hugging Face's own greedy tokens."""
        ids = torch.tensor([prompt], device=self.plain.device)
        with torch.inference_mode():
            out = self.plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return out[0, len(prompt) :].tolist()

    def divergence(self, output: RequestOutput) -> tuple[int, float] | None:
        """Where an output's tokens first are not Hugging Face's greedy ones, and by what margin of its logits. One call over
        the whole text: as attention is causal, its choice at each place is the one that generate() would make there."""
        prompt, tokens = output.prompt_token_ids, output.token_ids
        with torch.inference_mode():
            ids = torch.tensor([prompt + tokens], device=self.plain.device)
            logits = self.plain(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = torch.tensor(tokens, device=logits.device)
        wrong = (logits.argmax(-1) != chosen).nonzero()
        if not len(wrong):
            return None
        at = int(wrong[0])
        return at, float(logits[at].max() - logits[at, chosen[at]])


@cache
def demo(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Demo:
    models = [load(demo_checkpoint(name) / "target", device, dtype) for _ in range(2)]
    for model, _ in models:
        if name == "moe" and device == "cuda" and dtype == torch.float32:
            model.set_experts_implementation("batched_mm")  # torch's grouped product on a GPU takes bf16 alone
    return Demo(models[0][0], models[1][0], models[0][1])
