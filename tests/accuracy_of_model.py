"""How far a whole model is from the truth: logits in fp64, errors against them, and where two greedy outputs diverge.

Owns no tolerance: the tests state theirs. Works on any device; the fp64 model is always on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class _InDouble(TorchFunctionMode):
    """Where model code asks for fp32 (`x.float()`, `dtype=torch.float32`) it gets fp64. A narrower result raises."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        widened = tree_map(lambda v: torch.float64 if v is torch.float32 else v, (args, kwargs or {}))
        output = func(*widened[0], **widened[1])
        if isinstance(output, Tensor) and output.dtype in _NARROW:
            raise AssertionError(f"{getattr(func, '__name__', func)} left fp64 for {output.dtype}")
        return output


class Exact:
    """A copy of a Hugging Face Gemma-4 that computes in fp64 throughout, norms, RoPE and softmax included.

    The weights are those of the given model, as are the constants that it rounds to its dtype before it uses them (the
    scales of the embeddings): what is left is the error of the arithmetic.
    """

    def __init__(self, model: nn.Module) -> None:
        dtype = next(model.parameters()).dtype
        exact: Any = copy.deepcopy(model)
        exact._compiled_call_impl = None  # an optimized model's copy runs as Hugging Face wrote it
        for name, buffer in exact.named_buffers():
            if name.endswith("embed_scale"):
                buffer.copy_(buffer.to(dtype))
        self.model: Any = exact.cpu().double()
        if self.model.config.enable_moe_block:
            self.model.set_experts_implementation("eager")  # the others have no fp64 everywhere

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """fp64 [batch, tokens, vocab] on the CPU, of token ids [batch, tokens]."""
        mask = None if attention_mask is None else attention_mask.cpu()
        with torch.no_grad(), _InDouble():
            logits = self.model(input_ids=ids.cpu(), attention_mask=mask, use_cache=False).logits
        assert logits.dtype == torch.float64
        return logits


@dataclass(frozen=True)
class LogitError:
    """Against fp64, over all prompts, positions and tokens.

    rms       root mean square; in a model with experts a few positions where rounding chose another expert decide it
    typical   the median over the positions of the root mean square at each, which those few leave alone
    largest   of one logit
    """

    rms: float
    typical: float
    largest: float

    def __str__(self) -> str:
        return f"rms {self.rms:.4g}, typical {self.typical:.4g}, largest {self.largest:.4g}"


def plain_logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """[tokens, vocab] of each prompt, in one call a prompt without a cache, as the model gives them but on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return [model(input_ids=torch.tensor([p], device=device), use_cache=False).logits[0].cpu() for p in prompts]


def logit_error(logits: Sequence[Tensor], exact: Sequence[Tensor]) -> LogitError:
    """The error of `logits` against fp64 ones of the same prompts; a sequence of [tokens, vocab] each."""
    differences = torch.cat([a.double() - e for a, e in zip(logits, exact, strict=True)])
    return LogitError(
        rms=differences.square().mean().sqrt().item(),
        typical=differences.square().mean(-1).sqrt().median().item(),
        largest=differences.abs().max().item(),
    )


def errors_exceed(ours: Sequence[Tensor], others: Sequence[Tensor], exact: Sequence[Tensor], deviations: float = 2.0) -> bool:
    """Whether our mean square error is larger than the others' by more than the positions' scatter explains: by more than so
    many standard deviations of the mean of the differences, position by position."""
    more = torch.cat([
        (a.double() - x).square().mean(-1) - (b.double() - x).square().mean(-1)
        for a, b, x in zip(ours, others, exact, strict=True)
    ])  # fmt: skip
    return bool(more.mean() > deviations * more.std() / len(more) ** 0.5)


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation: its tokens, and by how much each led the runner-up in the model's own logits."""

    tokens: list[int]
    margins: list[float]


def greedy(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any) -> list[Greedy]:
    """model.generate, one prompt a call; options go to generate(), such as cache_implementation="static"."""
    device = next(model.parameters()).device
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )
        best = torch.stack(output.logits).float().topk(2, dim=-1).values[:, 0]
        margins = (best[:, 0] - best[:, 1]).tolist()
        texts.append(Greedy(output.sequences[0, len(prompt) :].tolist(), margins))
    return texts


@dataclass(frozen=True)
class Divergence:
    """The first place where two greedy outputs diverge; what follows was computed from different tokens and tells nothing.

    prompt      its number
    position    of the new token, counted from 0
    expected    the eager model's token, `actual` the other's
    margin      lead of `expected` over its runner-up in the eager model's logits
    exact       fp64 logit of `expected` minus that of `actual`: below 0 the other model is right
    error       largest error against fp64 of the eager model's own logits at this position
    """

    prompt: int
    position: int
    expected: int
    actual: int
    margin: float
    exact: float
    error: float

    @property
    def is_tie(self) -> bool:
        """Eager itself cannot tell the two tokens apart: each of their logits is off by up to `error`."""
        return abs(self.exact) <= 2 * self.error

    def __str__(self) -> str:
        verdict = "" if self.is_tie else "  NOT A TIE"
        return (
            f"prompt {self.prompt:2} token {self.position:2}: {self.expected} -> {self.actual}, eager's margin "
            f"{self.margin:.4f}, in fp64 {self.exact:+.4f}, eager's error {self.error:.4f}{verdict}"
        )


def divergences(
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Greedy],
    actual: Sequence[Greedy],
    eager: nn.Module,
    exact: Exact,
) -> list[Divergence]:
    """Where the texts in `actual` part from the eager model's, `expected`; at most one for each prompt."""
    found = []
    for number, (prompt, mine, other) in enumerate(zip(prompts, expected, actual, strict=True)):
        # A text that ends early differs by its end-of-text token, so there is always a token on both sides.
        pairs = enumerate(zip(mine.tokens, other.tokens, strict=False))
        position = next((i for i, (a, b) in pairs if a != b), None)
        if position is None:
            assert len(mine.tokens) == len(other.tokens)
            continue
        context = [*prompt, *mine.tokens[:position]]
        choices = mine.tokens[position], other.tokens[position]
        found.append(parted(number, position, context, choices, mine.margins[position], eager, exact))
    return found


def parted(
    prompt: int, position: int, context: list[int], choices: tuple[int, int], margin: float, eager: nn.Module, exact: Exact
) -> Divergence:
    """What there is to say of two texts that go on differently behind `context`: eager with choices[0], the other with the
    second, which `margin` lies below it in eager's own logits."""
    (rounded,) = plain_logits(eager, [context])
    true = exact.logits(torch.tensor([context]))[0, -1]
    expected, actual = choices
    error = (rounded[-1].double() - true).abs().max().item()
    return Divergence(prompt, position, expected, actual, margin, (true[expected] - true[actual]).item(), error)
