"""The passes inside vLLM: a plug-in that fuses vLLM's own Gemma 4 graph. Off unless GEMMA4_COMPILE_VLLM=1. docs/vllm.md

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`), switched on or not: nothing is imported
here before the switch was looked at.
"""

import os

VARIABLE = "GEMMA4_COMPILE_VLLM"


def register() -> None:
    """vLLM's entry point: patch what has to be patched, once in a process, if the switch is on and the version is known."""
    if os.environ.get(VARIABLE, "") in ("", "0"):
        return
    from .plugin import install

    install()
