"""Checkpoints and bare configs to models, with errors that a user can act on. Weights come from transformers."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma4Config, Gemma4ForConditionalGeneration
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .assistant import assistant_class
from .checkpoints import ASSISTANT_CONFIGS, TEXT_CONFIGS, UNIFIED_NAMES, VISION_CONFIGS
from .families import GEMMA4, MULTIMODAL, Family, family_of, family_of_model

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load(folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, text_only: bool = False) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer or None) of a checkpoint.

    folder     a folder, or the id of a checkpoint on the hub, such as google/gemma-4-E2B-it
    dtype      of the weights; the checkpoint's own unless given
    text_only  of a multimodal checkpoint, a Gemma4ForCausalLM of its text part: the towers are not read

    Raises ValueError for a folder that is missing, not a Gemma-4 checkpoint or broken, for an id that gives no checkpoint, and
    for weights that do not fit into the GPU.
    """
    folder, model_type = checkpoint(folder)
    model = read(folder, dtype, text_only and not model_type.endswith("_text"))
    try:
        return model.eval().to(device), tokenizer_of(folder)
    except torch.OutOfMemoryError as error:
        raise _no_room(error) from error


def checkpoint(folder: str | Path) -> tuple[Path, str]:
    """The local folder of a checkpoint, downloaded if it is not there yet, and its model_type.

    Raises ValueError as `load`."""
    if _HUB_ID.fullmatch(str(folder)) and not Path(folder).exists():
        folder = _from_hub(str(folder))
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise ValueError(f"a checkpoint must be a folder with config.json and weights, got {folder} ({what}); check the path")
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f"config.json must be a JSON object, got a broken file in {folder} ({error}); download it again"
        ) from None
    if not isinstance(model_type, str) or family_of(model_type) is None:
        raise ValueError(
            f"a checkpoint must have model_type gemma4, gemma4_unified or one of their text parts, got {model_type!r} in "
            f"{folder}; use a Gemma-4"
        )
    return folder, model_type


def tokenizer_of(folder: str | Path) -> Any:
    """The tokenizer of a folder, or None."""
    folder = Path(folder)
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None


def text_of_multimodal(folder: str | Path, dtype: torch.dtype | None, **options: Any) -> Any:
    """A Gemma4ForCausalLM of the text part of a multimodal checkpoint; its towers are not read.

    options   of from_pretrained

    Raises ValueError where weights of the text part are missing."""
    with quiet():  # the towers' weights are left out on purpose: no table of them
        family = family_of(json.loads((Path(folder) / "config.json").read_text())["model_type"])
        assert family is not None, "who reads a checkpoint has looked at its model_type"
        loaded: Any = family.causal.from_pretrained(
            folder,
            dtype=dtype or "auto",
            output_loading_info=True,
            key_mapping={r"^model\.language_model\.": "model."},
            **options,
        )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"weights of the text part are missing: {', '.join(missing[:3])}")
    return model


def read(folder: Path, dtype: torch.dtype | None, text_only: bool, **options: Any) -> Any:
    """The model of a local folder; of a multimodal checkpoint its text part alone, if asked.

    options   of from_pretrained

    Raises ValueError for weights that cannot be read or do not fit into memory, ConnectionError where the ranks do not find
    each other."""
    options["local_files_only"] = True
    try:
        if text_only:
            return text_of_multimodal(folder, dtype, **options)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **options)
    except torch.OutOfMemoryError as error:
        raise _no_room(error) from error
    except Exception as error:  # safetensors, JSON and OS errors alike: the user needs the file, not the traceback
        if isinstance(error.__cause__, dist.DistError):  # transformers makes the process group
            raise ConnectionError(
                f"the ranks must find each other, got {_reason(error.__cause__)!r}; see that all run, and reach MASTER_ADDR"
            ) from error
        reason = _reason(error)
        raise ValueError(f"the weights must be readable, got {reason!r} in {folder}; download the checkpoint again") from error


def _no_room(error: torch.OutOfMemoryError) -> ValueError:
    """What to say of weights that are larger than the GPU."""
    return ValueError(f"the weights must fit into the GPU's memory, got {_reason(error)!r}; free some, or take more GPUs")


