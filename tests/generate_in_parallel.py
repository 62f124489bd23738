"""Generates with one rank's part of each model and prints a JSON line a case; started under torchrun by test_parallel.py.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.generate_in_parallel FOLDER:CACHE:MODE ...

MODE is `plain` (transformers' own), `passes` (optimized, without code generation) or `inductor`."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from gemma4_compile import OptimizeConfig, optimize, report
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


def run(folder: str, cache: str, mode: str) -> dict[str, Any]:
    model = load(folder, dtype=torch.float32)
    if mode == "plain":
        return {"tokens": generate(model, cache)}
    optimize(model, OptimizeConfig(enable=()))
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
        dist.all_gather_object(result, run(*case.rsplit(":", 2)))
        if dist.get_rank() == 0:
            assert all(other == result[0] for other in result), result
            print(json.dumps({"case": case} | result[0]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
