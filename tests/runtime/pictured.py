"""Tiny multimodal models twice, as Hugging Face has them and served; prompts with drawn pictures; what must come of them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4AssistantConfig

from gemma4_compile import Engine, EngineConfig, SamplingParams
from gemma4_compile.demo.pictures import picture
from gemma4_compile.hf.assistant import assistant_class
from gemma4_compile.hf.families import UNIFIED
from gemma4_compile.hf.vision import without_merging
from gemma4_compile.runtime.outputs import RequestOutput
from tests.models import AUDIO, BEGIN, CONFIGS, END, IMAGE, VIDEO, image_processor, tiny_multimodal, tiny_unified

BANNED = dict.fromkeys((IMAGE, BEGIN, END, VIDEO, AUDIO), -1000.0)  # Hugging Face embeds those that it writes as padding
CONFIG = EngineConfig(max_requests=8, max_batched_tokens=512, page_size=16, kv_bytes=1 << 24)
_BOTH_WAYS = {"use_bidirectional_attention": "vision"}
KINDS: dict[str, Any] = {"e": {}, "moe": _BOTH_WAYS, "dense": _BOTH_WAYS}


@dataclass
class Pictured:
    """plain: as Hugging Face has it."""

    plain: Any
    served: Any
    processor: Callable[[], Any] = image_processor

    def engine(self, config: EngineConfig = CONFIG, **options: Any) -> Engine:
        return Engine(self.served, config, processor=self.processor(), **options)

    def logits(self, ids: list[int], images: list[tuple[Any, int]]) -> Tensor:
        """[T, vocabulary] of one call.

        images   pictures with the tokens that each may have"""
        given = torch.tensor([ids])
        found = [self.processor()([image], return_tensors="pt", max_soft_tokens=most) for image, most in images]
        options: dict[str, Tensor] = {}
        if found:
            longest = max(each["pixel_values"].shape[1] for each in found)
            pad = [longest - each["pixel_values"].shape[1] for each in found]
            values = [torch.nn.functional.pad(e["pixel_values"], (0, 0, 0, n)) for e, n in zip(found, pad, strict=True)]
            places = [
                torch.nn.functional.pad(e["image_position_ids"], (0, 0, 0, n), value=-1)
                for e, n in zip(found, pad, strict=True)
            ]
            options = {"pixel_values": torch.cat(values), "image_position_ids": torch.cat(places)}
        if VIDEO in ids:
            options = self._of_video(options["pixel_values"], options["image_position_ids"])
        kinds = (given == IMAGE).long() + 2 * (given == VIDEO).long()
        if self.processor is not image_processor:
            options["attention_mask"] = self._masks(given, kinds)
        with torch.no_grad():
            return self.plain(input_ids=given, mm_token_type_ids=kinds, **options).logits[0]

    def _of_video(self, values: Tensor, places: Tensor) -> dict[str, Tensor]:
        """One video's frames as forward() takes them."""
        if "num_frames_per_video" in inspect.signature(self.plain.model.get_video_features).parameters:
            count = torch.tensor([len(values)])
            return {"pixel_values_videos": values, "video_position_ids": places, "num_frames_per_video": count}
        return {"pixel_values_videos": values[None], "video_position_ids": places[None]}  # up to transformers 5.23

    def _masks(self, ids: Tensor, kinds: Tensor) -> Any:
        """Those of generate(): a call of forward() alone lets a Gemma4Unified's image tokens see each other in full layers
        too (transformers 5.24)."""
        make = self.plain.create_masks_for_generate
        states = torch.zeros(*ids.shape, 1)
        return make(self.plain.config, states, None, None, torch.arange(ids.shape[1])[None], mm_token_type_ids=kinds)

    def check(self, output: RequestOutput, images: list[tuple[Any, int]]) -> None:
        """Greedy tokens are Hugging Face's, and so are the prompt's log probabilities where they were asked for."""
        assert not output.error
        prompt, tokens = output.prompt_token_ids, output.token_ids
        logits = self.logits(prompt + tokens, images)
        allowed = logits[len(prompt) - 1 : -1].index_fill(1, torch.tensor(list(BANNED)), -torch.inf)
        assert allowed.argmax(-1).tolist() == tokens
        if output.prompt_logprobs:
            following = torch.tensor(prompt[1:])[:, None]
            wanted = logits[: len(prompt) - 1].log_softmax(-1).gather(1, following)[:, 0]
            actual = torch.tensor([entry.logprob for entry in output.prompt_logprobs])
            torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-4)


@cache
def pictured(kind: str) -> Pictured:
    if kind == "12B":
        models = [tiny_unified().requires_grad_(False) for _ in range(2)]
        return Pictured(models[0], models[1], lambda: without_merging(image_processor()))
    return Pictured(*(tiny_multimodal(kind, **KINDS[kind]).requires_grad_(False) for _ in range(2)))


def params(tokens: int = 6, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, logit_bias=BANNED, **options)


def prompt(*parts: Any) -> tuple[dict[str, Any], list[tuple[Any, int]]]:
    """A prompt of ids and pictures, a number or a number with the tokens that it may have; and those pictures."""
    ids, images = [2], []
    for part in parts:
        if isinstance(part, list):
            ids += part
            continue
        number, most = part if isinstance(part, tuple) else (part, 70)
        ids.append(IMAGE)
        images.append((picture(number).image, most))
    given = [{"image": image, "max_soft_tokens": most} for image, most in images]
    return ({"prompt_token_ids": ids, "images": given} if images else {"prompt_token_ids": ids}), images


@cache
def assistant_for(kind: str) -> Any:
    """A random assistant that reads the keys of `pictured(kind)`."""
    target = CONFIGS["dense" if kind == "12B" else kind] | {"max_position_embeddings": 2048}
    same = ("head_dim", "num_key_value_heads", "sliding_window", "vocab_size", "max_position_embeddings", "attention_k_eq_v")
    text: dict[str, Any] = {name: target[name] for name in same if name in target} | {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0, "pad_token_id": 0,
        "global_head_dim": 32, "num_global_key_value_heads": target.get("num_global_key_value_heads"),
        "vocab_size_per_layer_input": 0, "model_type": "gemma4_text",
    }  # fmt: skip
    torch.manual_seed(3)
    options: dict[str, Any] = {"backbone_hidden_size": target["hidden_size"], "use_ordered_embeddings": False}
    if kind == "12B":
        dropped = ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "model_type")
        config = UNIFIED.assistant_config(text_config={k: v for k, v in text.items() if k not in dropped}, **options)
        return UNIFIED.assistant(config).float().eval().requires_grad_(False)
    made = assistant_class()(Gemma4AssistantConfig(text_config=text, **options))
    return made.float().eval().requires_grad_(False)
