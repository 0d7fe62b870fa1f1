"""Fuzzes `targets.run_planner`: `python -m tests.fuzz.fuzz_planner -max_total_time=60`."""

from tests.fuzz.driver import fuzz

if __name__ == "__main__":
    fuzz("planner")
