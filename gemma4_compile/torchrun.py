"""What torchrun says of this process; without an import that takes time."""

import os


def launched_ranks() -> int:
    """Processes of the torchrun that this one is of; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process among them; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


class RanksError(RuntimeError):
    """The ranks are not in step any more: none of them can go on."""
