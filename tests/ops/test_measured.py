"""measured.py says what the benchmark measured: no claim outlives its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma4_compile.ops import OPS
from gemma4_compile.ops.measured import (
    ATTENTION_QKV_BENCHMARK,
    BENCHMARK,
    EXPERTS_BENCHMARK,
    FUSIONS,
    PRODUCTS_BENCHMARK,
    pays,
)
from scripts import bench_experts
from scripts.bench_linear import chosen

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / BENCHMARK).read_text())["rows"]
PRODUCTS = json.loads((ROOT / PRODUCTS_BENCHMARK).read_text())["rows"]
INTO_PAGES = json.loads((ROOT / ATTENTION_QKV_BENCHMARK).read_text())["rows"]
EXPERTS = json.loads((ROOT / EXPERTS_BENCHMARK).read_text())["rows"]
OF_FUSIONS = [op for fusion in FUSIONS.values() for op in fusion.pays]


def test_each_op_belongs_to_one_fusion_and_was_measured():
    assert len(OF_FUSIONS) == len(set(OF_FUSIONS))
    assert set(OF_FUSIONS) <= set(OPS)
    matrices = {
        "gate_up" if row["gated"] else ("linear", "linear_pair", "linear_triple")[len(row["matrices"]) - 1] for row in PRODUCTS
    }
    assert set(OF_FUSIONS) <= {row["op"] for row in ROWS} | matrices | {"experts"}


@pytest.mark.parametrize("row", [r for r in ROWS if r["op"] in OF_FUSIONS], ids="{0[op]}-{0[model]}-{0[tokens]}".format)
def test_where_it_is_said_to_pay_it_does(row: dict):
    gain = row["inductor_us"] / row["ours_us"]
    if pays(row["op"], row["tokens"]):
        assert gain >= 0.97


@pytest.mark.parametrize("row", PRODUCTS, ids="{0[model]}-{0[product]}-{0[rows]}".format)
def test_the_plan_of_a_product_was_measured_and_is_no_slower_than_cublas(row: dict):
    assert row["cublas_us"] / chosen(row) >= 0.97


@pytest.mark.parametrize("row", EXPERTS, ids="{0[tokens]}".format)
def test_the_plan_of_the_experts_was_measured_and_is_no_slower_than_grouped_mm(row: dict):
    assert row["grouped_mm_us"] / bench_experts.chosen(row) >= 0.97


@pytest.mark.parametrize("row", INTO_PAGES, ids="{0[model]}-{0[tokens]}".format)
def test_writing_into_pages_at_once_is_no_slower(row: dict):
    assert row["norms_then_write_us"] / row["norms_with_write_us"] >= 0.97
    assert row["apart_us"] / row["fused_us"] >= 0.97


@pytest.mark.parametrize("op", OF_FUSIONS)
def test_ranges(op: str):
    ranges = next(fusion.pays[op] for fusion in FUSIONS.values() if op in fusion.pays)
    for low, high in ranges:
        assert pays(op, low)
        assert not pays(op, low - 1)
        assert pays(op, 10**6) if high is None else not pays(op, high + 1)
