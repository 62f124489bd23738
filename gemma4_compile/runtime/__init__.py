"""The runtime: packed batches, attention over pages, CUDA graphs."""
