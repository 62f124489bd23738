"""inspect() on a GPU: every kernel of a step is timed, and nothing is lost between the catalogue and the profiler."""

import json
from pathlib import Path

import pytest

from gemma4_compile import demo_checkpoint, inspect
from gemma4_compile.hf.loading import load
from gemma4_compile.inspection import tables


@pytest.mark.parametrize("step", ["decode", "prefill"])
@pytest.mark.parametrize("name", ["e", "moe"])
def test_times_add_up(name: str, step: str, tmp_path: Path) -> None:
    model = load(demo_checkpoint(name) / "target", "cuda")[0]
    found = inspect(model, out=tmp_path / "out", compare="plain", context=64, step=step)
    print(tables.summary(found))
    assert found.plain is not None
    for variant in found.variants:
        assert variant.busy_microseconds is not None
        assert variant.kernel_microseconds == pytest.approx(variant.busy_microseconds, rel=0.05)
        lost = [kernel.name for kernel in variant.kernels if not kernel.launches and kernel.kind != "other"]
        assert not lost, lost  # a call that launched nothing was not found in the profile
        assert not [work.name for work in variant.outside if work.name.startswith(("gemma4::", "triton_"))]
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    assert "µs" in (tmp_path / "out" / "report.html").read_text()
