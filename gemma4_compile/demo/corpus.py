"""The demo corpus: source files of Python's standard library, split by module name.

Owns the split and the cutting of held-out prompts. Reads the running interpreter's own library; no text is stored here.
Knows nothing about models.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Never trained on, nor their tests (test_<name>*.py, any folder). Each is in Python 3.10 to 3.14.
HELD_OUT_MODULES = (
    "calendar", "cmd", "colorsys", "configparser", "csv", "difflib", "fileinput", "fnmatch", "fractions", "getopt",
    "glob", "graphlib", "gzip", "heapq", "ipaddress", "netrc", "plistlib", "queue", "reprlib", "sched", "selectors",
    "shelve", "statistics", "string", "tempfile", "textwrap", "timeit", "zipapp",
)  # fmt: skip

# Tables and generated files: they would teach the model digits, not Python.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "cjkencodings"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "bad_coding", "bad_getattr", "badsyntax")


def stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_source(path: Path) -> str | None:
    """The text of a source file with "\\n" line ends; None if it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def is_held_out(relative: Path) -> bool:
    """Whether a file (its path below the library's root) is a held-out module or a test of one."""
    if len(relative.parts) == 1 and relative.stem in HELD_OUT_MODULES:
        return True
    if relative.parts[0] in HELD_OUT_MODULES:  # `string` and `pathlib`-like modules that became packages
        return True
    parts = [*relative.parts[:-1], relative.stem]
    return any(p == f"test_{name}" or p.startswith(f"test_{name}_") for p in parts for name in HELD_OUT_MODULES)


def training_files(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """(path below root, text) of each file to train on, sorted by path."""
    root = root or stdlib_root()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith(_SKIPPED_PREFIXES):
            continue
        if is_held_out(relative):
            continue
        text = read_source(path)
        if text and text.strip():
            yield relative.as_posix(), text


def held_out_files(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """(module name, text) of each held-out module, in the order of HELD_OUT_MODULES."""
    root = root or stdlib_root()
    for name in HELD_OUT_MODULES:
        path = root / f"{name}.py"
        if not path.exists():
            path = root / name / "__init__.py"
        text = read_source(path) if path.exists() else None
        if text:
            yield name, text


def held_out_prompts(
    tokenizer: Any, count: int, min_tokens: int, max_tokens: int, seed: int = 0, root: Path | None = None
) -> list[list[int]]:
    """Prompts cut from the held-out modules of the running interpreter: the same for the same seed and library.

    tokenizer    the demo's own (AutoTokenizer of a target folder)
    count        number of prompts
    min_tokens   shortest prompt in tokens, <bos> counted in; >= 2
    max_tokens   longest prompt in tokens; a prompt ends at a line's end where one lies in reach
    returns      count lists of token ids, each beginning with <bos>; `tokenizer.decode(ids)` shows one

    Raises ValueError for an empty range, or when no module is long enough.
    """
    if not 2 <= min_tokens <= max_tokens:
        raise ValueError(
            f"min_tokens, max_tokens must satisfy 2 <= min <= max, got {min_tokens}, {max_tokens}; use e.g. 64, 256"
        )
    chooser = random.Random(seed)
    sources = [text for _, text in held_out_files(root)]
    if not sources:
        raise ValueError(f"the standard library must hold source files, got none in {root or stdlib_root()}; pass root=")
    prompts: list[list[int]] = []
    for _ in range(50 * count):
        if len(prompts) == count:
            break
        lines = chooser.choice(sources).splitlines(keepends=True)
        starts = [i for i, line in enumerate(lines) if line.startswith(("def ", "class ", "import ", "from ", '"""'))]
        length = chooser.randint(min_tokens, max_tokens)
        text = "".join(lines[chooser.choice(starts) :])[: 12 * max_tokens]
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        if len(ids) <= length:
            continue
        end = length
        while end > min_tokens and not tokenizer.decode([ids[end]]).startswith("\n"):
            end -= 1
        prompts.append(ids[: end if end > min_tokens else length])
    if len(prompts) < count:
        raise ValueError(f"max_tokens must fit the held-out modules, got {max_tokens} for {count} prompts; use <= 4096")
    return prompts
