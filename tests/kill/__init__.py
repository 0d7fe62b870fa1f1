"""Kills a live agent with SIGKILL at random instants of real updates: `python -m tests.kill --count 200 --seed 1`."""
