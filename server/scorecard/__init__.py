"""How good a version of a model is, measured once and bound to the digests of its files (docs/scorecard.md)."""
