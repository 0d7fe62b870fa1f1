"""The measurements behind docs/adr/0011-c-and-ctypes.md."""
