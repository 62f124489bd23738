#!/usr/bin/env bash
# Build the sdist and the wheel, install the wheel into an empty venv, and run the demo from there.
#
#     scripts/check_wheel.sh            with the python on PATH, which has the project's dependencies and `build`
#
# The dependencies are not installed again, which would take minutes: a .pth file lends those of this python. Of the project the
# new venv has the wheel alone, as a .pth file in a folder that is lent is not read.
set -euo pipefail
cd "$(dirname "$0")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

echo "== sdist, and a wheel from it; a wheel from the tree"
mkdir "$work/tree"
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- --ignore-failed-read | tar --extract --directory "$work/tree"
python -m build --outdir "$work/from_sdist" "$work/tree" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
python -m build --wheel --outdir "$work/from_tree" "$work/tree" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
python - "$work"/from_sdist/*.whl "$work"/from_tree/*.whl <<'PYTHON'
import sys
from pathlib import Path
from zipfile import ZipFile

first, second = (ZipFile(path) for path in sys.argv[1:])
names = set(first.namelist())
assert names == set(second.namelist()), names ^ set(second.namelist())
assert all(first.read(name) == second.read(name) for name in names if not name.endswith("RECORD"))
sources = {path for folder in ("passes", "patterns") for path in Path(folder).glob("*.py")}
sources |= {path for path in Path("gemma4_compile").rglob("*") if path.suffix in {".py", ".typed", ".json", ".safetensors", ".j2", ".css", ".js"}}
wanted = {str(path if path.parts[0] == "gemma4_compile" else Path("gemma4_compile", path)) for path in sources}
assert wanted <= names, sorted(wanted - names)
assert {"gemma4_compile/py.typed", "gemma4_compile/passes/base.py", "gemma4_compile/demo/e/assistant/model.safetensors"} <= names
print(f"{len(names)} files, {Path(sys.argv[1]).stat().st_size / 1e6:.1f} MB, the same from both")
PYTHON

echo "== the wheel in an empty venv"
python -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$work"/from_sdist/*.whl
python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"
cd "$work"
"$work/venv/bin/python" - "$work/venv" <<'PYTHON'
import sys

import gemma4_compile
from gemma4_compile import passes, patterns

for module in (gemma4_compile, passes, patterns):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
PYTHON
"$work/venv/bin/gemma4-compile" demo --max-tokens 8
