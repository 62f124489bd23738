"""The runtime: an engine of continuous batches over paged keys and values, with multi-token prediction."""
