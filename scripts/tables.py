"""Tables of the documentation, written from the records in benchmarks/.

    python scripts/tables.py            rewrite each block  <!-- table: NAME -->...<!-- end -->  of README.md and docs/
    python scripts/tables.py --check    write nothing; exit 1 if a block differs from its records

A document holds a table once, between its two marks; what it says of the numbers around them is prose.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gemma4_compile.demo import DEMO_NAMES, demo_checkpoint  # noqa: E402
from scripts import _demo_table, bench_experts, bench_linear, bench_ops  # noqa: E402

BLOCK = re.compile(r"(?<=<!-- table: )(?P<name>[\w-]+)( -->\n)(?P<table>.*?)(?=<!-- end -->)", re.DOTALL)


def records(name: str) -> Any:
    """A file of benchmarks/."""
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; the first column's title is left out where it is empty."""
    lines = [" | ".join(["", *head, ""]).strip(), "|---" * len(head) + "|"]
    return "\n".join(lines + [" | ".join(["", *map(str, row), ""]).strip() for row in rows])


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# docs/fusions.md


def ops(*names: str) -> str:
    """Ours / Inductor = gain, of these ops."""
    result = records("ops-h200")
    return bench_ops.markdown(result | {"rows": [row for name in names for row in result["rows"] if row["op"] == name]})


def attention_qkv() -> str:
    rows = records("attention-qkv-h100")["rows"]
    counts = sorted({row["tokens"] for row in rows})
    cells = {
        (row["model"], row["tokens"]): f"{row['norms_with_write_us']:.2f} / {row['norms_then_write_us']:.2f} = "
        f"**{row['norms_then_write_us'] / row['norms_with_write_us']:.2f}**"
        for row in rows
    }
    models = dict.fromkeys(row["model"] for row in rows)
    return markdown(["model", *map(str, counts)], [[model, *(cells[model, n] for n in counts)] for model in models])


# docs/engine.md, docs/tensor_parallel.md

ENGINE = (
    "engine-e2b-h200", "engine-e2b-later-h200", "engine-26b-h200", "engine-dependent-h200",
    "engine-e2b-hopper-h200", "engine-26b-hopper-h200", "bench-e2b-one-h200", "bench-12b-h200",
    "bench-e2b-products-h200",
)  # fmt: skip


def rows_of_engine(*names: str, mtp: bool = False) -> list[dict[str, Any]]:
    """Rows with vLLM's times beside them; of one workload in several files the last counts, in the place of the first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    theirs = records("vllm-h200")
    for name in names:
        for row in _engine_rows(records(name)):
            if (row["mtp"] != "off") == mtp:
                beside = theirs["mtp" if mtp else "alone"].get(row["model"], {}).get(row["workload"], ())
                found[row["model"], row["workload"]] = row | {"vllm": dict(zip(theirs["columns"], beside, strict=False))}
    return list(found.values())


def _engine_rows(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of `gemma4-compile bench --json`, or as bench_engine.py wrote them before that."""
    for model in record.get("models", []):
        drafted = "2.8" if "--mtp" in record["command"] else "off"
        for row in model["rows"]:
            yield row | {"model": model["model"], "mtp": drafted}
    for row in record.get("rows", []):
        found = row["summary"]
        yield {
            "model": row["model"], "mtp": row["mtp"], "workload": row["workload"], "seconds": found["seconds"],
            "ttft_ms": found["ttft"]["median"], "tpot_ms": found["tpot"]["median"],
            "host_ms_a_step": row.get("host_ms"),
        }  # fmt: skip


