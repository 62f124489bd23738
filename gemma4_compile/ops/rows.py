"""A row of a hidden state in registers: a tuple of chunks, so that a width of 5376 takes 6144 lanes and not 8192.

A program holds one row from its first load to its last store. WIDTH is the row's length, CHUNK a power of two: eight
elements a thread, 16-byte accesses in 16-bit types. A row is kept in its own dtype and widened where it is used: at
width 5376 that is 63 registers a thread, four programs of 8 warps an SM, where one block of 8192 lanes fitted two.
"""

from __future__ import annotations

from .library import jit, power_of_two, tl


def chunk_size(width: int, warps: int) -> int:
    return min(power_of_two(width), 256 * warps)


@jit
def load_row(ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    chunks = ()
    for i in tl.static_range((WIDTH + CHUNK - 1) // CHUNK):
        column = i * CHUNK + tl.arange(0, CHUNK)
        chunks = chunks + (tl.load(ptr + column, column < WIDTH, other=0.0),)  # type: ignore[assignment]
    return chunks


@jit
def loads_together(row, other, never):
    """row, of which nothing can be computed before `other` is asked for as well.

    ptxas (12.8) moves a load towards where its values are used: the second of two rows is then asked for when the first has
    come, and a lone row waits for memory twice. never: a comparison that is false, which no compiler can know."""
    out = ()
    for i in tl.static_range(len(row)):
        out = out + (tl.where(never, other[i], row[i]),)  # type: ignore[assignment]
    return out


@jit
def late_row(row, ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """A row, read now if it was not before."""
    return load_row(ptr, WIDTH, CHUNK) if row is None else row


@jit
def store_row(ptr, chunks, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    for i in tl.static_range(len(chunks)):
        column = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(ptr + column, chunks[i], column < WIDTH)


@jit
def inverse_rms(chunks, WIDTH: tl.constexpr, eps):
    x = chunks[0].to(tl.float32)
    squares = x * x
    for i in tl.static_range(1, len(chunks)):
        x = chunks[i].to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares) / WIDTH + eps)


@jit
def scale_row(chunks, scale, weights, dtype: tl.constexpr):
    """chunks * scale [* weights] in fp32, rounded once to dtype."""
    out = ()
    for i in tl.static_range(len(chunks)):
        x = chunks[i].to(tl.float32) * scale
        if weights is not None:
            x *= weights[i].to(tl.float32)
        out = out + (x.to(dtype),)  # type: ignore[assignment]
    return out


@jit
def norm_row(chunks, weights, weight_ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, eps):
    """Gemma4RMSNorm of a row, in its dtype. Weights None: read from weight_ptr after the reduction."""
    scale = inverse_rms(chunks, WIDTH, eps)
    return scale_row(chunks, scale, late_row(weights, weight_ptr, WIDTH, CHUNK), chunks[0].dtype)


@jit
def add_rows(left, right):
    """Sum of two rows, rounded to their dtype."""
    out = ()
    for i in tl.static_range(len(left)):
        out += ((left[i].to(tl.float32) + right[i].to(tl.float32)).to(left[0].dtype),)
    return out


@jit
def times_row(chunks, factor):
    """A row times one fp32 number, rounded to the row's dtype."""
    out = ()
    for i in tl.static_range(len(chunks)):
        out += ((chunks[i].to(tl.float32) * factor).to(chunks[0].dtype),)
    return out


@jit
def new_state(x, residual, weight, scalar, WIDTH: tl.constexpr, CHUNK: tl.constexpr, eps):
    """(residual + norm(x)) [* scalar] of a row, rounded where the unfused graph rounds."""
    hidden = add_rows(residual, norm_row(x, weight, None, WIDTH, CHUNK, eps))
    if scalar is not None:
        hidden = times_row(hidden, scalar)
    return hidden
