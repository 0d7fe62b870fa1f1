"""Fuzzes `targets.run_safetensors`: `python -m tests.fuzz.fuzz_safetensors -max_total_time=60`."""

from tests.fuzz.driver import fuzz

if __name__ == "__main__":
    fuzz("safetensors")
