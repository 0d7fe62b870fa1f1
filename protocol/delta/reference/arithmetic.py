"""Integers as the context coder counts them: logarithms from a table, quotients towards zero. SPEC section 6.11."""

from typing import Final

from protocol.delta.context_tables import LOG2

STEP: Final = 1 << 16
"""One step of codes, in the units in which they are expected."""

HALF_STEP: Final = 1 << 15
_RATIO_BITS: Final = 47


def clamp(value: int, low: int, high: int) -> int:
    """Return `value`, or the limit that it passes."""
    return low if value < low else min(value, high)


def quotient(value: int, divisor: int) -> int:
    """Return `value / divisor` towards zero; the divisor is positive."""
    return value // divisor if value >= 0 else -(-value // divisor)


def log2_of(value: int) -> int:
    """Return log2 of a magnitude in units of 1/256; 0 for 0."""
    value = abs(value)
    if value == 0:
        return 0
    exponent = value.bit_length() - 1
    fraction = value >> (exponent - 8) if exponent >= 8 else value << (8 - exponent)
    return exponent * 256 + LOG2[fraction & 255]


def ratio_of(value: int, divisor: int, limit: int) -> int:
    """Return `value / divisor` in units of 2**-16, towards zero, within `limit`; 0 if the divisor is 0."""
    if divisor == 0:
        return 0
    x, y = abs(value), abs(divisor)
    while x >> _RATIO_BITS:
        x >>= 1
        y >>= 1
    size = min((x << 16) // y, limit) if y else limit
    return -size if (value < 0) != (divisor < 0) else size


def wide(half: int) -> int:
    """Return a half-precision number in units of 2**-24; infinities and NaN as if they were finite."""
    exponent, mantissa = half >> 10 & 31, half & 1023
    value = (mantissa + 1024) << (exponent - 1) if exponent else mantissa
    return -value if half >> 15 else value


def order16(half: int) -> int:
    """Return half-precision bits as an integer in the order of the numbers."""
    return 65535 - half if half >> 15 else half + 32768


def unorder16(ordered: int) -> int:
    """Undo `order16`, modulo 2**16."""
    word = ordered & 0xFFFF
    return word - 32768 if word >> 15 else 65535 - word
