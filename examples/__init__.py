"""Builders of the real models that the demos publish. Scripts, never shipped."""
