"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`), switched on or not."""

import os

from . import VARIABLE


def register() -> None:
    """Patch vLLM, if the switch is on and the version is known. Nothing is imported before the switch was looked at."""
    if os.environ.get(VARIABLE, "") not in ("", "0"):
        from .plugin import install

        install()
