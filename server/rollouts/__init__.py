"""Rollouts: who is asked when, and what stops one."""
