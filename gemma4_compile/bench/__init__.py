"""Times of a model under load: our engine, a server at a URL, or another system in the same call. docs/bench.md tells how."""
