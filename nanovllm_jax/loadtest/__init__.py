"""Load on an OpenAI-compatible server, and the latencies that its clients see. It needs the extra `bench`."""
