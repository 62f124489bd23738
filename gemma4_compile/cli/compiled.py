"""gemma4-compile demo, report and inspect: a compiled model on the command line."""

import argparse
import json
import time
from typing import Any

from .common import DEMO_PROMPT, add_common, add_model, as_dict, config_of, load_model

_DEMO_BYTES = 64 << 20  # of keys and values: one request


def add_compiled(commands: Any) -> None:
    """Add the three commands to the parser's."""
    demo = commands.add_parser("demo", help="a compiled Gemma 4 writes text, then reports its fusions")
    demo.add_argument("--model", help='"e", "moe" or "vision" for an embedded demo checkpoint, or a checkpoint folder')
    demo.add_argument("--prompt", help="text to go on from, or a question about the image")
    demo.add_argument(
        "--image", nargs="?", const="", metavar="PATH", help="ask about this picture; without PATH, about one that is drawn"
    )
    demo.add_argument("--max-tokens", type=int, default=120, help="new tokens to generate (default: %(default)s)")
    demo.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=3, help="of the sampling (default: %(default)s)")
    add_common(demo)
    demo.set_defaults(func=_demo)

    report = commands.add_parser("report", help="compile a model and print which fusions matched")
    add_model(report)
    add_common(report)
    report.set_defaults(func=_report)

    inspect = commands.add_parser("inspect", help="show each kernel of a step, from the model's line to the code, as a page")
    add_model(inspect)
    inspect.add_argument("--out", required=True, metavar="DIR", help="new or empty folder for the page and the dumps")
    inspect.add_argument("--compare", choices=("plain",), help="compile and measure the step without our passes beside it")
    inspect.add_argument("--layer", type=int, metavar="N", help="list the kernels of this layer (default: one of each kind)")
    inspect.add_argument("--step", choices=("decode", "prefill", "images"), default="decode", help="default: %(default)s")
    inspect.add_argument("--batch", type=int, default=1, help="sequences, or images (default: %(default)s)")
    inspect.add_argument("--context", type=int, help="tokens: cached, of the prefill (default: 1024), or of an image (280)")
    inspect.add_argument("--cache", choices=("static", "dynamic"), default="static", help="of a decode (default: %(default)s)")
    inspect.add_argument("--force", action="store_true", help="replace what an earlier inspection left in DIR")
    add_common(inspect)
    inspect.set_defaults(func=_inspect)


def _demo(options: argparse.Namespace) -> int:
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {options.max_tokens}; use 120")
    if options.temperature < 0:
        raise ValueError(f"--temperature must be 0 (greedy) or more, got {options.temperature}; use 0.8")
    if options.image is not None:
        return _demo_image(options)
    options.model, options.prompt = options.model or "e", options.prompt or DEMO_PROMPT
    import torch
    from transformers import TextStreamer

    from gemma4_compile import report

    model, tokenizer = _optimized(options)
    if tokenizer is None:
        raise ValueError(f"the demo needs a tokenizer, got none in {options.model}; use `report` for models without")
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    sampling = {"do_sample": options.temperature > 0} | ({"temperature": options.temperature} if options.temperature else {})
    streamer = None if options.json else TextStreamer(tokenizer, skip_special_tokens=True)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)  # compiles, so that the text below comes in one go
        torch.manual_seed(options.seed)
        start = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=options.max_tokens, streamer=streamer, **sampling)
    seconds = time.perf_counter() - start
    tokens = output.shape[1] - inputs["input_ids"].shape[1]
    if options.json:
        text = tokenizer.decode(output[0], skip_special_tokens=True)
        print(json.dumps({"text": text, "tokens": tokens, "seconds": seconds, "report": as_dict(report(model))}))
    else:
        print(f"\n{tokens} tokens in {seconds:.2f} s on {model.device}\n\n{report(model)}")
    return 0


def _demo_image(options: argparse.Namespace) -> int:
    """A picture and a question: the picture's path, and the answer."""
    import tempfile
    from pathlib import Path

    from gemma4_compile import Engine, EngineConfig, SamplingParams, demo_checkpoint, report
    from gemma4_compile.demo import VISION_DEMO
    from gemma4_compile.demo.pictures import QUESTION, held_out_pictures

    path = Path(options.image)
    if not options.image:
        pictures = held_out_pictures()
        drawn = pictures[options.seed % len(pictures)]
        path = Path(tempfile.gettempdir()) / f"gemma4-compile-{drawn.number}.png"
        drawn.image.save(path)
    model = options.model or VISION_DEMO
    folder = demo_checkpoint(model) / "target" if model == VISION_DEMO else model
    question = options.prompt or QUESTION
    asked = [{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": question}]}]
    config = EngineConfig(
        device=options.device, text_only=False, optimize=config_of(options), capture_at_start=False,
        kv_bytes=_DEMO_BYTES if model == VISION_DEMO else None,
    )  # fmt: skip
    with Engine(folder, config) as engine:
        prompt = engine.prepare(asked)  # what is wrong with the picture is said here
        start = time.perf_counter()
        (output,) = engine.generate([prompt], SamplingParams(max_tokens=options.max_tokens))
        seconds, found = time.perf_counter() - start, report(engine.model)
    if options.json:
        shown = {"image": str(path), "question": question, "answer": output.text, "seconds": seconds, "report": as_dict(found)}
        print(json.dumps(shown))
    else:
        print(f"{path}\n{question}\n{output.text}\n\n{seconds:.2f} s\n\n{found}")
    return 0


def _report(options: argparse.Namespace) -> int:
    import torch

    from gemma4_compile import report

    model, _ = _optimized(options)
    prompt = torch.randint(3, model.config.get_text_config().vocab_size, (1, 8), device=model.device)
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=2, do_sample=False)
    print(json.dumps(as_dict(report(model))) if options.json else report(model))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from dataclasses import asdict
    from pathlib import Path

    from gemma4_compile import inspect
    from gemma4_compile.inspection.files import check_folder
    from gemma4_compile.inspection.step import inspected_part
    from gemma4_compile.inspection.tables import check_layer, only_layer, summary

    check_folder(Path(options.out), options.force)  # before the model is loaded
    model, _ = load_model(options)
    check_layer(options.layer, inspected_part(model, options.step).config.num_hidden_layers)
    name = options.model + (f" cut to {options.layers} layers" if options.layers else "")
    found = inspect(
        model,
        out=options.out,
        step=options.step,
        batch=options.batch,
        context=options.context,
        static_cache=options.cache == "static",
        compare=options.compare,
        config=config_of(options),
        force=options.force,
        name=name,
    )
    if options.json:
        print(json.dumps(asdict(found if options.layer is None else only_layer(found, options.layer))))
        return 0
    print(summary(found, options.layer))
    files = sorted(path for path in Path(options.out).rglob("*") if path.is_file())
    print("\n" + "\n".join(f"{path.stat().st_size:>10,} B  {path}" for path in files))
    return 0


def _optimized(options: argparse.Namespace) -> tuple[Any, Any]:
    from gemma4_compile import optimize

    model, tokenizer = load_model(options)
    return optimize(model, config_of(options)), tokenizer
