"""A model's packed step: what it reads, its attention, and the compiled program of it."""
