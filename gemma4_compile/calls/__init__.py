"""What runs Hugging Face's own calls, `model(...)` and `model.generate(...)`, as steps of the packed program."""
