"""What the engine asks of a constraint on a sample's tokens; serve/grammars.py has one, by llguidance."""

from collections.abc import Callable
from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """Which tokens may follow what one sample has so far. The engine's thread calls it, in turns: fill, accept, fill, ..."""

    def fill(self, words: np.ndarray) -> None:
        """Say which tokens may come next.

        words  [vocabulary / 32, rounded up] int32, to be written: bit i of word w is set if token 32 w + i may come

        An error ends this request alone."""

    def accept(self, token: int) -> None:
        """This token has come. Raises nothing: what cannot be is an error of the next `fill`."""


MakeConstraint = Callable[[], Constraint]  # called once for each sample
