"""Fuzzing of what reads bytes from outside: the model parsers and the delta reader. `make fuzz MINUTES=30` runs all.

`targets.py` says what must hold for any input, `mutation.py` makes inputs that get past lengths and checksums, `driver.py`
is the only place that knows the fuzzer. `corpus/` holds seeds, and every input that once found something.
"""
