"""gemma4-compile bench: workloads, what is made of timings, floors, and the command in each of its modes, on few layers."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma4_compile.bench import acceptance, at_url, vllm
from gemma4_compile.bench.floor import Rates, floor
from gemma4_compile.bench.matrix import Plan
from gemma4_compile.bench.records import Row, plot, table
from gemma4_compile.bench.timings import Timing, summary
from gemma4_compile.bench.workloads import Arrivals, Workload, workload
from gemma4_compile.cli import main
from gemma4_compile.geometry import geometry
from tests.runtime.demo_models import demo
from tests.serve.running import Running, running


def test_workloads() -> None:
    assert workload("7/10x30") == Workload(7, 10, 30) and str(workload("even")) == "1024/1024x80"
    for wrong in ("evn", "7/10", "0/1x1", "7/10x", "-1/1x1"):
        with pytest.raises(ValueError, match="a workload must be IN/OUTxREQUESTS or one of one, even"):
            workload(wrong)


def test_arrivals() -> None:
    times = Arrivals(rate=10.0).times(2000, seed=0)
    assert times[0] == 0 and times == sorted(times) and 150 < times[-1] < 250
    assert Arrivals(concurrency=3).times(2, seed=0) == [0, 0]
    assert [str(a) for a in (Arrivals(), Arrivals(4), Arrivals(2, 0.5))] == ["all at once", "4 at a time", "0.5/s, 2 at a time"]
    for wrong in ({"concurrency": 0}, {"rate": 0.0}):
        with pytest.raises(ValueError, match="leave it out for all at once"):
            Arrivals(**wrong)  # type: ignore[arg-type]


def test_a_summary() -> None:
    steady = Timing(0.0, [(0.5, 1), (0.6, 1), (0.8, 2)])
    assert (steady.ttft, steady.count) == (0.5, 4) and steady.tpot == pytest.approx(0.1)
    late, failed = Timing(1.0, [(2.0, 1)]), Timing(0.2, error="gone")
    found = summary([steady, late, failed], given=10)
    assert (found.seconds, found.requests, found.failed, found.output_tokens) == (2.0, 3, 1, 5)
    assert (found.output_tokens_per_s, found.total_tokens_per_s) == (2.5, 12.5)
    assert found.ttft is not None and (found.ttft.median, found.ttft.p99) == (750.0, 1000.0)
    assert found.tpot is not None and found.tpot.median == pytest.approx(100.0)
    assert found.itl is not None and found.itl.p99 == pytest.approx(200.0)
    nothing = summary([failed], 10)
    assert (nothing.failed, nothing.output_tokens, nothing.ttft) == (1, 0, None)


@pytest.mark.parametrize("name", ["e", "moe"])
def test_a_floor_is_made_of_what_must_be_read(name: str) -> None:
    """One row, by hand: each weight of the decoder and the head once, and of the experts those that are chosen."""
    model = demo(name).plain
    size, layers, config = 4, geometry(model.config).layers, model.config
    weights = {n: p.numel() * size for n, p in model.named_parameters() if "embed_tokens_per_layer" not in n}
    expected = sum(weights.values())
    if experts := sum(size for n, size in weights.items() if ".experts." in n):
        expected -= experts * (1 - config.top_k_experts / config.num_experts)
    cached = sum(2 * layer.kv_heads * layer.head_dim * size * 100 for layer in layers)
    found = floor(model, Workload(90, 20, 1), 1, Rates(1.0, 1e9), size)
    assert found.decode_step == pytest.approx(expected + cached)
    assert found.decode == 19 * found.decode_step and 0 < found.prefill < 2 * 90 * expected / size / 1e9
    assert floor(model, Workload(90, 20, 8), 4, Rates(1.0, 1e9), size).decode < 4 * 19 * found.decode_step


def test_forced_acceptance() -> None:
    assert sum(acceptance._chance(2.8, 3) ** i for i in range(4)) == pytest.approx(2.8)
    with pytest.raises(ValueError, match="tokens a round must be 1 to 4 with 3 drafts, got 5"), acceptance.forced(5, 3):
        pass


def test_a_table_and_a_plot(tmp_path: Path) -> None:
    found = summary([Timing(0.0, [(0.5, 1), (0.6, 1)])], 10)
    rows = [
        Row("ours", "e", mtp, "10/2x1", f"{n} at a time", found, 0.3, memory={"weights": 2**30})
        for mtp in ("off", "2.8")
        for n in (1, 2)
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 5 and "x2.00" in lines[1] and "failed" not in lines[0] and "tok/round" not in lines[0]
    plot(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["bench", *arguments, "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"].startswith("gemma4-compile ") and found["torch"]
    return found["rows"]


def test_the_demo_with_drafts_beside_plain_hugging_face(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--demo",
        "--workloads",
        "20/6x3",
        "--mtp",
        "off,on",
        "--against",
        "hf-eager,optimize",
        "--agreement",
        "3",
        "--dtype",
        "float32",
    )
    eager, optimized, ours, drafted = bench(capsys, *arguments, "--concurrency", "2")
    assert [row["system"] for row in (eager, optimized, ours, drafted)] == ["hf-eager", "optimize", "ours", "ours"]
    assert ours["agreement"] == drafted["agreement"] == 1.0
    assert ours["tokens_a_round"] is None and 1 <= drafted["tokens_a_round"] <= 4 and 0 <= drafted["acceptance"] <= 1
    assert eager["host_ms"] is None and ours["host_ms"] > 0
    for row in (eager, optimized, ours, drafted):
        assert row["summary"]["output_tokens"] == 18 and not row["summary"]["failed"]
        assert row["summary"]["e2e"]["p99"] >= row["summary"]["ttft"]["median"] > 0


def test_forced_tokens_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = bench(capsys, "--demo", "--workloads", "20/60x8", "--mtp", "2.2", "--dtype", "float32")
    assert row["mtp"] == "2.2" and row["tokens_a_round"] == pytest.approx(2.2, abs=0.35) and row["agreement"] is None


def test_random_weights_at_a_rate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = demo("e").plain.config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (row,) = bench(capsys, str(tmp_path / "config.json"), "--workloads", "5/3x4", "--rate", "20", "--dtype", "float32")
    assert row["arrivals"] == "20/s" and row["summary"]["output_tokens"] == 12 and row["memory"]["weights"] > 10**6


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as found:
        yield found


def test_a_server_at_a_url(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = bench(capsys, "--url", served.url, "--workloads", "20/6x4")
    assert (row["system"], row["model"], row["summary"]["output_tokens"]) == ("url", "e", 24)


def test_requests_that_a_server_refuses_are_counted(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", served.url, "--workloads", "20/6x2", "--vocabulary", "99999", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["summary"]["failed"] == 2
    with pytest.raises(OSError, match="a server must answer at http://127.0.0.1:1/v1/models"):
        at_url.model_at("http://127.0.0.1:1")


STAND_IN = """
import sys
from gemma4_compile.cli import main
from gemma4_compile.geometry import geometry
given = sys.argv[1:]
named = dict(zip(given[1::2], given[2::2]))
main(["serve", given[0], "--port", named["--port"], "--served-model-name", named["--served-model-name"], "--device", "cpu",
      "--max-requests", named["--max-num-seqs"], "--no-access-log"])
"""


@pytest.mark.load
def test_a_stand_in_for_vllm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    command = f"{sys.executable} {tmp_path / 'stand_in.py'}"
    theirs, ours = bench(capsys, "--demo", "--workloads", "20/6x4", "--against", "vllm", "--vllm-command", command)
    assert (theirs["system"], ours["system"]) == ("vllm", "ours")
    assert theirs["summary"]["output_tokens"] == ours["summary"]["output_tokens"] == 24


def test_what_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(ImportError, match="--against vllm needs no-such-program"),
        vllm.served(tmp_path, "no-such-program", 8, 1),
    ):
        pass
    with pytest.raises(OSError, match="a server must come up"), vllm.served(tmp_path, f"{sys.executable} -c 1", 8, 1):
        pass
    with pytest.raises(ValueError, match="--against must name hf-eager"):
        Plan((workload("one"),), against=("vlm",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench needs MODEL, --demo or --url"),
        (["e", "--demo"], "bench needs MODEL, --demo or --url"),
        (["--demo", "--workloads", "x"], "a workload must be"),
        (["--demo", "--against", "x"], "--against must name"),
        (["--demo", "--concurrency", "0"], "concurrency must be 1 or more"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err