def _reason(error: BaseException) -> str:
    """One line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """transformers reports errors alone."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def text_part(model: Any) -> Any:
    """The Gemma4ForCausalLM within a model: itself, or one on the very weights of a multimodal model's text part."""
    if not isinstance(model, MULTIMODAL):
        return model
    with torch.device("meta"), no_init_weights():
        config: Any = model.config.text_config
        text: Any = family_of_model(model).causal(config)
    text.model, text.lm_head = model.model.language_model, model.lm_head
    text.generation_config = model.generation_config
    return text.eval()


def _from_hub(name: str) -> str:
    """The local folder of a hub checkpoint, downloaded if it is not there yet."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
    except Exception as error:  # of the network, of the hub's answer and of the disk, in many classes
        reason = f"no such folder, and {_reason(error)}"
        raise ValueError(
            f"a checkpoint must be a folder or an id on the hub, got {name!r}: {reason}; check the name"
        ) from error


def random_model(name_or_file: str | Path, layers: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.bfloat16,
                 seed: int = 0, **overrides: Any) -> Any:  # fmt: skip
    """A Gemma4ForCausalLM in eval mode: norm weights and layer scalars 1, matrices N(0, 0.02). For speed, not for text.

    name_or_file  a name in TEXT_CONFIGS, such as "E2B", or a config.json
    layers        cut to so many decoder layers, see `cut`
    overrides     other config fields, such as vocab_size

    Raises ValueError for a missing or broken config, or a number of layers that it does not have.
    """
    config = cut(_text_config(name_or_file), layers) | overrides
    family = _family_of_name(str(name_or_file))
    return randomize(lambda: family.causal(family.text_config(**config)), device, dtype, seed)


def random_multimodal(
    name_or_file: str | Path, layers: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.bfloat16,
    seed: int = 0, vision: dict[str, Any] | None = None, **overrides: Any,
) -> Any:  # fmt: skip
    """A Gemma4ForConditionalGeneration as `random_model` makes its text part, with its tower and no audio. Where its linears
    are clipped, `clip` sets their bounds.

    name_or_file  a name in VISION_CONFIGS, such as "E2B", or a config.json
    layers        of the text part, see `cut`
    vision        other fields of the tower's config, such as num_hidden_layers
    overrides     other fields of the text config

    Raises ValueError as `random_model`, and for a model without a tower.
    """
    text = cut(_text_config(name_or_file), layers) | overrides
    tower = _vision_config(name_or_file) | (vision or {})
    config: Any = Gemma4Config(text_config=text, vision_config=tower, audio_config=None)
    model = randomize(lambda: Gemma4ForConditionalGeneration(config), device, dtype, seed)
    if config.vision_config.standardize:
        model.model.vision_tower.std_bias.zero_()
        model.model.vision_tower.std_scale.fill_(1)
    clip(model.model.vision_tower, seed)
    return model


@torch.no_grad()
def clip(tower: Any, seed: int = 0, sigmas: float = 3.0) -> None:
    """Give the clipped linears of a vision tower finite bounds, if it has such: so many times the rms of what goes into each,
    and of what comes out, for one picture of random patches. Three times clip some 3 of a thousand numbers."""

    def bound(module: Any, name: str, passing: Any) -> None:
        limit = sigmas * passing.float().square().mean().sqrt()
        getattr(module, f"{name}_min").copy_(-limit)
        getattr(module, f"{name}_max").copy_(limit)

    hooks = []
    for module in tower.modules():
        if hasattr(module, "input_min"):
            hooks += [
                module.register_forward_pre_hook(lambda module, args: bound(module, "input", args[0])),
                module.linear.register_forward_hook(lambda _, __, result, module=module: bound(module, "output", result)),
            ]
    if hooks:
        table = tower.patch_embedder.input_proj.weight
        side = 2 * tower.config.pooling_kernel_size
        pixels = torch.rand((1, side**2, table.shape[1]), generator=torch.Generator().manual_seed(seed))
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)[None]
        tower(pixels.to(table), places.to(table.device))
    for hook in hooks:
        hook.remove()


def random_assistant(
    target: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0, vocab_size: int | None = None
) -> Any:
    """The assistant of a released target, such as "E2B", with random weights and a random order of its embeddings.

    vocab_size  a target's of fewer tokens, a multiple of 128
    """
    config = assistant_config(target, vocab_size)
    made = assistant_class(_family_of_name(target))
    model = randomize(lambda: made(config), device, dtype, seed)
    shuffle_embeddings(model, seed)
    return model


def assistant_config(target: str, vocab_size: int | None = None) -> Any:
    """Of the assistant of a released target; arguments of random_assistant."""
    given = ASSISTANT_CONFIGS[target]
    if vocab_size is not None:
        centroids = vocab_size // 128
        given = given | {
            "text_config": given["text_config"] | {"vocab_size": vocab_size}, "num_centroids": centroids,
            "centroid_intermediate_top_k": min(given["centroid_intermediate_top_k"], centroids),
        }  # fmt: skip
    return _family_of_name(target).assistant_config(**given)


def shuffle_embeddings(assistant: Any, seed: int) -> None:
    """A random order of an assistant's ordered embeddings, if it has them."""
    if assistant.masked_embedding is not None:
        order = assistant.masked_embedding.token_ordering
        order.copy_(torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)))


