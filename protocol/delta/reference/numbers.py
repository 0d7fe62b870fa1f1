"""Numbers of any size and small alphabets, bit by bit under adaptive counters. SPEC section 6.11."""

from typing import Final

from protocol.delta.reference.coder import Coder

_BITS_MAX: Final = 46


def code_number(coder: Coder, at: int, value: int) -> int:
    """Code zero or not, sign, bit length in unary, the bits below the highest; the first of those adapts, the others are noise."""
    if not coder.code(at, value != 0):
        return 0
    is_negative = coder.code(at + 1, value < 0)
    size = abs(value)
    bits = size.bit_length() - 1
    length = 0
    while length < _BITS_MAX and coder.code(at + 2 + length, length < bits):
        length += 1
    result = 1
    if length:
        result = 2 | coder.code(at + 49 + length, size >> (length - 1) & 1)
    for i in range(length - 2, -1, -1):
        result = result << 1 | coder.even(size >> i & 1)
    return -result if is_negative else result


def code_tree(coder: Coder, at: int, width: int, value: int) -> int:
    """Code `width` bits, each under a counter of its own for all bits above it."""
    node = 1
    for i in range(width - 1, -1, -1):
        node = node << 1 | coder.code(at + node, value >> i & 1)
    return node - (1 << width)


def code_steps(coder: Coder, at: int, limit: int, wanted: int) -> int:
    """Code how many steps of 1 to `limit`: one decision for each; from the sixteenth on they share a counter."""
    steps = 1
    while steps < limit and coder.code(at + min(steps, 16) - 1, wanted > steps):
        steps += 1
    return steps
