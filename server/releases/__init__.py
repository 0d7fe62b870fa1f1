"""Releases: from a model file to signed targets, and the deltas between them."""
