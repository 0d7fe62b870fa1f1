"""Integers of variable length, as headers, records and parameters have them (SPEC section 6). Without numpy: an agent at rest needs them."""


def write_varint(value: int, out: bytearray) -> None:
    """Append a non-negative integer, seven bits a byte, lowest first."""
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def write_signed(value: int, out: bytearray) -> None:
    """Append an integer of either sign: zigzag, then `write_varint`."""
    write_varint(value * 2 if value >= 0 else -value * 2 - 1, out)
