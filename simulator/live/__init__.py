"""Live mode: real agents, a real broker, real models, real time; only the links are emulated."""
