"""What server and devices must agree on: messages, topics, trust, chunks, tensor maps and the delta file.

Pure: bytes in, values or errors out. Nothing here opens a file, a socket or a clock. `SPEC.md` is normative.
"""
