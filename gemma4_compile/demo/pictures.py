"""Drawn pictures of one shape in one colour, which the vision demo checkpoint names. Each follows from its number alone."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (30, 60, 220), "yellow": (245, 225, 40),
    "purple": (140, 40, 170), "orange": (250, 140, 20), "black": (15, 15, 15), "white": (250, 250, 250),
}  # fmt: skip
# Corners as (angle in turns, distance from the centre); a circle has none.
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "triangle": tuple((i / 3 + 1 / 12, 1.0) for i in range(3)),
    "square": tuple((i / 4 + 1 / 8, 1.0) for i in range(4)),
    "diamond": tuple((i / 4, 1.0) for i in range(4)),
    "cross": tuple(
        (math.atan2(y, x) / math.tau, math.hypot(x, y))
        for x, y in (
            (0.95, 0.3), (0.3, 0.3), (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3),
            (-0.95, -0.3), (-0.3, -0.3), (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3),
        )
    ),
}  # fmt: skip
QUESTION = "What is in the picture?"
HELD_OUT = 30  # pictures 0 to 29; training begins behind them


@dataclass(frozen=True)
class Picture:
    """What is drawn, and how the checkpoint is to name it."""

    number: int
    image: Image
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


def picture(number: int) -> Picture:
    """The picture of a number, 0 or more: sizes, backgrounds, places and a slight turn differ. Needs Pillow."""
    from PIL import Image, ImageDraw

    draw = random.Random(number)
    colour, shape = draw.choice(list(COLOURS)), draw.choice(list(SHAPES))
    width, height = (draw.choice((120, 160, 192, 240, 320)) for _ in range(2))
    grey = draw.randint(95, 185)
    background = tuple(grey + draw.randint(-12, 12) for _ in range(3))
    image = Image.new("RGB", (width, height), background)
    radius = min(width, height) * draw.uniform(0.27, 0.45)
    x, y = (draw.uniform(radius, side - radius) for side in (width, height))
    turn = draw.uniform(-0.02, 0.02)
    pen, fill = ImageDraw.Draw(image), tuple(min(255, max(0, c + draw.randint(-5, 5))) for c in COLOURS[colour])
    corners = SHAPES[shape]
    if corners:
        around = ((math.tau * (angle + turn), radius * distance) for angle, distance in corners)
        pen.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a, r in around], fill=fill)
    else:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return Picture(number, image, colour, shape)


def held_out_pictures() -> list[Picture]:
    """The 30 pictures that the checkpoint never saw."""
    return [picture(number) for number in range(HELD_OUT)]
