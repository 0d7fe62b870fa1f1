"""Three versions of SmolLM2-135M as GGUF: the model itself, taught some facts, and damaged."""