def workloads(*names: str, vllm: str = "vLLM s", mtp: bool = False) -> str:
    """Workloads beside vLLM's times."""

    def cells(row: dict[str, Any]) -> list[str]:
        theirs = row["vllm"]
        ratio = ""
        if theirs.get("seconds"):
            ratio = f"{row['seconds'] / theirs['seconds']:.2f}"
        elif theirs.get("tpot_ms"):
            ratio = f"{row['tpot_ms'] / theirs['tpot_ms']:.2f} (TPOT)"
        ours = (number(row["seconds"], 2), number(row["ttft_ms"], 0), number(row["tpot_ms"], 2))
        other = (theirs.get(key) for key in ("seconds", "ttft_ms", "tpot_ms"))
        others = ("" if value is None else f"{value:g}" for value in other)
        return [f"{row['model']} {row['workload']}", *ours, *others, ratio, number(row["host_ms_a_step"], 2)]

    head = ["workload", "s", "TTFT", "TPOT", vllm, "TTFT", "TPOT", "ratio", "host ms"]
    return markdown(head, map(cells, rows_of_engine(*names, mtp=mtp)))


def acceptance() -> str:
    """Records of before have draft positions p and p + 1, and verification by token, which are no choices any more."""
    rows = records("acceptance-cpu")["rows"]
    titles = {"hugging_face": "HF assisted, p + 1", "engine": "Engine", "offset_0": "p", "offset_1": "p + 1"}
    titles |= {
        f"{temperature}_{way}": f"T {temperature} {way}"
        for temperature in ("0.7", "1.0")
        for way in ("match", "token", "block")
    }
    order = [key for key in titles if key in rows[0]]
    cells = [[f"`{row['name']}`", *(number(row[key]["mean"], 2) for key in order)] for row in rows]
    return markdown(["", *(titles[key] for key in order)], cells)


def parallel() -> str:
    """TPOT on one GPU and on two; the floor is the weights that a rank reads over the copy bandwidth, where it reads all."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for run in records("engine-parallel-h200")["runs"]:
        for model in run["models"]:
            for row in model["rows"]:
                found.setdefault((model["model"], row["workload"].split("x")[1]), {})[model["ranks"]] = row["tpot_ms"]
    cells = [[*key, number(by[1], 2), number(by[2], 2), number(by[1] / by[2], 2)] for key, by in found.items()]
    return markdown(["model", "requests", "one GPU", "two", "gain"], cells)


def all_reduce_runs() -> dict[int, list[dict[str, Any]]]:
    """Rows of the last run by the number of ranks."""
    runs = records("all-reduce-h200")["runs"]
    return {ranks: next(run["rows"] for run in runs if run["ranks"] == ranks) for ranks in (2, 4)}


def all_reduce_of_two() -> str:
    head = ["op", "hidden", "tokens", "one-shot", "NCCL + ours", "Inductor", "FlashInfer + ours", "floor", "gain"]
    hidden = {"26B-A4B": 2816, "31B": 5376}
    keys = ("one-shot_us", "nccl+ours_us", "inductor_us", "flashinfer_us")
    cells = [
        [f"`{row['op']}`", hidden[row["model"]], row["tokens"], *(number(row[key], 1) for key in keys),
         number(row["floor_us"], 2), number(row["inductor_us"] / row["one-shot_us"], 2)]
        for row in all_reduce_runs()[2]
    ]  # fmt: skip
    return markdown(head, cells)


def hopper(kind: str) -> str:
    """A line a layer, a column for each batch: microseconds now, what other GPUs' plan takes, and the gain."""
    found: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row in records("hopper-h200")["rows"]:
        if row["kind"] != kind:
            continue
        name, _, batch = row["shape"].rpartition(", ")
        columns[batch] = None
        gain = f"{row['us']:.0f} / {row['before_us']:.0f} = **{row['before_us'] / row['us']:.2f}**"
        found.setdefault(name, {})[batch] = f"{gain} ({row['floor_us'] / row['us']:.0%})"
    return markdown(["", *columns], [[name, *(by.get(column, "") for column in columns)] for name, by in found.items()])


# docs/transforms.md


