"""The page of a server, driven in a real browser: a real server with a broker, real agents with real models."""
