"""Tokenizer and token stream of the demo models."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gemma4_compile.demo.corpus import training_files

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0 to 3


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def load_corpus(root: Path | None, smoke: bool) -> tuple[list[str], list[str]]:
    """Texts of (library files, test files) to train on, each in a fixed random order."""
    library: list[str] = []
    tests: list[str] = []
    for path, text in training_files(root):
        (tests if "test" in path else library).append(text)
    for texts in (library, tests):
        random.Random(0).shuffle(texts)
    return (library[:40], tests[:20]) if smoke else (library, tests)


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <bos> in front of a text, as Gemma's does; `texts` in, `vocab` entries out."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", SPECIALS.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, padding_side="left",
    )  # fmt: skip


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents as one row of tokens, `<bos> text <eos>` each. int16 [n]"""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=True):
        ids += encoding.ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int16)


class Batches:
    """Random windows of the streams, each with <bos> in front, so that a prompt may begin in the middle of a file.

    library, tests  int16 [n]; a row comes from the library with probability `share` (two thirds of the text are tests)
    """

    def __init__(
        self,
        library: Tensor,
        tests: Tensor,
        batch: int,
        length: int,
        bos: int,
        device: str,
        seed: int,
        share: float = 0.4,
    ):
        self.stream, self.cut = torch.cat([library, tests]).to(device), len(library)
        self.batch, self.length, self.bos, self.share = batch, length, bos, share
        self.generator = torch.Generator().manual_seed(seed)
        self.offsets = torch.arange(length, device=device)

    def next(self) -> Tensor:
        """int64 [batch, length + 1]: one more token than the model sees."""
        draw, kind = torch.rand(2, self.batch, 1, generator=self.generator)
        starts = draw * (self.cut - self.length)
        in_tests = self.cut + draw * (len(self.stream) - self.cut - self.length)
        starts = torch.where(kind < self.share, starts, in_tests).long().to(self.stream.device)
        rows = self.stream[starts + self.offsets].long()
        return torch.cat([torch.full_like(rows[:, :1], self.bos), rows], dim=1)
