"""Generates with one rank's part of each model and prints a JSON line a case; started under torchrun by test_parallel.py.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.generate_in_parallel FOLDER:CACHE:MODE ...

MODE is `plain` (transformers' own), `passes` (optimized, without code generation) or `inductor`. The case `ops` runs the op of
each form of all_reduce_norm and says which of them are wrong, `vocabulary` the methods of a divided vocabulary."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from gemma4_compile import OptimizeConfig, optimize, report
from gemma4_compile.ops import OPS, Vocabulary, all_reduce_norm
from gemma4_compile.ops.all_reduce_norm import FORMS
from gemma4_compile.ops.examples import SMALL, example
from gemma4_compile.ops.logits import logprobs_of
from gemma4_compile.optimize import state_of
from gemma4_compile.parallel import load
from tests.models import prompt
from tests.ops.sample_cases import MIXES, awkward, mixture, parameters

TOKENS = 12


def generate(model: Any, cache: str) -> list[list[int]]:
    """Of two prompts that random ids are, or one that is shorter than the window of the tiny models."""
    with torch.no_grad():
        return [
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                cache_implementation=cache,
            )[0, ids.shape[1] :].tolist()
            for ids in (prompt(1, 9), prompt(1, 5, seed=2))
        ]  # fmt: skip


def wrong_ops() -> list[str]:
    """Ops that differ from the op alone over the sum in fp32, in the order of the ranks, or between the ranks."""
    group: Any = dist.group.WORLD
    rank = dist.get_rank()
    wrong = []
    for op, form in FORMS.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            common = list(example(op, SMALL, 5, dtype, batch=2))
            parts = [[torch.randn(t.shape).to(dtype) for t in common[: form.sums]] for _ in range(dist.get_world_size())]
            sums = [sum(p[i].float() for p in parts).to(dtype) for i in range(form.sums)]  # type: ignore[union-attr]
            found = all_reduce_norm(op, *parts[rank], *common[form.sums :], group=group.group_name)
            wanted = OPS[op].reference(*sums, *common[form.sums :])
            pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
            if not all(torch.equal(a, b) for a, b in pairs):
                wrong.append(f"{op} {dtype}")
    return wrong


def wrong_with_a_divided_vocabulary() -> list[str]:
    """Methods that differ from the ops for whole vocabularies."""
    group: Any = dist.group.WORLD
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    wrong = []
    cases = {
        "fp32": mixture(90, 512),
        "bf16": (torch.randn(90, 512).bfloat16(), *parameters(MIXES)),
        "awkward": (awkward(512), *parameters(MIXES[30:45])),
    }
    for name, (logits, *rest) in cases.items():
        size = logits.shape[1]
        here = size // ranks
        divided = Vocabulary(size, rank * here, here, group.group_name)
        own = logits[:, rank * here :][:, :here]
        tokens = torch.ops.gemma4.sample(logits, *rest)
        same = {
            "sample": torch.equal(divided.sample(own, *rest), tokens),
            "argmax": torch.equal(divided.argmax(own), logits.argmax(dim=1)),
            "gather": torch.equal(divided.gather(own).nan_to_num(), logits.nan_to_num()),
            "logprobs": all(
                torch.allclose(a, b, atol=1e-5, equal_nan=True)
                for a, b in zip(divided.logprobs(own, tokens, 5)[:3], logprobs_of(logits, tokens, 5)[:3], strict=True)
            ),
        }
        wrong += [f"{method} {name}" for method, right in same.items() if not right]
    return wrong


def run(folder: str, cache: str, mode: str) -> dict[str, Any]:
    model = load(folder, dtype=torch.float32)
    if mode == "plain":
        return {"tokens": generate(model, cache)}
    optimize(model, OptimizeConfig(enable=("all_reduce_norm",)))
    if mode == "passes":
        state_of(model).backend.compile = lambda gm, inputs, config_patches: gm.forward
    tokens = generate(model, cache)
    result = report(model)
    counts = {name: (f.expected, f.matched) for name, f in result.fusions.items() if f.enabled}
    return {"tokens": tokens, "counts": counts, "graphs": result.graphs_compiled}


CHECKS = {"ops": wrong_ops, "vocabulary": wrong_with_a_divided_vocabulary}


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    for case in sys.argv[1:]:
        result: list[Any] = [None] * dist.get_world_size()
        check = CHECKS.get(case)
        dist.all_gather_object(result, run(*case.rsplit(":", 2)) if check is None else {"wrong": check()})
        if dist.get_rank() == 0:
            assert all(other == result[0] for other in result), result
            print(json.dumps({"case": case} | result[0]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
