"""Arithmetic that PyTorch on a CPU and Triton compute to the bit: exp as an integer weight, log, Philox, Gumbel noise.

exp and log are the polynomials of Cephes (expf.c, logf.c) in fp32, each product and each sum rounded by itself: kernels that
use them are launched with UNFUSED. Philox-4x32-10: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4_compile.ops.library import jit, tl

_WORD = 0xFFFFFFFF
# What a random number is for: the second word of Philox's counter, so that no two uses of one request share a number.
# Sampled tokens and residuals are numbered by the token's place; whether drafts are accepted, and the drafts themselves, by
# the place where their round begins and by their own in it (verify.py says why).
SAMPLE, ACCEPT, RESIDUAL, DRAFT = range(4)
STREAMS = 4  # a draft's stream is DRAFT + STREAMS * its place in the round


def weights(x: Tensor) -> Tensor:
    """exp(x) * 2**40 for x <= 0, in fp32; its integer part is what x weighs. Below -30 as at -30: less than 1."""
    x = x.clamp(min=-30.0)
    whole = (x * 1.44269504 + 0.5).floor()
    part = (x - whole * 0.693359375) + whole * 2.12194440e-4
    y = 1.9875691500e-4 * part + 1.3981999507e-3
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * part + coefficient
    y = y * (part * part) + part + 1.0
    return y * ((whole + 167.0).int() << 23).view(torch.float32)


def gumbel(seeds: Tensor, offsets: Tensor, width: int, stream: int | Tensor = SAMPLE, first: int = 0) -> Tensor:
    """Gumbel noise, -log(-log(u)), of `width` tokens from first on: [N, width] fp32, from -2.9 to 22.9.

    seeds    [N] int64  Philox's key
    offsets  [N] int64  with token // 4 its counter; the token's word is token % 4
    stream   int, or [] int64: what the noise is for
    first    a multiple of 4

    u is 1 - v with v from 2**-33 on: the noise is large where v is small, and there fp32 resolves v, as it would not u.
    """
    quad = torch.arange(first // 4, first // 4 - (-width // 4), device=seeds.device)[None, :]
    bits = torch.stack(_words(seeds[:, None], offsets[:, None], quad, stream), dim=-1)
    return _noise(bits.flatten(1)[:, :width])


def gumbel_of(seeds: Tensor, offsets: Tensor, tokens: Tensor, stream: int | Tensor = SAMPLE) -> Tensor:
    """The noise that `gumbel` has for these tokens [N, C] int64: [N, C] fp32."""
    w0, w1, w2, w3 = _words(seeds[:, None], offsets[:, None], tokens // 4, stream)
    turn = tokens % 4
    return _noise(torch.where(turn < 2, torch.where(turn == 0, w0, w1), torch.where(turn == 2, w2, w3)))


def uniform(seeds: Tensor, offsets: Tensor, count: int, stream: int | Tensor) -> Tensor:
    """[N, count] fp64, between 2**-33 and 1 - 2**-33."""
    index = torch.arange(count, device=seeds.device)[None, :]
    return (_words(seeds[:, None], offsets[:, None], index, stream)[0].double() + 0.5) * 2.0**-32


def _words(seed: Tensor, offset: Tensor, quad: Tensor, stream: int | Tensor) -> tuple[Tensor, ...]:
    return philox(seed, quad, torch.zeros_like(quad) + stream, offset & _WORD, offset >> 32 & _WORD)


def _noise(bits: Tensor) -> Tensor:
    v = (bits.float() * 2.0**-32 + 2.0**-33).clamp(max=1.0 - 2.0**-24)
    exponential = torch.where(v < 0.0078125, v * (v * (v * 0.33333334 + 0.5) + 1.0), -log(1.0 - v))
    return -log(exponential)


def log(x: Tensor) -> Tensor:
    """log(x) for positive normal x in fp32."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    part = (bits - (exponent << 23)).view(torch.float32) - 1.0
    y = 7.0376836292e-2 * part - 1.1514610310e-1
    for coefficient in (
        1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1,
        3.3333331174e-1,
    ):  # fmt: skip
        y = y * part + coefficient
    square = part * part
    y = y * part * square + exponent.float() * -2.12194440e-4 - square * 0.5
    return (part + y) + exponent.float() * 0.693359375


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 of a 64-bit key and four counter words: four words, each in an int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        (high0, low0), (high2, low2) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two words of a product of words, without a product of more than 48 bits."""
    low, high = constant * (x & 0xFFFF), constant * (x >> 16)
    return (low >> 16) + high >> 16, ((high & 0xFFFF) << 16) + low & _WORD


@jit
def weights_kernel(x):
    """As `weights`, to the bit."""
    x = tl.maximum(x, -30.0)
    whole = tl.floor(x * 1.44269504 + 0.5)
    part = (x - whole * 0.693359375) + whole * 2.12194440e-4
    y = 1.9875691500e-4 * part + 1.3981999507e-3
    y = y * part + 8.3334519073e-3
    y = y * part + 4.1665795894e-2
    y = y * part + 1.6666665459e-1
    y = y * part + 5.0000001201e-1
    y = y * (part * part) + part + 1.0
    return y * ((whole + 167.0).to(tl.int32) << 23).to(tl.float32, bitcast=True)


@jit
def log_kernel(x):
    """As `log`, to the bit."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    part = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    y = 7.0376836292e-2 * part - 1.1514610310e-1
    y = y * part + 1.1676998740e-1
    y = y * part - 1.2420140846e-1
    y = y * part + 1.4249322787e-1
    y = y * part - 1.6668057665e-1
    y = y * part + 2.0000714765e-1
    y = y * part - 2.4999993993e-1
    y = y * part + 3.3333331174e-1
    square = part * part
    y = y * part * square + exponent.to(tl.float32) * -2.12194440e-4 - square * 0.5
    return (part + y) + exponent.to(tl.float32) * 0.693359375


@jit
def gumbel_kernel(bits):
    """As `gumbel`, to the bit, of Philox words."""
    v = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355225)
    exponential = tl.where(v < 0.0078125, v * (v * (v * 0.33333334 + 0.5) + 1.0), -log_kernel(1.0 - v))
    return -log_kernel(exponential)


@jit
def uniform_kernel(bits):
    """As `uniform`, to the bit, of Philox words."""
    return (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10


@jit
def philox_kernel(seed, offset, quad, stream: tl.constexpr = 0):
    """The random words of tokens 4 quad to 4 quad + 3."""
    zero = (quad * 0).to(tl.uint32)
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, quad.to(tl.uint32), (zero + stream).to(tl.uint32), zero + low, zero + high)


@jit
def gumbel_of_kernel(seed, offset, token, stream: tl.constexpr = 0):
    """As `gumbel_of`, to the bit."""
    r0, r1, r2, r3 = philox_kernel(seed, offset, token // 4, stream)
    turn = token % 4
    return gumbel_kernel(tl.where(turn < 2, tl.where(turn == 0, r0, r1), tl.where(turn == 2, r2, r3)))
