"""What Hopper's attention kernel is launched with; the kernel runs in tests/gpu/test_attention.py."""

from itertools import product

import pytest
import torch

from gemma4_compile.ops.attention_hopper import _matrix_of, hopper_plan


@pytest.mark.parametrize("layout", ("rows before heads", "heads before rows", "one page", "one head"))
def test_pages_are_a_matrix(layout: str):
    """Each row of each head is where the copy engine is told to look."""
    pages, page, heads, dim = {"one page": (1, 6, 2, 8), "one head": (3, 4, 1, 8)}.get(layout, (3, 4, 2, 8))
    made = torch.arange(pages * page * heads * dim).bfloat16().view(pages, page, heads, dim)
    if layout == "heads before rows":
        made = made.transpose(1, 2).contiguous().transpose(1, 2)
    found = _matrix_of(made)
    assert found is not None
    for which, head, row in product(range(pages), range(heads), range(page)):
        start = head * found.head_columns
        line = found.rows[which * found.page_rows + head * found.head_rows + row]
        assert torch.equal(line[start : start + dim], made[which, row, head])


def test_other_strides_are_left():
    odd_rows = torch.zeros(2, 4, 1, 10, dtype=torch.bfloat16)[..., :8]  # not at multiples of 16 bytes
    odd_pages = torch.zeros(100, dtype=torch.bfloat16).as_strided((2, 4, 1, 8), (44, 8, 8, 1))  # not at a row
    assert _matrix_of(odd_rows) is None and _matrix_of(odd_pages) is None


def test_plans_by_shape_class():
    assert hopper_plan(8000, 1, 1, 8, 512, 8192) == (1,)  # a prompt
    assert hopper_plan(256, 1, 1, 8, 512, 8192) == (4,)  # 32 tiles on 132 processors
    assert hopper_plan(80, 80, 1, 8, 512, 8192) == (1,)
    assert hopper_plan(80, 80, 2, 8, 512, 8192) == (2,)  # 160 tiles: two rounds
    assert hopper_plan(320, 80, 4, 8, 512, 8192) == (1,)
    assert hopper_plan(32, 32, 1, 8, 512, 8192) == (4,)
    assert hopper_plan(32, 32, 1, 8, 512, 100) == (2,)  # no more than blocks of keys
    assert hopper_plan(1, 1, 1, 8, 512, 8192) == hopper_plan(4, 1, 1, 8, 512, 8192) == (32,)
    assert hopper_plan(4, 4, 1, 8, 512, 8192) == (16,)
    assert hopper_plan(1, 1, 1, 8, 512, 4096) is None
    assert hopper_plan(30, 30, 1, 8, 256, 8192) == (2,)
    assert hopper_plan(16, 16, 1, 8, 256, 8192) is None
    assert hopper_plan(80, 80, 1, 8, 256, 8192) == (1,)
    assert hopper_plan(80, 80, 8, 2, 256, 8192) is None  # two of a tile's 64 rows
    assert hopper_plan(8000, 1, 1, 8, 256, 8192) is None


def test_plans_for_any_shape():
    for rows, requests, kv_heads, group, dim, keys in product(
        (0, 1, 5, 100, 3000), (0, 1, 8, 200), (1, 2, 8), (1, 3, 8, 32), (256, 512), (16, 131072)
    ):
        plan = hopper_plan(rows, requests, kv_heads, group, dim, keys)
        assert plan is None or plan.splits in (1, 2, 4, 8, 16, 32) and plan.splits <= max(1, 2 * keys // 64)
