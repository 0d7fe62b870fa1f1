"""Fuzzes `targets.run_coders`: `python -m tests.fuzz.fuzz_coders -max_total_time=60`."""

from tests.fuzz.driver import fuzz

if __name__ == "__main__":
    fuzz("coders")
