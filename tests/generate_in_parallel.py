"""Generates with one rank's part of each model and prints a JSON line a case; started under torchrun by test_parallel.py.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.generate_in_parallel FOLDER:CACHE:MODE ...

MODE is `plain` (transformers' own), `passes` (optimized, without code generation) or `inductor`. FOLDER:VERIFICATION:engine
serves a demo checkpoint with its assistant. The case `ops` runs the op of each form of all_reduce_norm and says which of them
are wrong, `vocabulary` the methods of a divided vocabulary."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from gemma4_compile import Engine, EngineConfig, OptimizeConfig, SamplingParams, SpeculativeConfig, optimize, report
from gemma4_compile.hf.parallel import load
from gemma4_compile.ops import OPS, Vocabulary, all_reduce_norm
from gemma4_compile.ops.distributed.all_reduce_norm import FORMS
from gemma4_compile.ops.examples import SMALL, example
from gemma4_compile.ops.sampling.logits import logprobs_of
from gemma4_compile.optimized import state_of
from tests.models import prompt
from tests.ops.sample_cases import MIXES, awkward, mixture, parameters

TOKENS = 12
SERVED = {
    "greedy": SamplingParams(max_tokens=20, logprobs=3, prompt_logprobs=2, ignore_eos=True),
    "drawn": SamplingParams(max_tokens=20, temperature=0.9, seed=4, ignore_eos=True),
    "thresholds": SamplingParams(max_tokens=20, temperature=1.1, top_k=12, top_p=0.9, min_p=0.01, seed=7, ignore_eos=True),
    "penalties": SamplingParams(
        max_tokens=20, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, logit_bias={200: 3.0, 1800: 2.0},
        ignore_eos=True,
    ),
    "stops": SamplingParams(max_tokens=20, min_tokens=3),
}  # fmt: skip
PROMPTS = ("def add(a, b):\n", "class Stack:\n    def push(self, ", "import os\n\nfor name in ", "x = [1, 2, ", "def main(")


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


def serve(folder: str, verification: str) -> dict[str, Any]:
    """Outputs by the names of SERVED, and what this rank's device knows of its rows, which is what it sampled itself."""
    config = EngineConfig(
        dtype=torch.float32, max_requests=8, max_batched_tokens=32, max_model_len=128, page_size=16, kv_bytes=2**24
    )
    speculative = SpeculativeConfig(f"{folder}/assistant", verification=verification)
    with Engine(f"{folder}/target", config, speculative=speculative) as engine:
        told: list[Any] = []
        # By block rank 0 works as if it were alone, by match all ranks do the same.
        if engine.is_driver or verification == "match":
            outputs = engine.generate(list(PROMPTS), list(SERVED.values()))
            refused = _raised(lambda: engine.generate(["x"], [SamplingParams()] * 2))
            again = engine.generate(PROMPTS[1], SERVED["drawn"])
            told += [outputs, refused, again]
        else:
            engine.run_worker()
    if verification == "block":
        told = told or [None] * 3
        dist.broadcast_object_list(told, src=0)
    outputs, refused, again = told
    assert refused in ("ValueError", "RuntimeError")
    state = engine.runner.state
    return {
        "outputs": {
            name: {
                "prompt": o.prompt_token_ids, "tokens": o.token_ids, "reason": o.finish_reason, "error": o.error,
                "logprobs": [(t.logprob, t.rank, t.top) for t in o.logprobs or ()],
                "prompt_logprobs": [(t.logprob, t.rank, t.top) for t in o.prompt_logprobs or ()],
            }
            for name, o in zip(SERVED, outputs, strict=True)
        },
        "again": again[0].token_ids, "last": state.last.tolist()[:-1], "drafts": state.drafts.tolist()[:-1],
        "vocabulary": engine.runner.vocabulary.shard, "counts": counts(engine.model),
        "after_close": _raised(lambda: engine.generate("x")),
    }  # fmt: skip


def counts(model: Any) -> dict[str, tuple[int, int]]:
    """Expected and matched sites of each enabled fusion."""
    return {name: (f.expected, f.matched) for name, f in report(model).fusions.items() if f.enabled}


def _raised(call: Callable[[], Any]) -> str:
    """The name of the error."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return ""


def run(folder: str, cache: str, mode: str) -> dict[str, Any]:
    if mode == "engine":
        return serve(folder, verification=cache)
    model = load(folder, dtype=torch.float32)
    if mode == "plain":
        return {"tokens": generate(model, cache)}
    optimize(model, OptimizeConfig(enable=("all_reduce_norm",)))
    if mode == "passes":
        state_of(model).backend.compile = lambda gm, inputs, config_patches: gm.forward
    tokens = generate(model, cache)
    result = report(model)
    return {"tokens": tokens, "counts": counts(model), "graphs": result.graphs_compiled}


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
