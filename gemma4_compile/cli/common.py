"""What several commands share: their arguments, and the model that these name."""

import argparse
from dataclasses import asdict
from typing import Any

from gemma4_compile.torchrun import launched_rank, launched_ranks

DEMO_PROMPT = 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self'


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that `load_model` reads, but for those that all commands share."""
    parser.add_argument(
        "model",
        help='"e", "moe", "vision", a checkpoint folder or hub id; with random weights a config.json, E2B, E4B, 12B, ...',
    )
    parser.add_argument("--layers", type=int, metavar="K", help="cut a bare config to so many layers")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's; bfloat16 for a config"
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Device, fusions, output form."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--disable", default="", metavar="NAME,...", help="fusions to switch off")
    parser.add_argument("--enable", default="", metavar="NAME,...", help="fusions to switch on that are off by default")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def config_of(options: argparse.Namespace) -> Any:
    """The OptimizeConfig of --enable and --disable."""
    from gemma4_compile import OptimizeConfig

    def names(text: str) -> tuple[str, ...]:
        return tuple(name for name in text.split(",") if name)

    return OptimizeConfig(enable=names(options.enable), disable=names(options.disable), progress=launched_rank() == 0)


def load_model(options: argparse.Namespace, text_only: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer or None) of what the command line names; `text_only` leaves towers out. Raises ValueError for what
    cannot be loaded."""
    import torch

    from gemma4_compile import demo_checkpoint
    from gemma4_compile.demo import DEMO_NAMES, VISION_DEMO
    from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
    from gemma4_compile.hf.loading import checkpoint, load, random_model, random_multimodal, tokenizer_of

    config_of(options)  # a wrong name must not cost the time of loading
    is_demo = options.model in (*DEMO_NAMES, VISION_DEMO)
    name, layers = (getattr(options, field, None) for field in ("dtype", "layers"))  # which not all commands have
    dtype = getattr(torch, name) if name else None
    if launched_ranks() > 1:
        from gemma4_compile.hf import parallel

        folder = demo_checkpoint(options.model) / "target" if is_demo else checkpoint(options.model)[0]
        return parallel.load(folder, dtype=dtype, device=options.device), tokenizer_of(folder)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can see, got none; use --device cpu")
    if options.model.endswith(".json") or options.model in TEXT_CONFIGS:
        dtype = dtype or torch.bfloat16
        if getattr(options, "step", None) != "images":
            return random_model(options.model, layers, device, dtype), None
        # The tower alone is looked at: it has its real size, the text model beside it a small one.
        vision = {"num_hidden_layers": layers} if layers else {}
        small = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 1024}
        return random_multimodal(options.model, 4, device, dtype, vision=vision, **small), None
    if layers:
        raise ValueError(f"--layers cuts a bare config, got {options.model}; leave it out")
    folder = demo_checkpoint(options.model) / "target" if is_demo else options.model
    return load(folder, device, dtype, text_only)


def as_dict(report: Any) -> dict[str, Any]:
    """A Report as plain JSON data."""
    return asdict(report)
