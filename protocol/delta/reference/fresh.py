"""Blocks that have no base: every field under how often its values have occurred. SPEC section 6.11."""

from protocol.delta.reference.blocks import Parts, join, split
from protocol.delta.reference.numbers import code_tree
from protocol.delta.reference.run import Context
from protocol.delta.reference.state import FRESH_WORDS


def code_fresh(x: Context, new: bytes | memoryview) -> bytes:
    """Code a run of blocks; the contents of `new` are of no meaning to a reader, but its length is."""
    if x.shape.is_words:
        return _code_words(x, new)
    parts = split(x.shape, new, is_raw=True)
    for b in range(len(parts.codes)):
        _code_block(x, parts, b)
    return join(x.shape, parts, is_raw=True)


def _code_words(x: Context, new: bytes | memoryview) -> bytes:
    """Code bytes, the highest of a word first; all from the fourth on look alike."""
    size = x.shape.layout.block_bytes
    out = bytearray(new)
    order = [(size - 1 - plane, FRESH_WORDS + min(plane, 3) * 256) for plane in range(size)]
    for start in range(0, len(out), size):
        for offset, at in order:
            out[start + offset] = code_tree(x.coder, at, 8, out[start + offset])
    return bytes(out)


def _code_block(x: Context, parts: Parts, b: int) -> None:
    coder, shape, m = x.coder, x.shape, x.model
    for which, halves in enumerate((parts.d, parts.m)):
        if halves:
            at = FRESH_WORDS + which * 512
            high = code_tree(coder, at, 8, halves[b] >> 8)
            halves[b] = high << 8 | code_tree(coder, at + 256, 8, halves[b] & 255)
    for field, values, at in (
        (shape.sub, parts.sub, m.fresh + 256),
        (shape.submin, parts.submin, m.fresh + 256),
        (shape.layout.codes, parts.codes, m.fresh),
    ):
        if field:
            width = field.width
            values[b] = [code_tree(coder, at, width, value) for value in values[b]]
