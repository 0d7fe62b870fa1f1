"""Fuzzes `targets.run_onnx`: `python -m tests.fuzz.fuzz_onnx -max_total_time=60`."""

from tests.fuzz.driver import fuzz

if __name__ == "__main__":
    fuzz("onnx")
