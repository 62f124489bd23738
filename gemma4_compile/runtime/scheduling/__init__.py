"""Which requests run in a step, and which pages they hold."""
