"""Fuzzes `targets.run_gguf`: `python -m tests.fuzz.fuzz_gguf -max_total_time=60`."""

from tests.fuzz.driver import fuzz

if __name__ == "__main__":
    fuzz("gguf")
