"""The context coder in plain Python integers: what a device runs that has no compiled library, and what the library is checked against.

Module for module as in `protocol/delta/native`, so that a change there is one change here: `coder` is coder.h, `state` is model.h, and so on.
Payloads, results and states are the same bytes in both.
"""
