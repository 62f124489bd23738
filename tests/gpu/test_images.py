"""Images on the GPU: the packed tower, its CUDA graphs, and engines that answer as plain Hugging Face does."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from gemma4_compile import Engine, EngineConfig, SamplingParams, SpeculativeConfig, ops, optimize
from gemma4_compile.demo.pictures import held_out_pictures, picture
from gemma4_compile.graphs.recorder import CudaRecorder
from gemma4_compile.hf.assistant import load_assistant
from gemma4_compile.hf.loading import load, random_multimodal
from gemma4_compile.hf.vision import vision_part
from gemma4_compile.optimized import state_of
from gemma4_compile.runtime import engine as engines
from gemma4_compile.runtime.vision.pictures import ImageLimits
from gemma4_compile.runtime.vision.prompts import ImagePrompts, MarkTokens, Source
from gemma4_compile.runtime.vision.source import vision_of
from gemma4_compile.runtime.worker.encoder import ImageEncoder
from tests.demo.test_pictures import FOLDER, answers, asked, prompts
from tests.ops.attention_cases import Request, check_steps, step

CONFIG = EngineConfig(memory_fraction=0.3, max_requests=32, max_batched_tokens=1024, capture_at_start=False)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("heads", ((8, 1, 256), (16, 8, 256), (32, 16, 256)))
def test_rows_that_see_keys_behind_their_own(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """At the sizes of the sliding layers that have image blocks, within and across tiles and pages."""
    q_heads, kv_heads, dim = heads
    for requests in ([Request(0, 700), Request(100, 600)], [Request(513, 40), Request(7, 1)]):
        made = step(
            requests, heads=q_heads, kv_heads=kv_heads, dim=dim, page=64, window=512, dtype=dtype, device="cuda", ahead=280
        )
        # fp32 sums products one after the other in a lane, where cuBLAS has trees of them.
        check_steps([(made, None)], factor=4.0 if dtype == torch.float32 else 1.5)


@pytest.mark.parametrize("dim", (64, 72))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_block_attention(dtype: torch.dtype, dim: int) -> None:
    counts = [630, 9, 0, 2304, 585]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    rows = sum(counts) + 20  # padding
    q, k, v = (torch.randn(1, rows, 12, dim, device="cuda").to(dtype) for _ in range(3))
    reach = torch.empty(max(counts), dtype=torch.uint8, device="cuda")
    actual = ops.block_attention(q, k, v, starts, reach, 1 / 8)
    bounds = starts.tolist()
    for first, last in zip(bounds, bounds[1:], strict=False):
        if first == last:
            continue
        a, b, c = (x[:, first:last].transpose(1, 2) for x in (q, k, v))
        wanted = F.scaled_dot_product_attention(a.double(), b.double(), c.double(), scale=1 / 8).transpose(1, 2)
        eager = F.scaled_dot_product_attention(a, b, c, scale=1 / 8).transpose(1, 2)
        error, allowed = (actual[:, first:last] - wanted).abs().max(), (eager - wanted).abs().max()
        assert error <= 2 * allowed + 1e-6, (first, float(error), float(allowed))


def released(name: str) -> Any:
    """A model with this one's tower, cut to a few layers, and a small text part."""
    small: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 1024}
    model = random_multimodal(name, 4, "cuda", vision={"num_hidden_layers": 3}, **small).requires_grad_(False)
    if model.config.vision_config.standardize:
        with torch.no_grad():
            model.model.vision_tower.std_bias.uniform_(-0.1, 0.1, generator=torch.Generator("cuda").manual_seed(1))
            model.model.vision_tower.std_scale.uniform_(0.5, 1.5, generator=torch.Generator("cuda").manual_seed(2))
    return model


@pytest.mark.parametrize(("name", "op"), [("E2B", "qkv_norm_rope_2d_clipped"), ("31B", "qkv_norm_rope_2d")])
def test_packed_tower_and_its_graphs(name: str, op: str) -> None:
    """Real width, mixed sizes: no further from fp64 than Hugging Face's own one by one; graphs by buckets, replayed. E2B's
    linears are clipped."""
    from transformers import Gemma4ImageProcessorPil

    processor = Gemma4ImageProcessorPil()
    opened = ImagePrompts(lambda: processor, MarkTokens(5, 6, 7), ImageLimits())
    images = [opened.patches(Source(picture(n).image, most)) for n, most in ((0, 280), (1, 70), (2, 140), (3, 280), (4, 560))]
    plain = released(name)
    exact, served = copy.deepcopy(plain).double(), optimize(copy.deepcopy(plain))
    part = vision_part(served)
    assert part is not None
    program = state_of(served).tower_program(part)
    assert [site.rewrite for site in program.spec.record.matched("qkv_norm_rope")] == [op] * 3
    encoder = ImageEncoder(part, lambda: program, 1 << 28, CudaRecorder(torch.device("cuda")))
    wanted, eager = [], []
    for image in images:
        pixels = torch.from_numpy(image.numbers()).flatten(0, 1)[None].cuda()
        places = torch.from_numpy(image.positions).flatten(0, 1)[None].cuda()
        with torch.no_grad():
            wanted.append(exact.model.get_image_features(pixels.double(), places, return_dict=True).pooler_output[0])
            features = plain.model.get_image_features(pixels, places, return_dict=True)
        eager.append(features.pooler_output[0])
    for _ in range(2):
        for found in (encoder.encode(images), [encoder.encode([image])[0] for image in images]):
            for mine, other, right in zip(found, eager, wanted, strict=True):
                error, allowed = ((x.double() - right).square().mean().sqrt() for x in (mine, other))
                assert error <= 1.5 * allowed, (float(error), float(allowed))
    assert encoder.refused == {} and encoder._graphs
    assert encoder._patch_bytes > 0, "what a patch takes was measured"


