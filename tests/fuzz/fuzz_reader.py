"""Fuzzes `targets.run_reader`: `python -m tests.fuzz.fuzz_reader -max_total_time=60`."""

from tests.fuzz.driver import fuzz

if __name__ == "__main__":
    fuzz("reader")
