"""What we know of transformers: how its models are loaded, divided, cached and changed."""
