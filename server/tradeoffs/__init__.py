"""Versions of one model side by side, tier by tier: what each costs, what it answers, and which of them nothing beats."""
