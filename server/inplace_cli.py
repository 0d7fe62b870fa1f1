"""`whimbrel delta apply --in-place`: OLD itself becomes the new file, and the inverse is written beside it.

What was interrupted goes on when the same command is given again; a delta that proves unusable leaves OLD as it was.
"""

import argparse
import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from protocol.delta.inplace import Files, InPlace, read_header
from protocol.delta.undo_journal import Phase, journal_bytes
from protocol.errors import PatchError, RequestError, StorageFullError, WhimbrelError
from protocol.tensors.regions import ReadAt
from server.adapters.blobs import storage_errors

JOURNAL_SUFFIX = ".whimbrel-journal"
"""The journal lies beside the file, and is gone when the command has ended well."""

_HASH_BYTES = 1 << 20
_NO_LIMIT_BYTES = 1 << 62  # what does not fit is found when it is written, and the file is put back


class _Medium:
    """A file that is written in place."""

    def __init__(self, path: Path, *, is_new: bool = False) -> None:
        self._path = path
        with storage_errors(path):
            self._fd = os.open(path, os.O_RDWR | (os.O_CREAT if is_new else 0) | os.O_CLOEXEC, 0o644)

    @property
    def length(self) -> int:
        with storage_errors(self._path):
            return os.fstat(self._fd).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        with storage_errors(self._path):
            data = os.pread(self._fd, length, offset)
            while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
                data += more
            return data

    def write_at(self, offset: int, data: bytes) -> None:
        with storage_errors(self._path):
            view = memoryview(data)
            while view:
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written

    def sync(self) -> None:
        with storage_errors(self._path):
            os.fdatasync(self._fd)

    def resize(self, length: int) -> None:
        with storage_errors(self._path):
            before = os.fstat(self._fd).st_size
            if length > before:
                os.posix_fallocate(self._fd, before, length - before)
            os.ftruncate(self._fd, length)
            os.fsync(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def apply_in_place(
    args: argparse.Namespace, patch: ReadAt, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Turn `args.old` into the new file.

    Args:
        args: Of the command: `old`, `inverse`, `memory_limit_mib`, `force`.
        patch: The delta.
        progress: Called with bytes of the result done and in all.

    Returns:
        What to report.

    Raises:
        RequestError: The inverse has no place, or its name is taken.
        PatchError: The delta is unusable; the file is as it was.
        StorageError: The disk failed; the command given again goes on.
    """
    journal = args.old.with_name(args.old.name + JOURNAL_SUFFIX)
    header = read_header(patch)
    if args.inverse is None:
        raise RequestError("--in-place needs --inverse FILE", hint="it is the only way back")
    if not args.old.is_file():
        raise RequestError(f"{args.old}: no such file")
    if args.inverse.exists() and not journal.exists() and not args.force:
        raise RequestError(f"{args.inverse}: exists", hint="choose another name, or pass --force")
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(_Medium(args.old))
        inverse = stack.enter_context(_Medium(args.inverse, is_new=True))
        ring = stack.enter_context(_Medium(journal, is_new=True))
        try:
            if ring.length < journal_bytes(header):
                ring.resize(journal_bytes(header))  # nothing has begun before it is that long
            files = Files(target, patch, ring, inverse)
            inverse_length = _carry_out(files, args.memory_limit_mib << 20, progress)
        except _PutBackError as error:
            # The file is as it was before, so nothing is left of the attempt.
            args.inverse.unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
            raise error.reason from error.reason.__cause__
    journal.unlink()
    return {"inverse": str(args.inverse), "inverse_bytes": inverse_length, "header": header}


class _PutBackError(Exception):
    """The file is what it was before, for a reason that the user shall hear."""

    def __init__(self, reason: WhimbrelError) -> None:
        super().__init__(reason)
        self.reason = reason


def _carry_out(files: Files, memory_limit_bytes: int, progress: Callable[[int, int], None]) -> int:
    """Apply, or put back; return the length of the inverse."""

    def opened() -> InPlace:
        return InPlace(files, memory_limit_bytes=memory_limit_bytes, inverse_bytes_max=_NO_LIMIT_BYTES)

    work = opened()
    try:
        if work.phase is Phase.NEW:
            work.begin(_sha256(files.target))
        while not work.step():
            progress(work.position, work.header.result_length)
        _check(work, files)
    except (PatchError, StorageFullError) as error:
        work = opened()
        if work.phase is not Phase.NEW:
            work.undo()
            while not work.step():
                pass
        raise _PutBackError(error) from error
    return work.inverse_length


def _check(work: InPlace, files: Files) -> None:
    """Look at what came of it, as it can be read back."""
    if work.phase is Phase.UNDONE:
        raise PatchError("the delta proved unusable before; the file is as it was")
    if _sha256(files.target) != work.header.result_sha256:
        raise PatchError("the result does not have the announced SHA-256")


def _sha256(source: ReadAt) -> bytes:
    digest = hashlib.sha256()
    for offset in range(0, source.length, _HASH_BYTES):
        digest.update(source.read_at(offset, _HASH_BYTES))
    return digest.digest()
