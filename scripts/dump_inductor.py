"""Inductor's own debug dump of one step of a plain or optimized model: FX graphs, IR before and after fusion, output code.

    python scripts/dump_inductor.py e --out dump            # with our passes
    python scripts/dump_inductor.py e --out dump --plain    # the same step through Inductor without them

`gemma4-compile inspect` explains what these files hold; this is for those who want only them.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from torch._dynamo.exc import Unsupported

from gemma4_compile.cli.common import add_common, add_model, config_of, load_model
from gemma4_compile.inspection.capture import Recorder
from gemma4_compile.inspection.files import check_folder, whole_or_nothing
from gemma4_compile.inspection.run import compile_part
from gemma4_compile.inspection.step import STEPS, default_step, inspected_part
from gemma4_compile.passes import pipeline, prepare
from gemma4_compile.vision.encoder import fusions_in


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new or empty folder")
    parser.add_argument("--plain", action="store_true", help="without our passes")
    parser.add_argument("--step", choices=STEPS, default="decode", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="sequences, or images (default: %(default)s)")
    parser.add_argument("--context", type=int, help="tokens: cached, of the prefill (default: 1024), or of an image (280)")
    parser.add_argument("--force", action="store_true", help="replace an earlier dump in DIR")
    add_common(parser)
    options = parser.parse_args()
    try:
        check_folder(options.out, options.force)
        model, _ = load_model(options)
        with whole_or_nothing(options.out, ("torchinductor",)) as draft:
            dump(inspected_part(model, options.step), draft, options)
    except (ValueError, TypeError, OSError, Unsupported) as error:
        print(f"dump_inductor: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    for path in sorted(path for path in options.out.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>10,} B  {path}")
    return 0


def dump(target: torch.nn.Module, folder: Path, options: argparse.Namespace) -> None:
    """One step of a part of the model with Inductor's trace on, into folder/torchinductor."""
    config = config_of(options)
    prepare()
    enabled = fusions_in(target.config, config.enabled())
    passes = () if options.plain else pipeline(enabled)
    tracing = {"trace.enabled": True, "trace.debug_dir": str(folder)}
    recorder = Recorder(config, enabled, steps=passes, options=tracing)
    compiled = compile_part(target, recorder)
    step = default_step(target, compiled.geometry, options.step, options.batch, options.context)
    with torch.inference_mode():
        compiled(**step.inputs())
    if not recorder.graphs:
        raise ValueError(
            f"the step must compile, but it ran as Hugging Face wrote it: {compiled.eager_reason}; use another step"
        )
    for other in [path for path in folder.iterdir() if path.name != "torchinductor"]:
        shutil.rmtree(other) if other.is_dir() else other.unlink()


if __name__ == "__main__":
    sys.exit(main())
