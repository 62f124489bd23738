"""The vision demo model: shapes, tokenizer with a chat template, and its training on drawn pictures."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from gemma4_compile.demo.evaluate import stored_by_kind
from gemma4_compile.demo.pictures import COLOURS, HELD_OUT, QUESTION, SHAPES, Picture, held_out_pictures, picture
from gemma4_compile.hf.step_cache import CACHE
from gemma4_compile.hf.vision import image_processor_of
from scripts._demo_assistant import Lesson
from scripts._demo_data import log, train_tokenizer
from scripts._demo_models import COMMON, FULL, SLIDING, prepare_start
from scripts._demo_target import run_steps

PICTURE_VOCAB = 384
IMAGE, BEGIN, END, TURN, TURN_END = "<|image|>", "<|image>", "<image|>", "<|turn>", "<turn|>"
VIDEO = "<|video|>"
TEXT: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 6, "layer_types": [SLIDING, SLIDING, FULL] * 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "num_kv_shared_layers": 3, "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32, "final_logit_softcapping": 30.0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 3, "head_dim": 32, "patch_size": 12, "pooling_kernel_size": 2, "position_embedding_size": 160,
    "standardize": True, "initializer_range": 0.04,
}  # fmt: skip
QUESTIONS = {
    QUESTION: "{name}", "What do you see?": "{name}", "Which colour is it?": "{colour}", "Which shape is it?": "{shape}",
}  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'image' %}<|image|>{% elif part.type == 'video' %}<|video|>{% endif %}"
    "{% endfor %}{% endif %}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def picture_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of the few words that it needs, and the tokens that mark images and turns."""
    texts = [f"user\n{question}\nmodel\n" for question in QUESTIONS]
    texts += [f"a {colour} {shape}, an {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    tokenizer = train_tokenizer(texts, PICTURE_VOCAB - 6)
    marks: dict[str, Any] = {"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END, "video_token": VIDEO}
    every = [AddedToken(token, special=True) for token in (*marks.values(), TURN, TURN_END)]
    tokenizer.add_special_tokens({"additional_special_tokens": every})
    tokenizer.init_kwargs["extra_special_tokens"] = marks
    tokenizer._set_model_specific_special_tokens(marks)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def new_picture_model(tokenizer: Any, seed: int) -> Any:
    """A fp32 Gemma4ForConditionalGeneration with its start values."""
    torch.manual_seed(seed)
    names = {"boi": BEGIN, "eoi": END, "image": IMAGE, "video": VIDEO}
    ids: dict[str, Any] = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    text = {**COMMON, **TEXT, "vocab_size": PICTURE_VOCAB, "vocab_size_per_layer_input": PICTURE_VOCAB}
    none: dict[str, Any] = dict.fromkeys(("audio_token_id", "boa_token_id", "eoa_token_index"))
    config = Gemma4Config(text_config=text, vision_config=VISION, audio_config=None, **ids, **none)
    model: Any = Gemma4ForConditionalGeneration(config)
    prepare_start(model.model.language_model, seed)
    tower = model.model.vision_tower
    with torch.no_grad():
        for key, value in tower.named_parameters():
            if key.endswith(("q_norm.weight", "k_norm.weight")):
                value.fill_(value.numel() ** -0.25)
            elif "layernorm" in key and "post_" in key:
                value.fill_(0.3)
        tower.patch_embedder.position_embedding_table.normal_(0, 0.1)
        # Contrasts count more than colours, which are seen at once: without this the first 1000 steps learn no shape.
        pixels = tower.patch_embedder.input_proj.weight.view(VISION["hidden_size"], -1, 3)
        pixels.sub_(0.9 * pixels.mean(1, keepdim=True)).mul_(4)
        tower.std_bias.fill_(0.125)
        tower.std_scale.fill_(0.5)
    ends = [1, tokenizer.convert_tokens_to_ids(TURN_END)]
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=2, eos_token_id=ends, pad_token_id=0)
    return model


def conversation(tokenizer: Any, question: str, soft_tokens: int) -> list[int]:
    """The prompt's ids, with the image's soft tokens in place."""
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
    text = text.replace(IMAGE, f"{BEGIN}{IMAGE * soft_tokens}{END}")
    return tokenizer(text, add_special_tokens=False).input_ids


class PictureBatches:
    """Pictures behind the held-out ones, with a question and its answer; padded on the right."""

    def __init__(self, tokenizer: Any, processor: Any, batch: int, seed: int):
        self.tokenizer, self.processor, self.batch = tokenizer, processor, batch
        self._draw, self._numbers = random.Random(seed), self._upwards(HELD_OUT + 1_000_000 * seed)
        self._end = [tokenizer.convert_tokens_to_ids(TURN_END)]

    @staticmethod
    def _upwards(first: int) -> Iterator[int]:
        while True:
            yield first
            first += 1

    def next(self) -> dict[str, Tensor]:
        """input_ids and labels [batch, T], -100 where nothing is learned; the images, and what they show."""
        drawn = [picture(next(self._numbers)) for _ in range(self.batch)]
        images = self.processor([p.image for p in drawn], return_tensors="pt")
        rows = [self._row(p, int(n)) for p, n in zip(drawn, images["num_soft_tokens_per_image"], strict=True)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros((self.batch, width), dtype=torch.int64)
        labels = torch.full((self.batch, width), -100)
        for index, (row, prompt) in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            labels[index, prompt : len(row)] = torch.tensor(row[prompt:])
        return {
            "input_ids": ids, "labels": labels, "pixel_values": images["pixel_values"],
            "image_position_ids": images["image_position_ids"],
            "colours": torch.tensor([list(COLOURS).index(p.colour) for p in drawn]),
            "shapes": torch.tensor([list(SHAPES).index(p.shape) for p in drawn]),
        }  # fmt: skip

    def _row(self, drawn: Picture, soft_tokens: int) -> tuple[list[int], int]:
        question = self._draw.choice(list(QUESTIONS)) if self._draw.random() < 0.5 else QUESTION
        answer = QUESTIONS[question].format(name=drawn.name, colour=drawn.colour, shape=drawn.shape)
        prompt = conversation(self.tokenizer, question, soft_tokens)
        return prompt + self.tokenizer(answer, add_special_tokens=False).input_ids + self._end, len(prompt)


def picture_processor() -> Any:
    sizes = {name: VISION[name] for name in ("patch_size", "pooling_kernel_size")}
    return Gemma4ImageProcessorPil(max_soft_tokens=70, **sizes)


class _Heads(nn.Module):
    """A model, and what classifies its pictures' mean embedding while it learns to see; thrown away afterwards."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, width = model, model.config.text_config.hidden_size
        self.colour, self.shape = nn.Linear(width, len(COLOURS)), nn.Linear(width, len(SHAPES))
        self._embedded: list[Tensor] = []
        self._hook = model.model.embed_vision.register_forward_hook(lambda _m, _i, out: self._embedded.append(out))

    def loss(self, soft_tokens: list[int], colours: Tensor, shapes: Tensor) -> Tensor:
        """Of the pictures that the model has seen just now."""
        means = torch.stack([part.mean(0) for part in self._embedded.pop().split(soft_tokens)])
        return F.cross_entropy(self.colour(means), colours) + F.cross_entropy(self.shape(means), shapes)

    def remove(self) -> None:
        self._hook.remove()


def train_picture_model(model: Any, batches: PictureBatches, steps: int, rate: float, device: str) -> dict[str, Any]:
    """Cross-entropy of the answers, and of what the embeddings alone tell."""
    heads = _Heads(model.to(device).train()).to(device)

    def loss_of() -> Tensor:
        given = {name: value.to(device) for name, value in batches.next().items()}
        labels, colours, shapes = (given.pop(name) for name in ("labels", "colours", "shapes"))
        keep = int((labels != -100).any(0).nonzero()[0, 0]) - 1
        logits = model(**given, use_cache=False).logits[:, keep:-1]
        soft_tokens = (given["image_position_ids"][..., 0] >= 0).sum(-1) // VISION["pooling_kernel_size"] ** 2
        answers = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, keep + 1 :].flatten(), ignore_index=-100)
        return answers + 0.3 * heads.loss(soft_tokens.tolist(), colours, shapes)

    report = run_steps(heads, loss_of, steps, rate, device, "vision target", decay=0.05)
    heads.remove()
    return {**report, "pictures": steps * batches.batch}


def read_pictures(target: Any, batches: PictureBatches, device: str) -> Lesson:
    """What an assistant learns of: the answers."""
    given = {name: value.to(device) for name, value in batches.next().items()}
    labels, cache = given.pop("labels"), DynamicCache()
    del given["colours"], given["shapes"]
    states = target.model(**given, **{CACHE: cache}, use_cache=True).last_hidden_state
    counts = torch.zeros_like(labels, dtype=torch.bool)
    counts[:, :-1] = labels[:, 1:] != -100
    return Lesson(given["input_ids"], states, stored_by_kind(target.config.text_config, cache), counts)


@torch.no_grad()
def answers_of(folder: Path) -> int:
    """How many held-out pictures the saved checkpoint names right."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    processor = image_processor_of(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    right = 0
    for drawn in held_out_pictures():
        images = processor([drawn.image], return_tensors="pt")
        soft_tokens = int(images.pop("num_soft_tokens_per_image")[0])
        ids = torch.tensor([conversation(tokenizer, QUESTION, soft_tokens)])
        out = model.generate(input_ids=ids, **images, max_new_tokens=12)[0, ids.shape[1] :]
        answer = tokenizer.decode(out, skip_special_tokens=True)
        right += answer == drawn.name
        if answer != drawn.name:
            log(f"picture {drawn.number}: {answer!r} for {drawn.name!r}")
    return right
