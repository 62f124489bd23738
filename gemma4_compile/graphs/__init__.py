"""CUDA graphs of a packed program."""
