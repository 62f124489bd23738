"""The vision tower: compiled where Hugging Face calls it, and as one packed program of many images."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4_compile import OptimizeConfig, inspection, optimize, report, restore
from gemma4_compile.demo.pictures import picture
from gemma4_compile.graphs.recorder import Recorder
from gemma4_compile.hf.vision import vision_part
from gemma4_compile.optimized import state_of
from gemma4_compile.packed.program import Program
from gemma4_compile.passes import FUSIONS
from gemma4_compile.runtime.vision.pictures import ImageLimits
from gemma4_compile.runtime.vision.prompts import ImagePrompts, MarkTokens, Source
from gemma4_compile.runtime.vision.spans import Patches
from gemma4_compile.runtime.worker import encoder as encoders
from gemma4_compile.runtime.worker.encoder import ImageEncoder
from gemma4_compile.vision import encoder as encoder_calls
from tests.models import IMAGE, VISION, image_processor, tiny_multimodal
from tests.passes.harness import passes_only
from tests.runtime.host_recorder import HostRecorder

# (picture, soft tokens at most)
MIXED = [(0, 70), (1, 140), (2, 70), (3, 280), (4, 70), (5, 140)]
LAYERS = VISION["num_hidden_layers"]
NAMES = ("pixel_values", "image_position_ids")


@pytest.fixture(scope="module")
def model() -> Any:
    found = tiny_multimodal("e").requires_grad_(False)
    return optimize(found)


@pytest.fixture(scope="module")
def program(model: Any) -> Program:
    part = vision_part(model)
    assert part is not None
    return state_of(model).tower_program(part)


def patches(which: list[tuple[int, int]] = MIXED) -> list[Patches]:
    prompts = ImagePrompts(image_processor, MarkTokens(IMAGE, 0, 0), ImageLimits())
    return [prompts.patches(Source(picture(number).image, most)) for number, most in which]


@cache
def plain(clipped: bool = False) -> Any:
    return tiny_multimodal("e", vision={"use_clipped_linears": clipped}).requires_grad_(False)


def by_hugging_face(which: list[tuple[int, int]] = MIXED, clipped: bool = False) -> list[Tensor]:
    found = []
    for number, most in which:
        given = image_processor()([picture(number).image], return_tensors="pt", max_soft_tokens=most)
        with torch.no_grad():
            features = plain(clipped).model.get_image_features(
                given["pixel_values"], given["image_position_ids"], return_dict=True
            )
        found.append(features.pooler_output[0])
    return found


def encoder(model: Any, program: Program, recorder: Recorder | None = None, cache: int = 1 << 20) -> ImageEncoder:
    part = vision_part(model)
    assert part is not None
    return ImageEncoder(part, lambda: program, cache, recorder)


def close(actual: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_images_together_are_what_each_is_alone(model: Any, program: Program) -> None:
    """Of mixed sizes, packed without padding: Hugging Face's embeddings of each alone, padded."""
    images = patches()
    close(encoder(model, program).encode(images), by_hugging_face())
    assert len({image.tokens for image in images}) > 3
    assert program.spec.pieces == LAYERS + 1