def randomize(make: Callable[[], Any], device: str, dtype: torch.dtype, seed: int) -> Any:
    """A made model in eval mode, with norm weights and layer scalars 1, matrices N(0, 0.02)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = make()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1)
    model.tie_weights()
    return model.to(dtype=dtype).eval()


def _family_of_name(name: str) -> Family:
    """Of a released model's name, or of a config.json. Raises ValueError where transformers does not have it."""
    if name in TEXT_CONFIGS:
        model_type = "gemma4_unified" if name in UNIFIED_NAMES else "gemma4"
    else:
        raw = json.loads(Path(name).read_text())
        model_type = str(raw.get("model_type", "gemma4"))
    return family_of(model_type) or GEMMA4


def _text_config(name_or_file: str | Path) -> dict[str, Any]:
    if name_or_file in TEXT_CONFIGS:
        return TEXT_CONFIGS[str(name_or_file)]
    return _config_file(name_or_file, lambda raw: raw.get("text_config", raw))


def _vision_config(name_or_file: str | Path) -> dict[str, Any]:
    if name_or_file in VISION_CONFIGS:
        return VISION_CONFIGS[str(name_or_file)]
    found = {} if name_or_file in TEXT_CONFIGS else _config_file(name_or_file, lambda raw: raw.get("vision_config") or {})
    if not found or _family_of_name(str(name_or_file)) is not GEMMA4:
        raise ValueError(
            f"a vision tower has one of {', '.join(VISION_CONFIGS)}, or a config.json of gemma4 with a vision_config, got "
            f"{name_or_file} without; use another"
        )
    return found


def _config_file(file: str | Path, part: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A part of a config.json, as keyword arguments of its class."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"a config must be one of {', '.join(TEXT_CONFIGS)} or a config.json, got {path}; check the path")
    try:
        config = part(json.loads(path.read_text()))
        return {
            key: value for key, value in config.items() if key not in ("architectures", "model_type", "transformers_version")
        }
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"a config must be a JSON object, got a broken file {path} ({error}); download it again") from None


def cut(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """A config of fewer layers that keeps what the full one is made of: sliding and full layers in turn, and where KV is
    shared, the second half shares. The last layer is a full one, as transformers asks.

    Raises ValueError for fewer layers than that takes (2, with shared KV 4), or more than the config has."""
    total = config["num_hidden_layers"]
    if layers is None or layers == total:
        return dict(config)
    shares = bool(config.get("num_kv_shared_layers"))
    least = 4 if shares else 2
    if not least <= layers < total:
        raise ValueError(f"layers must be {least} to {total} for this config, got {layers}; choose one in between")
    kinds = ["full_attention" if (layers - 1 - i) % 2 == 0 else "sliding_attention" for i in range(layers)]
    return config | {"num_hidden_layers": layers, "layer_types": kinds, "num_kv_shared_layers": layers // 2 if shares else 0}
