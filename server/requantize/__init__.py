"""Chooses the next quantized file of a model against the one that a fleet has: few bytes to send, little said differently. See ADR 41."""