def test_chunks_are_bounded_by_memory(model: Any, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_CPU_BYTES", 1)
    made = encoder(model, program)
    made._patch_bytes = 1.0
    images = patches()
    close(made.encode(images), by_hugging_face())
    assert made.chunks == len(images)
    monkeypatch.setattr(encoders, "_CPU_BYTES", 9 * (images[0].tokens + images[1].tokens))
    made.chunks = 0
    made.encode(images[:3])
    assert made.chunks == 2


def test_what_was_encoded_is_kept_by_content(model: Any, program: Program) -> None:
    made = encoder(model, program)
    images, again = patches(), patches()
    first = made.embeddings(images, made.missing(images))
    assert not made.missing(again) and made.encoded == len(images)
    for mine, other in zip(made.embeddings(again, []), first, strict=True):
        assert mine is other
    made.forget()
    assert len(made.missing(images)) == len(images)


def test_the_cache_is_bounded_and_a_step_has_what_it_needs(model: Any, program: Program) -> None:
    images = patches()
    size = images[0].tokens * 64 * 4
    made = encoder(model, program, cache=2 * size)
    close(made.embeddings(images, made.missing(images)), by_hugging_face())
    assert made._held <= 2 * size and made.missing(images)


def test_floats_travel_as_they_are(model: Any, program: Program) -> None:
    (image,) = patches(MIXED[:1])
    other = Patches(image.numbers(), image.positions, 0.0, b"other")
    made = encoder(model, program)
    close(made.encode([other, image]), by_hugging_face([MIXED[0]] * 2))


def test_graphs_by_buckets_of_tokens(model: Any, program: Program) -> None:
    """Padding patches and images change nothing; a graph is captured once for its bucket."""
    recorder = HostRecorder()
    made = encoder(model, program, recorder)
    for _ in range(2):
        for which in ([MIXED[0]], [MIXED[1]], [MIXED[2], MIXED[0]], MIXED[4:]):
            close(made.encode(patches(which)), by_hugging_face(which))
    assert recorder.recorded == len(made._graphs) == 3 and not made.refused  # 70, 140 and 210 tokens


class Failing(HostRecorder):
    def record(self, function: Callable[[], Any]) -> Any:
        raise RuntimeError("out of something")


class Wrong(HostRecorder):
    def record(self, function: Callable[[], Any]) -> Any:
        _, results = super().record(function)
        return (lambda: None), [torch.full_like(result, 7.0) for result in results]


@pytest.mark.parametrize(("kind", "reason"), [(Failing, "its capture failed"), (Wrong, "a replay gave other embeddings")])
def test_a_graph_that_fails_is_given_up(model: Any, program: Program, kind: Callable[[], Recorder], reason: str) -> None:
    made = encoder(model, program, kind())
    with pytest.warns(UserWarning, match=reason):
        close(made.encode(patches(MIXED[:1])), by_hugging_face(MIXED[:1]))
    close(made.encode(patches(MIXED[:1])), by_hugging_face(MIXED[:1]))  # silently now
    assert list(made.refused) == [70]


def test_hugging_faces_own_calls_reach_the_compiled_encoder() -> None:
    """model(...) with images: one graph for any number of images and patches, the encoder's fusions in the report."""
    model = passes_only(tiny_multimodal("e").requires_grad_(False))
    calls = state_of(model).encoder
    for numbers in ([0], [1, 2], [3, 4, 5]):
        given = image_processor()([picture(n).image for n in numbers], return_tensors="pt")
        ids = torch.tensor([[2, *[IMAGE] * int(given.pop("num_soft_tokens_per_image").sum()), 7, 8]])
        with torch.no_grad():
            actual, wanted = (m(input_ids=ids, **given).logits for m in (model, plain()))
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)
    assert calls is not None and len(calls.records) <= 2 and not calls.eager_reason  # one image is a graph of its own
    found = report(model)
    assert found.vision["qkv_norm_rope"] == found.vision_layers == LAYERS
    assert f"vision tower of {LAYERS} layers: feed_forward_tail 1, " in str(found)


def test_restored_models_have_their_own_encoder() -> None:
    found = tiny_multimodal("dense").requires_grad_(False)
    optimize(found, OptimizeConfig())
    assert found.model.vision_tower.encoder._compiled_call_impl is not None
    restore(found)
    assert "_compiled_call_impl" not in found.model.vision_tower.encoder.__dict__


def test_clipped_linears() -> None:
    """As E2B and E4B have them, by bounds that clip: packed, from graphs, and where Hugging Face calls the encoder. q, k and v
    are fused, the norms beside a clamp left to Inductor."""
    model = optimize(tiny_multimodal("e", vision={"use_clipped_linears": True}).requires_grad_(False))
    part = vision_part(model)
    assert part is not None
    program, recorder = state_of(model).tower_program(part), HostRecorder()
    fused = Counter(site.rewrite for site in program.spec.record.sites if site.fusion in FUSIONS and site.fusion != "geglu")
    assert fused == {"qkv_norm_rope_2d_clipped": LAYERS} and program.spec.pieces == LAYERS + 1
    images, wanted = patches(), by_hugging_face(clipped=True)
    close(encoder(model, program).encode(images), wanted)
    made = encoder(model, program, recorder)
    for _ in range(2):
        close(made.encode(images[:2]), wanted[:2])
    assert recorder.recorded == len(made._graphs) == 1 and not made.refused
    clips = max(float((mine - other).abs().max()) for mine, other in zip(wanted, by_hugging_face(), strict=True))
    assert clips > 0.1, "bounds that change nothing would test nothing"

    called = passes_only(tiny_multimodal("e", vision={"use_clipped_linears": True}).requires_grad_(False))
    given = image_processor()([picture(0).image], return_tensors="pt")
    with torch.no_grad():
        close([called.model.get_image_features(*map(given.get, NAMES)).pooler_output[0]], wanted[:1])
    shown = report(called)
    assert shown.vision == {"qkv_norm_rope": LAYERS}
    assert f"qkv_norm_rope {LAYERS}; its linears are clipped (use_clipped_linears)" in str(shown)


@pytest.mark.slow
def test_in_a_clipped_tower_no_other_fusion_saves_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls in Inductor's code: with the one fusion, without, and with each of those of norms beside it."""
    model = tiny_multimodal("e", vision={"use_clipped_linears": True}).requires_grad_(False)
    alone = frozenset({"qkv_norm_rope"})

    def calls(enabled: frozenset[str]) -> int:
        monkeypatch.setattr(inspection, "fusions_in", lambda config, asked: enabled)
        monkeypatch.setattr(encoder_calls, "fusions_in", lambda config, asked: enabled)
        return len(inspection.inspect(model, step="images", context=6).ours.kernels)

    least = calls(alone)
    assert least < calls(frozenset())
    for other in ("post_attention_norms", "feed_forward_tail"):
        assert calls(alone | {other}) > least, other