def prefill() -> str:
    head = ["", "without YOCO", "with", "ratio", "bar", "PFLOP with, of", "share of the FLOP floor, without / with"]
    bars = {"E2B": 1.5, "E4B": 1.3}
    cells = []
    for name in ("step-prefill-e2b-h200", "step-prefill-e4b-h200"):
        for row in records(name)["rows"]:
            whole, yoco = row["whole"], row["yoco"]
            cells.append([
                f"{row['model']}, {row['requests']} x {row['tokens']}", number(whole["total_s"], 2),
                f"**{yoco['total_s']:.2f}**", number(row["ratio"], 2), bars[row["model"]],
                f"{yoco['pflop']:.3f}, {whole['pflop']:.3f}",
                f"{whole['share_of_floor']:.0%}, {yoco['share_of_floor']:.0%}",
            ])  # fmt: skip
    return markdown(head, cells)


def decode() -> str:
    head = ["", "batch", "wall", "GPU busy", "share", "kernels", "floor (weights)"]
    cells = [
        [row["model"], row["batch"], number(row["wall_ms"], 2), number(row["busy_ms"], 2), f"{row['busy_share']:.1%}",
         row["kernels"], number(row["floor_ms"], 2)]
        for name in ("step-decode-e2b-h200", "step-decode-26b-h200") for row in records(name)["rows"]
    ]  # fmt: skip
    return markdown(head, cells)


def compiling() -> str:
    head = ["", "trace", "passes, split", "pieces", "first token", "second process", "pieces, unique"]
    cells = []
    for name in ("step-compile-e2b-h200", "step-compile-26b-h200"):
        for row in records(name)["rows"]:
            cold, stages = row["cold"], row["cold"]["steps_s"]
            cells.append([
                row["model"], *(number(stages[key], 1) for key in ("trace", "passes", "compile")),
                f"**{cold['first_token_s']:.1f}**", number(row["second"]["first_token_s"], 1),
                f"{cold['pieces']}, {cold['unique_pieces']}",
            ])  # fmt: skip
    return markdown(head, cells)


# docs/benchmarks.md

VARIANTS = {
    "eager": "eager", "inductor": "Inductor alone", "fused": "fused", "graphs": "fused, `cuda_graphs=True`",
    "all": "fused, with `geglu`", "graphed": "Inductor alone, graphed", "default": "default: fused, graphed",
}  # fmt: skip


def steps(*names: str, graphed: bool = False) -> str:
    """Decode steps of bench_model.py."""
    by_model: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for name in names:
        for row in records(name)["rows"]:
            by_model.setdefault((row["model"], row["batch"]), {}).setdefault(row["variant"], row)
    head = ["", "variant", "busy ms", "kernels", "graph ms", "wall ms", "compile s", "passes s", "sites"]
    cells = []
    for model, batch in sorted(by_model, key=lambda key: (key[0] != "E2B", key[1])):
        floor = next((row["floor_ms"] for row in by_model[model, batch].values() if row.get("floor_ms")), None)
        name = f"{model}, batch {batch}" + ("" if floor is None else f", floor {floor:.2f}")
        for variant, row in by_model[model, batch].items():
            sites = row.get("sites") or {}
            matched, expected = (sum(pair[i] for pair in sites.values()) for i in (0, 1))
            cells.append([
                name, VARIANTS[variant], number(row["busy_ms"], 2), row["kernels"], number(row["graph_ms"], 2),
                number(row["wall_ms"], 2), number(row.get("compile_s"), 1), number(row.get("passes_s"), 2),
                f"{matched}/{expected}" if sites else "",
            ])  # fmt: skip
    if graphed:
        head, cells = head[:4] + head[5:], [row[:4] + row[5:] for row in cells]
    return markdown(head, cells)


# README.md


