"""The arithmetic that CPU and Triton share: known answers, accuracy against fp64. That both agree: interpret_sample.py."""

from __future__ import annotations

import pytest
import torch

from gemma4_compile.ops.sampling.bitwise import gumbel, philox, weights

KNOWN: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {  # Random123's kat_vectors: key, counter, words
    (0x0, (0, 0, 0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    (-1, (0xFFFFFFFF,) * 4): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
}


@pytest.mark.parametrize("given", KNOWN)
def test_philox_known_answers(given: tuple[int, tuple[int, ...]]):
    key, counter = given
    words = philox(torch.tensor([key]), *(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == KNOWN[given]


def test_weights_against_fp64():
    x = torch.linspace(-27, 0, 100_001)
    exact = x.double().exp() * 2.0**40
    assert ((weights(x).double() - exact).abs() <= 2.0**-22 * exact).all()
    assert weights(torch.zeros(1)).item() == 2.0**40
    assert not weights(torch.tensor([-28.0, -30.0, -100.0, -torch.inf])).long().any()


def test_gumbel_against_fp64():
    seeds, offsets = torch.arange(40), torch.arange(40) * 2**31
    quad = torch.arange(2500)[None]
    words = philox(seeds[:, None], quad, quad * 0, offsets[:, None] & 0xFFFFFFFF, offsets[:, None] >> 32)
    v = (torch.stack(words, dim=-1).flatten(1).double() + 0.5) * 2.0**-32
    noise = gumbel(seeds, offsets, 10_000)
    error = (noise.double() + (-torch.log1p(-v)).log()).abs()
    assert error[v < 0.9].max() < 5e-6
    assert error[v < 0.999].max() < 1e-5  # there 1 - v has few bits: noise below -1.9, which decides nothing
    assert abs(noise.mean().item() - 0.5772) < 0.01  # of 400,000: a standard error of 0.002
    assert abs(noise.std().item() - 1.2825) < 0.01


@pytest.mark.parametrize(("word", "least", "most"), [(0, 22.8, 22.9), (0xFFFFFFFF, -2.9, -2.8)])
def test_gumbel_at_its_ends(word: int, least: float, most: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gemma4_compile.ops.sampling.bitwise.philox", lambda *_: (torch.full((1, 1), word),) * 4)
    noise = gumbel(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 4)
    assert ((noise > least) & (noise < most)).all()


def test_a_token_has_its_noise_in_vocabularies_of_all_sizes():
    seeds, offsets = torch.tensor([3, 4]), torch.tensor([5, 5])
    wide = gumbel(seeds, offsets, 1001)
    assert torch.equal(gumbel(seeds, offsets, 130), wide[:, :130])
    assert len(wide.unique()) > 1990
