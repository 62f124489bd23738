"""A planned step as arrays, and their way to the device and back."""
