"""Applying a delta to the file itself, and going back: one file, room for a journal, and the inverse that is written on the way.

What is about to be overwritten is first made durable in the journal, so that after a power cut the step under way is undone and
done again. Works on four files that the caller opens; whoever owns them decides when the inverse may go. SPEC section 6.12.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from protocol.delta.format import HEADER_PREFIX_BYTES, Header, header_length
from protocol.delta.inverse import InverseState, InverseWriter, inverse_header
from protocol.delta.reader import DEFAULT_MEMORY_LIMIT_BYTES, DeltaReader, Piece
from protocol.delta.undo_journal import Entry, Medium, Phase, UndoJournal, read_exactly
from protocol.errors import (
    NotInPlaceError,
    PatchError,
    PatchLimitError,
    TruncatedPatchError,
    WrongBaseError,
)
from protocol.tensors.regions import ReadAt

_FEED_BYTES: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Files:
    """What an application in place works on.

    Attributes:
        target: The file that is turned into the new one, and back.
        patch: The delta.
        journal: As long as `journal_bytes` says, zeros at first.
        inverse: Of any length at first: what was reserved and is not used is given back at the end.
    """

    target: Medium
    patch: ReadAt
    journal: Medium
    inverse: Medium


def read_header(patch: ReadAt) -> Header:
    """Return the header of a delta that can be applied in place.

    Raises:
        NotInPlaceError: It was not made for that.
        PatchError: It is no delta, or damaged.
    """
    prefix = patch.read_at(0, HEADER_PREFIX_BYTES)
    if len(prefix) == HEADER_PREFIX_BYTES:
        length = header_length(prefix)
        packed = patch.read_at(0, length)
        if len(packed) == length:
            header = Header.unpack(packed)
            if header.reach is None:
                raise NotInPlaceError(
                    "the delta was not made for application in place", hint="make it with --in-place"
                )
            return header
    raise TruncatedPatchError("the delta file ends before the end of its header", hint="fetch it again")


class InPlace:
    """One application in place, and the way back.

    Opening it reads the journal: what an earlier life began goes on where it was cut. After an error that a method raised, open a new one.

    Args:
        files: What it works on.
        memory_limit_bytes: As for `DeltaReader`.
        inverse_bytes_max: Room for the inverse.

    Attributes:
        header: Of the delta.
        phase: How far it is.

    Raises:
        NotInPlaceError: The delta was not made for this.
        PatchError: It is damaged, or not the one that the journal is about.
        StorageError: The disk failed.
    """

    def __init__(
        self,
        files: Files,
        *,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
        inverse_bytes_max: int,
    ) -> None:
        self._files = files
        self._memory_limit_bytes = memory_limit_bytes
        self._inverse_bytes_max = inverse_bytes_max
        self.header = read_header(files.patch)
        self._journal = UndoJournal(files.journal, self.header)
        self._inverse: InverseWriter | None = None
        self._is_inverse_synced = True
        self._way: _Way | None = None
        self.phase = Phase.NEW
        entry = self._journal.load()
        if entry is not None:
            self._resume(entry)

    @property
    def position(self) -> int:
        """Up to where the target has been turned into what it shall become, while that goes on."""
        return self._way.position if self._way else 0

    @property
    def inverse_length(self) -> int:
        """Bytes of the inverse, so far."""
        return self._inverse.length if self._inverse else 0

    def begin(self, base_sha256: bytes) -> None:
        """Start. Whatever is refused is refused here, before a byte of the target is overwritten.

        Args:
            base_sha256: Digest of the target, measured now.

        Raises:
            WrongBaseError: The delta was made for another file.
            PatchLimitError: It needs more memory than is accepted.
            InverseFullError: There is no room for any inverse.
        """
        assert self.phase is Phase.NEW
        if base_sha256 != self.header.base_sha256 or self._files.target.length != self.header.base_length:
            raise WrongBaseError("the delta was made for another file than the one to be overwritten")
        for header in (self.header, inverse_header(self.header)):
            if header.decoder_memory_bytes > self._memory_limit_bytes:
                raise PatchLimitError(
                    f"the delta or its inverse needs {header.decoder_memory_bytes} bytes of memory,"
                    f" {self._memory_limit_bytes} are accepted"
                )
        self._inverse = InverseWriter(self.header, self._files.inverse, None, self._inverse_bytes_max)
        self._is_inverse_synced = False
        self._way = self._open(Phase.APPLYING, b"", self.header.result_length)
        self.phase = Phase.APPLYING
        self.checkpoint()
        self._grow()

    def step(self) -> bool:
        """Do one step.

        Returns:
            Whether the target is what it shall become.

        Raises:
            PatchError: The delta is unusable; `undo` of a new object puts the file back.
            InverseFullError: There is no room for the inverse; likewise.
            StorageError: The disk failed; a new object goes on.
        """
        if self.phase in {Phase.APPLIED, Phase.UNDONE}:
            return True
        way = self._way
        assert way is not None
        before = self._entry()
        pieces = list(way.decode(before.start + self._journal.step_bytes))
        end = way.reader.result_offset
        is_last = end >= way.stop
        if is_last and self.phase is Phase.APPLYING:
            way.expect_end()  # before the last of the old file goes
        target = self._files.target
        changed = [piece for piece in pieces if target.read_at(piece.offset, len(piece.data)) != piece.data]
        # Nothing looks back at bytes that are as they were, unless it looks back at all.
        if changed or (way.behind and end > before.start):
            crc = self._journal.save(target, before.start, end)
            self._store(Entry(self.phase, before.start, end, crc, way.stop, before.reader, before.inverse))
        if self.phase is Phase.APPLYING:
            self._write_inverse(way, pieces, end, is_last=is_last)
        for piece in changed:
            target.write_at(piece.offset, piece.data)
        if changed:
            target.sync()
        way.position = end
        if is_last:
            self._conclude()
        return is_last

    def checkpoint(self) -> None:
        """Make durable that the last step is done; without it the next life undoes that step and does it again."""
        if self.phase in {Phase.APPLYING, Phase.UNDOING}:
            self._store(self._entry())

    def undo(self) -> None:
        """Turn round: from now on `step` puts the old file back.

        For an object that was just opened, or whose last step went well.

        Raises:
            InverseFullError: Not while the inverse was written by this class, which keeps room for this.
            StorageError: The disk failed; a new object goes on.
        """
        if self.phase in {Phase.NEW, Phase.UNDOING, Phase.UNDONE}:
            return
        assert self._inverse is not None
        stop = self.header.base_length
        if self.phase is Phase.APPLYING:
            assert self._way is not None
            stop = min(stop, self._way.position)  # behind that, the old file is still there
            self._inverse.emit(stop, self._way.base, self._files.target)
            self._is_inverse_synced = False
        self._way = self._open(Phase.UNDOING, b"", stop)
        self.phase = Phase.UNDOING
        self.checkpoint()
        self._grow()

    def _write_inverse(self, way: "_Way", pieces: list[Piece], end: int, *, is_last: bool) -> None:
        """Write the inverse of the old bytes that will not be in the ring any longer when the next step begins."""
        inverse = self._inverse
        assert inverse is not None
        for piece in pieces:
            inverse.learn(piece.moves)
        new = _NewView(self._files.target, pieces, way.position, end)
        kept = 0 if is_last else min(way.behind, end)
        inverse.emit(self.header.base_length if is_last else end - kept, way.base, new)
        inverse.check_room(kept)  # for turning round before the next step
        if is_last:
            inverse.finish()
        self._is_inverse_synced = False

    def _conclude(self) -> None:
        """The target is complete and durable: say so, and only then cut what is too long."""
        if self.phase is Phase.APPLYING:
            self._files.inverse.resize(self.inverse_length)
        self.phase = Phase.APPLIED if self.phase is Phase.APPLYING else Phase.UNDONE
        self._store(self._entry())
        self._cut()

    def _resume(self, entry: Entry) -> None:
        self.phase = entry.phase
        if entry.phase in {Phase.APPLYING, Phase.APPLIED}:
            self._inverse = InverseWriter(
                self.header, self._files.inverse, entry.inverse, self._inverse_bytes_max
            )
        if entry.phase in {Phase.APPLIED, Phase.UNDONE}:
            self._cut()
            return
        self._grow()
        if entry.end > entry.start:
            self._journal.put_back(self._files.target, entry.start, entry.end)
        self._way = self._open(entry.phase, entry.reader, entry.stop)
        if self._way.position != entry.start:
            raise PatchError("the journal of an application in place contradicts itself")

    def _open(self, phase: Phase, state: bytes, stop: int) -> "_Way":
        """Return the way of a phase: forward with the delta, or back with its inverse."""
        is_forward = phase is Phase.APPLYING
        return _Way(
            self._files.patch if is_forward else self._files.inverse,
            self.header if is_forward else inverse_header(self.header),
            self._files.target,
            self._journal,
            state=state,
            stop=stop,
            memory_limit_bytes=self._memory_limit_bytes,
            tells_moves=is_forward,
        )

    def _entry(self) -> Entry:
        """Return a record of the state now, between two steps."""
        inverse = self._inverse.state if self._inverse else InverseState()
        way = self._way
        if way is None or self.phase in {Phase.APPLIED, Phase.UNDONE}:
            return Entry(self.phase, 0, 0, 0, 0, b"", inverse)
        return Entry(self.phase, way.position, way.position, 0, way.stop, way.reader.dump(), inverse)

    def _store(self, entry: Entry) -> None:
        """Make a record durable, and before it the inverse of which it speaks."""
        if not self._is_inverse_synced:
            self._files.inverse.sync()
            self._is_inverse_synced = True
        self._journal.store(entry)

    def _grow(self) -> None:
        """Make the target long enough for both files."""
        length = max(self.header.base_length, self.header.result_length)
        if self._files.target.length < length:
            self._files.target.resize(length)

    def _cut(self) -> None:
        is_new = self.phase is Phase.APPLIED
        length = self.header.result_length if is_new else self.header.base_length
        if self._files.target.length != length:
            self._files.target.resize(length)


class _Way:
    """One direction: a delta, what it applies to while that is being overwritten, and how far it is.

    Attributes:
        reader: Of the delta.
        base: The file before.
        position: Everything before this is done and durable.
        stop: Where the way ends.
    """

    def __init__(
        self,
        source: ReadAt,
        header: Header,
        target: ReadAt,
        journal: UndoJournal,
        *,
        state: bytes,
        stop: int,
        memory_limit_bytes: int,
        tells_moves: bool,
    ) -> None:
        assert header.reach is not None
        self._source = source
        self.behind = header.reach.behind_bytes
        self.base = _BaseView(target, journal, header)
        self.reader = (
            DeltaReader.restore(
                self.base, state, memory_limit_bytes=memory_limit_bytes, tells_moves=tells_moves
            )
            if state
            else DeltaReader(self.base, memory_limit_bytes=memory_limit_bytes, tells_moves=tells_moves)
        )
        self._fed = self.reader.patch_offset
        self.position = self.reader.result_offset
        self.stop = stop

    @property
    def position(self) -> int:
        return self.base.position

    @position.setter
    def position(self, value: int) -> None:
        self.base.position = value

    def decode(self, until: int) -> Iterator[Piece]:
        """Yield pieces up to an offset of the result, or a little more."""
        until = min(until, self.stop)
        data = b""  # the reader may hold more than the last step took
        while self.reader.result_offset < until:
            for piece in self.reader.feed(data):
                yield piece
                if self.reader.result_offset >= until:
                    return
            data = self._next()

    def expect_end(self) -> None:
        """Read what comes after the last segment."""
        data = b""
        while True:
            for _ in self.reader.feed(data):
                raise PatchError("a delta gives more than it announced")
            if self.reader.is_finished:
                return
            data = self._next()

    def _next(self) -> bytes:
        data = self._source.read_at(self._fed, _FEED_BYTES)
        if not data:
            self.reader.finish()
        self._fed += len(data)
        return data


class _BaseView:
    """The file that a delta applies to, while its first `position` bytes are something else already."""

    def __init__(self, target: ReadAt, journal: UndoJournal, header: Header) -> None:
        assert header.reach is not None
        self._target = target
        self._journal = journal
        self._behind = header.reach.behind_bytes
        self.length = header.base_length
        self.position = 0

    def read_at(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.length)
        if offset < self.position - self._behind:
            raise PatchError(f"a segment looks at byte {offset}, which is gone")
        cut = min(max(offset, self.position), max(offset, end))
        before = self._journal.saved(offset, cut - offset)
        return before + (self._target.read_at(cut, end - cut) if end > cut else b"")


class _NewView:
    """The new file up to the end of a step whose pieces are not written yet."""

    def __init__(self, target: ReadAt, pieces: list[Piece], start: int, end: int) -> None:
        self._target = target
        self._pieces = pieces
        self._start = start
        self.length = end

    def read_at(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.length)
        parts: list[bytes] = []
        if offset < self._start:
            parts.append(read_exactly(self._target, offset, min(end, self._start) - offset))
        for piece in self._pieces:
            low, high = max(offset, piece.offset), min(end, piece.offset + len(piece.data))
            if low < high:
                parts.append(piece.data[low - piece.offset : high - piece.offset])
        return b"".join(parts)
