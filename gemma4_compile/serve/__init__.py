"""An OpenAI-compatible server on AsyncEngine: HTTP in, engine requests out. docs/server.md tells how to use it."""
