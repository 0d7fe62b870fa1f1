"""Diagnosis: what is different between two versions of a model, and what most likely happened to the newer one."""
