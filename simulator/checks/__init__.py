"""Promises, checked at every step of a run, and convergence after its faults."""
