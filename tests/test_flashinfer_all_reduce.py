"""What is around FlashInfer's all-reduce, with a stand-in for it; itself it is tested on several GPUs (tests/gpu)."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from gemma4_compile.ops import OPS
from gemma4_compile.ops.distributed.all_reduce_norm import FORMS
from gemma4_compile.ops.distributed.symmetric import MOST_ROWS
from gemma4_compile.ops.examples import SMALL, example
from scripts import _flashinfer_all_reduce
from scripts._flashinfer_all_reduce import _Space, by_flashinfer
from tests.ops.kernel_cases import outputs
from tests.passes.one_process import fake_ranks

ABOUT = {"tp_rank": 0, "tp_size": 2}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each launch was told, in a FlashInfer whose two ranks have equal parts; the ops run as their references."""
    launches: list[dict[str, Any]] = []

    def trtllm_allreduce_fusion(**options: Any) -> None:
        options["allreduce_out"].copy_(options["allreduce_in"] * 2)
        launches.append(options)

    module: Any = types.ModuleType("flashinfer.comm")
    module.trtllm_allreduce_fusion = trtllm_allreduce_fusion
    module.AllReduceFusionPattern = types.SimpleNamespace(kAllReduce=0)
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.comm", module)
    monkeypatch.setattr(_flashinfer_all_reduce, "installed", lambda: True)
    monkeypatch.setattr(_flashinfer_all_reduce, "ranks_in", lambda group: 2)
    monkeypatch.setattr(_flashinfer_all_reduce, "_space", lambda group, x: _Space(torch.zeros(7), [], ABOUT))
    for op in FORMS:
        monkeypatch.setattr(OPS[op], "launch", OPS[op].reference)
    return launches


@pytest.mark.parametrize("op", FORMS)
def test_the_op_over_the_sum(op: str, told: list[dict[str, Any]]) -> None:
    sums, parts = FORMS[op].sums, example(op, SMALL, tokens=3)
    found = outputs(by_flashinfer(op, *parts, "group"))
    wanted = outputs(OPS[op].reference(*(2 * t for t in parts[:sums]), *parts[sums:]))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    shapes = [(launch["token_num"], launch["hidden_dim"], launch["pattern_code"]) for launch in told]
    assert shapes == [(3, SMALL.hidden, 0)] * sums
    assert all(launch["fp32_acc"] and launch["use_oneshot"] and launch["metadata"] is ABOUT for launch in told)


@pytest.mark.parametrize(("rows", "width"), [(MOST_ROWS + 1, 24), (3, 20)])
def test_what_does_not_fit_is_left(rows: int, width: int, told: list[dict[str, Any]]) -> None:
    x = torch.zeros(rows, width, dtype=torch.bfloat16)
    assert by_flashinfer("rms_norm", x, x[0], 1e-6, "group") is None and not told


def test_none_without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flashinfer_all_reduce, "installed", lambda: False)
    x = torch.zeros(3, 24, dtype=torch.bfloat16)
    with fake_ranks(2):
        assert by_flashinfer("rms_norm", x, x[0], 1e-6, "0") is None
