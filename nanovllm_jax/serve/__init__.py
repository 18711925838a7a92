"""The OpenAI-compatible server: an ASGI application over `AsyncLLM`. It needs the extra `serve`."""
