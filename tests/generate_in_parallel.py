"""Generates with one rank's part of each model and prints a JSON line a case; started under torchrun by test_parallel.py.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.generate_in_parallel FOLDER:CACHE:MODE ...

MODE is `plain` (transformers' own), `passes` (optimized, without code generation) or `inductor`. The case `ops` runs the op of
each form of all_reduce_norm and says which of them are wrong."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from gemma4_compile import OptimizeConfig, optimize, report
from gemma4_compile.ops import OPS, all_reduce_norm
from gemma4_compile.ops.all_reduce_norm import FORMS
from gemma4_compile.ops.examples import SMALL, example
from gemma4_compile.optimize import state_of
from gemma4_compile.parallel import load
from tests.models import prompt

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


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    for case in sys.argv[1:]:
        result: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(result, {"wrong": wrong_ops()} if case == "ops" else run(*case.rsplit(":", 2)))
        if dist.get_rank() == 0:
            assert all(other == result[0] for other in result), result
            print(json.dumps({"case": case} | result[0]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
