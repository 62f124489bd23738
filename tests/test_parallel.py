"""Tensor parallel: two processes over gloo generate what one process does, plain and optimized; KV heads and their errors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, LlamaConfig

from gemma4_compile import SamplingParams, demo_checkpoint
from gemma4_compile.geometry import geometry
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
from gemma4_compile.hf.parallel import Division, _whole_style, check_kv_heads, division_of, load, plan, share_kv_heads
from gemma4_compile.ops import sample
from tests.generate_in_parallel import SERVED, generate
from tests.models import CONFIGS, tiny

pytest.importorskip("accelerate", reason="transformers' tensor parallel needs accelerate: NOT tested without it")
ROOT = Path(__file__).parents[1]
slow = pytest.mark.slow
CASES = [
    ("e", "static", "plain"),
    ("multimodal", "dynamic", "plain"),
    ("moe", "dynamic", "passes"),
    ("dense", "static", "inductor"),
]
ENGINES = [("e", "match"), ("moe", "block")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    dense = tmp_path_factory.mktemp("dense")
    tiny("dense").save_pretrained(dense)
    multimodal = tmp_path_factory.mktemp("multimodal")
    config = Gemma4Config(text_config=CONFIGS["e"], vision_config=None, audio_config=None)
    Gemma4ForConditionalGeneration(config).save_pretrained(multimodal)
    return {
        "multimodal": multimodal,
        "e": demo_checkpoint("e") / "target",
        "moe": demo_checkpoint("moe") / "target",
        "dense": dense,
    }


@pytest.fixture(scope="module")
def in_parallel(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    cases = ["ops", "vocabulary", *(f"{folders[kind]}:{cache}:{mode}" for kind, cache, mode in CASES)]
    cases += [f"{demo_checkpoint(kind)}:{verification}:engine" for kind, verification in ENGINES]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "tests.generate_in_parallel", *cases],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("case"): line for line in lines}


@slow
@pytest.mark.parametrize(("kind", "cache", "mode"), CASES)
def test_two_processes_give_the_tokens_of_one(
    kind: str, cache: str, mode: str, folders: dict[str, Path], in_parallel: dict[str, dict[str, Any]]
) -> None:
    alone = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    found = in_parallel[f"{folders[kind]}:{cache}:{mode}"]
    assert found["tokens"] == generate(alone, cache)
    if mode != "plain":
        assert all(expected == matched for expected, matched in found["counts"].values()), found["counts"]
        assert found["counts"]["all_reduce_norm"][1] == len(alone.model.layers)


@slow
@pytest.mark.parametrize(("kind", "verification"), ENGINES)
def test_an_engine_of_two_ranks_gives_the_tokens_of_transformers(
    kind: str, verification: str, in_parallel: dict[str, dict[str, Any]]
) -> None:
    """With drafts, each token is the one that the whole model's logits at its place give, by its request's params."""
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint(kind) / "target", dtype=torch.float32).eval()
    found = in_parallel[f"{demo_checkpoint(kind)}:{verification}:engine"]
    assert found["vocabulary"] == model.config.vocab_size // 2
    assert all(expected == matched for expected, matched in found["counts"].values()), found["counts"]
    assert found["counts"]["all_reduce_norm"][1] == len(model.model.layers)
    for name, output in found["outputs"].items():
        params, prompt, tokens = SERVED[name], output["prompt"], output["tokens"]
        assert not output["error"] and len(tokens) == 20 or name == "stops", output
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0].float()
        rows = logits[len(prompt) - 1 : -1]
        if params.temperature and verification == "match":
            assert tokens == [_drawn(row, params, place) for place, row in enumerate(rows)], name
        elif name == "penalties":
            assert tokens == [int(_shaped(row, params, prompt, tokens[:i]).argmax()) for i, row in enumerate(rows)]
        elif name == "stops":
            assert tokens == rows.argmax(-1).tolist() and output["reason"] in ("stop", "length")
        elif not params.temperature:
            assert tokens == rows.argmax(-1).tolist()
            _check_logprobs(output["logprobs"], rows, tokens, 3)
            _check_logprobs(output["prompt_logprobs"], logits[: len(prompt) - 1], prompt[1:], 2)
        else:  # accepted by rejection sampling: not the tokens of the seed, but tokens that can be
            assert all(row.softmax(-1)[token] > 1e-6 for row, token in zip(rows, tokens, strict=True))
    assert found["after_close"] == "RanksError"
    if verification == "match":
        assert found["again"] == found["outputs"]["drawn"]["tokens"]


def _drawn(row: torch.Tensor, params: SamplingParams, place: int) -> int:
    values = (params.temperature, params.top_k, params.top_p, params.min_p, params.seed, place)
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)
    return int(sample(row[None], *(torch.tensor([v], dtype=d) for v, d in zip(values, dtypes, strict=True))))


def _shaped(row: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> torch.Tensor:
    """By hand, as transformers and the OpenAI API have it."""
    row = row.clone()
    for token in {*prompt, *output}:
        row[token] = row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
    for token in set(output):
        row[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in params.logit_bias.items():
        row[token] += bias
    return row


def _check_logprobs(found: list[Any], rows: torch.Tensor, tokens: list[int], top: int) -> None:
    assert len(found) == len(tokens)
    for (value, rank, likeliest), row, token in zip(found, rows.log_softmax(-1), tokens, strict=True):
        assert abs(value - row[token]) < 1e-3 and rank == 1 + (row > row[token]).sum()
        best = row.topk(top)
        assert {int(name): pytest.approx(p, abs=1e-3) for name, p in likeliest.items()} == dict(
            zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )


@slow
def test_each_op_sums_in_the_order_of_the_ranks(in_parallel: dict[str, dict[str, Any]]) -> None:
    assert in_parallel["ops"]["wrong"] == []


@slow
def test_a_divided_vocabulary_gives_what_a_whole_one_does(in_parallel: dict[str, dict[str, Any]]) -> None:
    assert in_parallel["vocabulary"]["wrong"] == []


def test_the_plan_is_transformers_own_where_the_heads_divide() -> None:
    config = Gemma4TextConfig(**TEXT_CONFIGS["26B-A4B"])
    assert plan(config, 1) == plan(config, 2) == "auto"
    replicated = {f"model.layers.*.self_attn.{name}": _whole_style() for name in ("k_proj", "v_proj")}
    assert plan(config, 4).items() >= replicated.items()  # two heads in full layers


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [("E2B", 3, "num_attention_heads must be a multiple"), ("E2B", 16, "num_attention_heads must be a multiple")],
)
def test_heads_that_cannot_be_divided(name: str, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(Gemma4TextConfig(**TEXT_CONFIGS[name]), ranks)


def test_kv_heads_that_cannot_be_divided() -> None:
    config = Gemma4TextConfig(**CONFIGS["dense"] | {"num_attention_heads": 12, "num_key_value_heads": 6})
    with pytest.raises(ValueError, match="num_key_value_heads must divide or be divided by .*, got 6 for 4 ranks"):
        plan(config, 4)


def test_geometry_of_a_rank() -> None:
    layers = geometry(Gemma4TextConfig(**TEXT_CONFIGS["26B-A4B"]), ranks=4).layers
    assert (layers[0].heads, layers[0].kv_heads, layers[5].kv_heads) == (4, 2, 1)


def test_a_whole_model_is_left_alone() -> None:
    model = tiny("e")
    assert division_of(model) == Division() and share_kv_heads(model) is model
    check_kv_heads(model)
    assert model.model.layers[0].self_attn.num_key_value_groups == 4


def test_a_part_of_a_kv_head_is_refused() -> None:
    model = tiny("e")
    projection = model.model.layers[0].self_attn.k_proj
    projection.weight.data = projection.weight.data[:8]
    with pytest.raises(ValueError, match="whole KV heads of 16, got 8 rows of k_proj in layer 0; load the model with"):
        check_kv_heads(model)


def test_another_device_is_refused() -> None:
    other = "cpu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"the ranks' device must be .* here, got {other}"):
        load(demo_checkpoint("e") / "target", device=other)


def test_ranks_without_torchrun() -> None:
    with pytest.raises(ValueError, match="must be so many processes, got this one alone; use torchrun --nproc-per-node 2"):
        load(demo_checkpoint("e") / "target", ranks=2)


def test_ranks_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fault of the weights."""
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)

    def refused(**options: Any) -> None:
        raise dist.DistNetworkError("The client socket has failed to connect")

    monkeypatch.setattr(dist, "init_process_group", refused)
    with pytest.raises(ConnectionError, match="must find each other, got 'The client socket has failed to connect'"):
        load(demo_checkpoint("e") / "target")


def test_another_model_is_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have model_type gemma4, gemma4_unified or one of their text parts, got 'llama'"):
        load(tmp_path)