def served() -> str:
    """Some of the rows of docs/engine.md."""
    alone, drafted = (
        {(row["model"], row["workload"]): row for row in rows_of_engine(*names, mtp=mtp)}
        for names, mtp in ((ENGINE, False), (("engine-e2b-mtp-h100", "bench-12b-h200", "bench-e2b-products-h200"), True))
    )
    chosen = [
        (alone, "E2B", "1024/1024x80"), (alone, "E2B", "8000/1000x80"), (alone, "E2B", "7000/10x30"),
        (alone, "E2B", "128/256x1"), (drafted, "E2B", "128/256x1"), (drafted, "E2B", "1024/1024x80"),
        (alone, "12B", "128/256x1"), (drafted, "12B", "128/256x1"), (alone, "12B", "1024/1024x80"),
        (alone, "26B-A4B", "128/256x1"), (alone, "26B-A4B", "1024/1024x80"), (alone, "26B-A4B", "3000/100x30"),
    ]  # fmt: skip
    cells = []
    for table, model, workload in chosen:
        row = table[model, workload]
        tokens, requests = workload.split("x")
        one, mtp = requests == "1", table is drafted
        key, digits, unit = ("tpot_ms", 2, " ms a token") if one else ("seconds", 2, " s")
        what = "one request" if one else f"{tokens} tokens in/out, {requests} requests"
        cells.append([
            f"{model}, {what}" + (", MTP, 2.8 tokens a round" if mtp else ""),
            f"{row[key]:.{digits}f}{unit}",
            f"{row['vllm'][key]:g}{unit}" if row["vllm"] else "",
        ])  # fmt: skip
    return markdown(["one H200, bf16, random weights", "ours", "vLLM 0.26, another day"], cells)


TABLES: dict[str, Callable[[], str]] = {
    "route": partial(ops, "route"),
    "experts": lambda: bench_experts.table(records("experts-h100")["rows"]),
    "ple-tail": partial(ops, "ple_tail_norm", "ple_tail"),
    "qkv-norm-rope": partial(ops, "qkv_norm_rope", "q_norm_rope"),
    "attention-qkv": attention_qkv,
    "norm-chains": partial(
        ops, "post_attention_norm", "post_attention_norms", "feed_forward_tail", "feed_forward_tail_norm",
        "moe_feed_forward_tail", "moe_feed_forward_tail_norm",
    ),
    "ple-inputs": partial(ops, "ple_inputs", "ple_combine"),
    "linear": lambda: bench_linear.markdown(records("linear-h200")["rows"]),
    "alone": partial(ops, "geglu", "rms_norm", "rms_norm_noscale", "rope"),
    "engine": partial(workloads, *ENGINE),
    "mtp": partial(
        workloads, "engine-e2b-mtp-h100", "engine-26b-mtp-h100", "bench-12b-h200", "bench-e2b-products-h200",
        vllm="vLLM s (H200)", mtp=True,
    ),
    "acceptance": acceptance,
    "parallel": parallel,
    "all-reduce": all_reduce_of_two,
    "hopper-attention": partial(hopper, "attention"),
    "hopper-experts": partial(hopper, "experts"),
    "hopper-products": lambda: bench_linear.markdown(records("products-h200")["rows"], bench_linear.chosen_on_hopper),
    "prefill": prefill,
    "decode": decode,
    "compile": compiling,
    "steps": partial(steps, "model-h200"),
    "steps-graphed": partial(steps, "model-graphed-e2b-h200", "model-graphed-26b-h200", graphed=True),
    "served": served,
    "demo": lambda: _demo_table.table(_demo_table.read_records(demo_checkpoint("e").parent, DEMO_NAMES)),
}  # fmt: skip


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def written(text: str) -> str:
    """A document with its tables as the records have them. KeyError for a table that nobody makes."""
    return BLOCK.sub(lambda block: f"{block['name']} -->\n{TABLES[block['name']]()}\n", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [(path, new) for path in documents() if (new := written(text := path.read_text())) != text]
    for path, new in stale:
        if not check:
            path.write_text(new)
        print(f"{path.relative_to(ROOT)}: {'stale, run scripts/tables.py' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
