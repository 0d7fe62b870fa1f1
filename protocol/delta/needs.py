"""What applying a delta in place will take, found by whoever has both files: nothing is decoded, only the inverse is written, to nowhere."""

from protocol.delta.codecs import read_tables
from protocol.delta.format import WITHOUT_RESULT, Codec
from protocol.delta.inspection import read_segments
from protocol.delta.inverse import InverseWriter
from protocol.delta.moves import moves_of
from protocol.delta.runs import Basis
from protocol.delta.undo_journal import STEP_BYTES
from protocol.release import InPlaceNeeds
from protocol.tensors.regions import ReadAt

_NO_LIMIT_BYTES = 1 << 62


class _Nowhere:
    """Takes an inverse that nobody will read."""

    def write_at(self, offset: int, data: bytes, /) -> None:
        """Forget it."""


def in_place_needs(base: ReadAt, result: ReadAt, patch: ReadAt) -> InPlaceNeeds | None:
    """Return what a delta takes where its base is rewritten; None if it was not made for that.

    The inverse of a device differs in length by as much as its steps and its compression library do, which is little.

    Args:
        base: What the delta applies to.
        result: What it gives.
        patch: The delta.

    Raises:
        PatchError: It is damaged.
    """
    header, segments = read_segments(patch)
    if header.reach is None:
        return None
    inverse = InverseWriter(header, _Nowhere(), None, _NO_LIMIT_BYTES)
    basis: Basis | None = None
    offset = 0
    for segment, body, _ in segments:
        if segment.codec is Codec.TABLES:
            basis = read_tables(segment, body)
        if segment.codec in WITHOUT_RESULT:
            continue
        inverse.learn(moves_of(segment, body, offset, basis))
        offset += segment.result_length
        if offset - inverse.state.cursor >= STEP_BYTES + header.reach.behind_bytes:
            inverse.emit(offset - header.reach.behind_bytes, base, result)
    inverse.emit(header.base_length, base, result)
    inverse.finish()
    return InPlaceNeeds(
        base_bytes=header.base_length,
        reach_bytes=max(header.reach.behind_bytes, header.reach.ahead_bytes),
        inverse_bytes=inverse.length,
    )