@cache
def text_part_of_the_demo(dtype: torch.dtype) -> Any:
    return load(FOLDER / "target", "cuda", dtype, text_only=True)[0]


HOW = (
    (torch.float32, "default"), (torch.float32, "small steps"), (torch.float32, "drafts"),
    (torch.bfloat16, "default"), (torch.bfloat16, "no graphs"),
)  # fmt: skip


@pytest.mark.parametrize(("dtype", "how"), HOW, ids=str)
def test_all_held_out_pictures_as_hugging_face(dtype: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of one dtype share the text model, and so all compiled programs, the tower's too: what tells these engines apart
    is no part of a program. Each way of running once, as it compiles 30 to 50 kernels of ours: for its pages, its launches."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(engines, "vision_of", lambda _, processor: vision_of(FOLDER / "target", processor))
    model, config = text_part_of_the_demo(dtype), CONFIG
    if how == "small steps":
        config = replace(config, max_batched_tokens=96, page_size=16)
    if how == "no graphs":
        config = replace(config, cuda_graphs=False, overlap=False)
    speculative = None
    if how == "drafts":
        assistant = load_assistant(FOLDER / "assistant", dtype=dtype).cuda().eval().requires_grad_(False)
        speculative = SpeculativeConfig(assistant, 3)
    engine = Engine(model, config, speculative=speculative)
    state, pictures = state_of(model), held_out_pictures()
    for _ in range(2):  # the second time from graphs, and from the cache of embeddings
        outputs = engine.generate([asked(drawn.image) for drawn in pictures], SamplingParams(max_tokens=8))
        assert [output.token_ids for output in outputs] == answers(dtype)
    steps = engine.runner.images
    assert steps is not None and steps.encoder.encoded == len(pictures) and not steps.encoder.refused
    assert len(state.programs) == len(state.image_programs) == len(state.tower_programs) == 1
    assert steps.graphs is None or steps.graphs.refused == {} and steps.graphs.replays > 0


def test_image_blocks_in_both_directions() -> None:
    """A model like 26B-A4B in what image tokens see: the engine's log probabilities are Hugging Face's, in chunks and whole."""
    from tests.models import IMAGE, image_processor, tiny_multimodal

    torch.set_float32_matmul_precision("highest")
    plain, served = (
        tiny_multimodal("dense", use_bidirectional_attention="vision", head_dim=64, global_head_dim=64)
        .cuda()
        .requires_grad_(False)
        for _ in range(2)
    )
    image = picture(0).image
    for tokens in (96, 512):
        engine = Engine(served, replace(CONFIG, max_batched_tokens=tokens, page_size=16), processor=image_processor())
        (output,) = engine.generate(
            {"prompt_token_ids": [2, *range(3, 60), IMAGE, 7, 8], "images": [image]},
            SamplingParams(max_tokens=1, prompt_logprobs=0),
        )
        ids = torch.tensor([output.prompt_token_ids], device="cuda")
        given = image_processor()([image], return_tensors="pt").to("cuda")
        with torch.no_grad():
            logits = plain(
                input_ids=ids, pixel_values=given["pixel_values"], image_position_ids=given["image_position_ids"],
                mm_token_type_ids=(ids == IMAGE).long(),
            ).logits[0, :-1]  # fmt: skip
        wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()
        actual = torch.tensor([entry.logprob for entry in output.prompt_logprobs or []])
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.filterwarnings("ignore:gemma4_compile runs this call as one graph")
def test_optimized_model_names_held_out_pictures(dtype: torch.dtype) -> None:
    """Hugging Face's own calls, with the encoder compiled: SDPA with a mask, kernels for norms, RoPE and products."""
    torch.set_float32_matmul_precision("highest")
    model: Any = AutoModelForImageTextToText.from_pretrained(FOLDER / "target", dtype=dtype)
    model = optimize(model.cuda().eval().requires_grad_(False))
    for given, wanted in zip(prompts(dtype)[:10], answers(dtype), strict=False):
        moved = {name: tensor.cuda() for name, tensor in given.items()}
        out = model.generate(**moved, max_new_tokens=8, do_sample=False)
        assert out[0, given["input_ids"].shape[1] :].tolist() == wanted
    encoder = state_of(model).encoder
    assert encoder is not None and encoder.records and not encoder.eager_reason
