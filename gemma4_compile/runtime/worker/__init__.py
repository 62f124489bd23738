"""The device's side of an engine."""
