"""docs/demo.md shows the numbers of the committed records."""

from pathlib import Path

from gemma4_compile.demo import DEMO_NAMES, demo_checkpoint
from scripts._demo_table import read_records, table

ROOT = Path(__file__).resolve().parents[2]


def test_table_is_the_records():
    assert table(read_records(demo_checkpoint("e").parent, DEMO_NAMES)) in (ROOT / "docs" / "demo.md").read_text()
