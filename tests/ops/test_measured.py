"""What is on by default is so because a benchmark measured it: no claim outlives its numbers."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from gemma4_compile.ops import OPS
from gemma4_compile.ops.plans import norm_products_plan
from gemma4_compile.passes import FUSIONS
from scripts import bench_experts, bench_hopper
from scripts.bench_linear import chosen, chosen_on_hopper

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def rows_of(name: str) -> list[dict[str, Any]]:
    return json.loads((BENCHMARKS / name).read_text())["rows"]


ROWS, PRODUCTS = rows_of("ops-h200.json"), rows_of("linear-h200.json")
NORMED = rows_of("normed-h200.json")
INTO_PAGES, EXPERTS = rows_of("attention-qkv-h100.json"), rows_of("experts-h100.json")
OPS_OF_FUSIONS = [op for fusion in FUSIONS.values() for op in fusion.ops]
ON = {op for fusion in FUSIONS.values() if fusion.on_by_default for op in fusion.ops}


def test_each_op_belongs_to_one_fusion_and_was_measured() -> None:
    assert len(OPS_OF_FUSIONS) == len(set(OPS_OF_FUSIONS))
    assert set(OPS_OF_FUSIONS) <= set(OPS)
    matrices = {
        "gate_up" if row["gated"] else ("linear", "linear_pair", "linear_triple")[len(row["matrices"]) - 1] for row in PRODUCTS
    }
    measured = {row["op"] for row in ROWS} | matrices | {"experts"}
    normed = {op for op in OPS_OF_FUSIONS if op.startswith(("norm_gate_up", "norm_ple", "norm_linear"))}
    assert set(OPS_OF_FUSIONS) - normed <= measured


def test_norms_inside_products_pay() -> None:
    """In a chain of a whole step, where the wait is that they save; with the plans that are in use."""
    used = {"gate_up:16,512,3,4": "norm_gate_up", "ple": "norm_ple", "ple+linear:8,512,3,4": "norm_linear"}
    less = {(row["variant"], row["rows"]): row["less_us"] for row in NORMED}
    for (variant, op), rows in itertools.product(used.items(), (1, 2)):
        assert op in ON and less[variant, rows] > 15, variant
    assert less["ple+linear:8,512,3,4", 1] > less["ple", 1] + 10
    plans = [norm_products_plan(1, outputs, 1536, gated) for outputs, gated in ((6144, True), (2560, False))]
    assert [plan and plan.outputs for plan in plans] == [16, 8]


@pytest.mark.parametrize("row", [r for r in ROWS if r["op"] in OPS_OF_FUSIONS], ids="{0[op]}-{0[model]}-{0[tokens]}".format)
def test_where_a_site_is_fused_it_pays(row: dict[str, Any]) -> None:
    """No measured model is more than 3% slower than Inductor's own code for the same subgraph."""
    if row["op"] in ON:
        assert row["inductor_us"] / row["ours_us"] >= 0.97


def test_what_is_off_does_not_pay_everywhere() -> None:
    for fusion in FUSIONS.values():
        if not fusion.on_by_default:
            assert min(row["inductor_us"] / row["ours_us"] for row in ROWS if row["op"] in fusion.ops) < 0.97


@pytest.mark.parametrize("row", PRODUCTS, ids="{0[model]}-{0[product]}-{0[rows]}".format)
def test_the_plan_of_a_product_was_measured_and_is_no_slower_than_cublas(row: dict[str, Any]) -> None:
    assert row["cublas_us"] / chosen(row) >= 0.97


@pytest.mark.parametrize("row", rows_of("products-h200.json"), ids="{0[model]}-{0[product]}-{0[rows]}".format)
def test_hoppers_plan_of_a_product_was_measured_and_is_no_slower(row: dict[str, Any]) -> None:
    """With the norm in front of it, as a step has it: than cuBLAS, and nearly than other GPUs' plan and the best of its own."""
    taken = chosen_on_hopper(row)
    assert row["cublas_us"] / taken >= 0.97
    assert min(row["others_us"] or taken, *row["plans_us"].values()) / taken >= 0.88


@pytest.mark.parametrize("row", EXPERTS, ids="{0[tokens]}".format)
def test_the_plan_of_the_experts_was_measured_and_is_no_slower_than_grouped_mm(row: dict[str, Any]) -> None:
    assert row["grouped_mm_us"] / bench_experts.chosen(row) >= 0.97


@pytest.mark.parametrize("row", INTO_PAGES, ids="{0[model]}-{0[tokens]}".format)
def test_writing_into_pages_at_once_is_no_slower(row: dict[str, Any]) -> None:
    assert row["norms_then_write_us"] / row["norms_with_write_us"] >= 0.97
    assert row["apart_us"] / row["fused_us"] >= 0.97


@pytest.mark.parametrize("row", rows_of("hopper-h200.json"), ids="{0[shape]}".format)
def test_hoppers_kernels_run_where_they_are_no_slower(row: dict[str, Any]) -> None:
    if bench_hopper.taken(row):
        assert row["before_us"] / row["us"] >= 0.97
