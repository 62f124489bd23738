"""gemma4-compile vllm-report: what the plug-in did to the graphs that vLLM has compiled."""

import argparse
import json
from pathlib import Path
from typing import Any

from .common import as_dict


def add_vllm(commands: Any) -> None:
    report = commands.add_parser("vllm-report", help="print which fusions matched in vLLM's graphs, by its cache of them")
    report.add_argument("--cache", type=Path, metavar="DIR", help="default: where vLLM keeps compiled graphs")
    report.add_argument("--json", action="store_true", help="print the result as JSON")
    report.set_defaults(func=_report)


def _report(options: argparse.Namespace) -> int:
    from gemma4_compile.vllm.report import cache_folder, written

    folder = options.cache or cache_folder()
    found = written(folder)
    if not found:
        raise ValueError(
            f"no report in {folder}: vLLM has compiled no Gemma 4 with the plug-in; start it with GEMMA4_COMPILE_VLLM=1"
        )
    if options.json:
        print(json.dumps([{"file": str(path), "graph": graph, "report": as_dict(report)} for path, graph, report in found]))
    else:
        print("\n\n".join(f"{graph}, {path.parent}\n{report}" for path, graph, report in found))
    return 0
