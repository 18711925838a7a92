"""Load on an engine (`offline`) or an OpenAI-compatible server (all else, which needs the extra `bench`)."""
