"""The passes inside vLLM: a plug-in that fuses vLLM's own Gemma 4 graph. docs/vllm.md"""

VARIABLE = "GEMMA4_COMPILE_VLLM"  # 1: switched on
