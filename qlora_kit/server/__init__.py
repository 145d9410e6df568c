"""OpenAI-compatible HTTP over one engine and many adapters, safe by default, and the playground page."""
