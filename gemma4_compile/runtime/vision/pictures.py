"""What users give as an image, as a picture of RGB; with limits, as it may come from anyone."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import Request, urlopen

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_TIMEOUT = 10.0  # seconds, for a host to answer


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be.

    bytes    of its file
    pixels   width times height: a small file may hold a huge picture
    files    whether a string may name a file here
    http     whether a string may be an address to be fetched
    """

    bytes: int = 32 << 20
    pixels: int = 64_000_000
    files: bool = True
    http: bool = False


def open_picture(source: Any, limits: ImageLimits) -> Image:
    """A picture in RGB, turned as its camera was held.

    source   a PIL image, an array [height, width, 3] of uint8, bytes of a file, a path, a data URL, or an http address

    Raises ValueError for all else, for what is broken or beyond the limits; ImportError without Pillow."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise ImportError("images take Pillow, got none; pip install 'gemma4-compile[vision]'") from error
    try:
        if isinstance(source, Image.Image):
            picture = source
        elif isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
                raise ValueError(f"an array must be [height, width, 3] uint8, got {list(source.shape)} {source.dtype}")
            picture = Image.fromarray(source)
        else:
            picture = Image.open(io.BytesIO(_bytes_of(source, limits)))
        width, height = picture.size
        if not width or not height:
            raise ValueError(f"it must have a width and a height, got {width} x {height}; see where it comes from")
        if width * height > limits.pixels:
            raise ValueError(f"it must have at most {limits.pixels} pixels, got {width} x {height}; make it smaller")
        return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("an image must be readable, got bytes of no known format; see that the file is whole") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"an image cannot be used: it must have at most {limits.pixels} pixels, got {_line(error)}; make it smaller"
        ) from error
    except ValueError as error:
        raise ValueError(f"an image cannot be used: {_line(error)}") from error
    except Exception as error:  # of the many decoders, in classes of their own
        raise ValueError(f"an image must be readable, got {_line(error)}; see that the file is whole") from error


def _bytes_of(source: Any, limits: ImageLimits) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        found = bytes(source)
    elif isinstance(source, str) and source.startswith("data:"):
        found = _of_data_url(source, limits)
    elif isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        found = _fetched(source, limits)
    elif isinstance(source, (str, Path)):
        if not limits.files:
            raise ValueError("it must be a data URL here, got a name; send its bytes as data:image/png;base64,...")
        path = Path(source)
        size = path.stat().st_size
        if not path.is_file():  # a device has no end, a pipe waits
            raise ValueError("a path must be a file's, got another's; see that it leads to the image")
        if size > limits.bytes:
            raise ValueError(f"its file must have at most {limits.bytes} bytes, got {size}; make it smaller")
        found = path.read_bytes()
    else:
        raise ValueError(f"it must be a PIL image, bytes, a path or a data URL, got {type(source).__name__}")
    if len(found) > limits.bytes:
        raise ValueError(f"its file must have at most {limits.bytes} bytes, got {len(found)}; make it smaller")
    return found


def _of_data_url(url: str, limits: ImageLimits) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError("a data URL must be data:TYPE;base64,BYTES, got one without a comma")
    if len(body) > 3 * limits.bytes:  # the longest way of writing them
        raise ValueError(f"its file must have at most {limits.bytes} bytes, got a longer data URL; make it smaller")
    if not head.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a data URL's base64 must be whole, got {error}") from error


def _fetched(url: str, limits: ImageLimits) -> bytes:
    if not limits.http:
        raise ValueError("addresses are not fetched, got one; send the image's bytes, or allow http")
    request = Request(url, headers={"User-Agent": "gemma4-compile"})
    with urlopen(request, timeout=_TIMEOUT) as answer:
        if urlsplit(answer.url).scheme not in ("http", "https"):
            raise ValueError(f"an address must lead to http, got {urlsplit(answer.url).scheme}")
        return answer.read(limits.bytes + 1)


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
