"""Images on their way to a step: opened, cut into patches, and placed among a prompt's tokens."""
