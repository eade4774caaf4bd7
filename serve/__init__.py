"""The live policy: one Ray Serve deployment with a vLLM engine in each replica."""
