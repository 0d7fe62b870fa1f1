"""What `whimbrel delta make | apply | inspect` do: deltas between files, each report one JSON object. Only these commands load it.

Results appear under their name only when they are whole and verified; whatever goes wrong, nothing half done is left.
"""

import argparse
import contextlib
import errno
import hashlib
import os
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from protocol.delta.format import HEADER_BYTES_MIN, Codec, Profile
from protocol.delta.inspection import Inspection, inspect_delta
from protocol.delta.reader import DeltaReader
from protocol.delta.writer import make_delta
from protocol.errors import (
    PatchError,
    RequestError,
    StorageError,
    StorageFullError,
    StorageReadOnlyError,
    WrongBaseError,
)
from server import inplace_cli
from server.model_folder import map_in_folder
from server.releases.chain_workers import ChainWorkers, workers_for

_READ_BYTES = 64 * 1024
_HASH_BYTES = 1 << 20


class _File:
    """A regular file as `ReadAt`."""

    def __init__(self, path: Path) -> None:
        with _storage_errors(path):
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            status = os.fstat(self._fd)
        self.path = path
        self.length = status.st_size
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise RequestError(f"{path}: not a regular file")

    def read_at(self, offset: int, length: int) -> bytes:
        with _storage_errors(self.path):
            parts: list[bytes] = []
            while length:
                part = os.pread(self._fd, length, offset)
                if not part:
                    break
                parts.append(part)
                offset += len(part)
                length -= len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def sha256(self) -> bytes:
        digest = hashlib.sha256()
        for offset in range(0, self.length, _HASH_BYTES):
            digest.update(self.read_at(offset, _HASH_BYTES))
        return digest.digest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says into one line with a hint."""
    try:
        yield
    except FileNotFoundError as error:
        raise RequestError(f"{path}: no such file or folder") from error
    except IsADirectoryError as error:
        raise RequestError(f"{path}: is a folder, a file is needed") from error
    except PermissionError as error:
        raise RequestError(f"{path}: permission denied", hint="check the file's owner and mode") from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFullError(
                f"{path}: no space left", hint="make room or choose another folder"
            ) from error
        if error.errno == errno.EROFS:
            raise StorageReadOnlyError(f"{path}: the file system is read-only") from error
        raise StorageError(f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _output(path: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Give a file that takes the name `path` only when the block ends well."""
    if path.is_dir():
        raise RequestError(f"{path}: is a folder, a file name is needed")
    if path.exists() and not force:
        raise RequestError(f"{path}: exists", hint="choose another name, or pass --force to replace it")
    with _storage_errors(path.parent):
        fd, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".part", dir=path.parent)
    try:
        with _storage_errors(path):
            with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor is opened, not a path
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())  # noqa: PTH101 - a temporary name of our own
            os.replace(name, path)  # noqa: PTH105 - likewise
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class _Progress:
    """A line on stderr that is rewritten, where a person looks at one."""

    def __init__(self, what: str, *, is_quiet: bool) -> None:
        self._what = what
        self._is_shown = not is_quiet and sys.stderr.isatty()
        self._percent = -1

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // total if total else 100
        if self._is_shown and percent != self._percent:
            self._percent = percent
            sys.stderr.write(f"\r{self._what} {percent:3d} %")
            sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown and self._percent >= 0:
            sys.stderr.write("\r\x1b[K")


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Write the delta that turns one file into another.

    Raises:
        WhimbrelError: One line for the user, and nothing left behind.
    """
    if args.workers is not None and args.workers < 1:
        raise RequestError(f"--workers {args.workers}: at least 1 is needed")
    with (
        _File(args.old) as old,
        _File(args.new) as new,
        _output(args.output, force=args.force) as out,
        _Progress("making", is_quiet=args.json) as progress,
    ):
        (old_map, old_beside), (new_map, new_beside) = (map_in_folder(each.path, each) for each in (old, new))
        stats = make_delta(
            old,
            new,
            out,
            maps=(old_map, new_map),
            profile=Profile[args.profile.upper()],
            segment_bytes=args.segment_kib << 10,
            is_portable=args.portable or None,
            in_place=args.in_place,
            progress=progress,
            encode_chains=_chain_workers(args, new.length),
        )
    return {
        "command": "make",
        "output": str(args.output),
        "base_bytes": old.length,
        "result_bytes": new.length,
        "patch_bytes": stats.patch_length,
        "ratio": _ratio(stats.patch_length, new.length),
        "described_by": {"old": old_beside, "new": new_beside},
        "result_sha256": stats.header.result_sha256.hex(),
        "decoder_memory_bytes": stats.header.decoder_memory_bytes,
        "codecs": _codecs(stats.segments, stats.patch_bytes, stats.result_bytes),
    }


def _chain_workers(args: argparse.Namespace, result_bytes: int) -> ChainWorkers | None:
    workers = workers_for(result_bytes, args.workers)
    return ChainWorkers(args.old, args.new, workers) if workers > 1 else None


def apply(args: argparse.Namespace) -> dict[str, Any]:
    """Turn a file into the new one.

    Raises:
        WhimbrelError: One line for the user, and nothing left behind.
    """
    if args.in_place:
        return _apply_in_place(args)
    if args.output is None or args.inverse is not None:
        raise RequestError("apply needs -o OUT, or --in-place with --inverse FILE")
    with _File(args.old) as old, _File(args.patch) as patch:
        reader = DeltaReader(old, memory_limit_bytes=args.memory_limit_mib << 20)
        with (
            _output(args.output, force=args.force) as out,
            _Progress("applying", is_quiet=args.json) as progress,
        ):
            offset = _feed_header(reader, patch, old)
            for at in range(offset, patch.length, _READ_BYTES):
                for piece in reader.feed(patch.read_at(at, _READ_BYTES)):
                    out.write(piece.data)
                    progress(reader.result_offset, reader.header.result_length if reader.header else 0)
            reader.finish()
            header = reader.header
            if header is None or not reader.is_result_verified:
                raise PatchError("the result could not be verified")
    return {
        "command": "apply",
        "output": str(args.output),
        "base_bytes": old.length,
        "patch_bytes": patch.length,
        "result_bytes": header.result_length,
        "ratio": _ratio(patch.length, header.result_length),
        "result_sha256": header.result_sha256.hex(),
        "decoder_memory_bytes": header.decoder_memory_bytes,
    }


def _apply_in_place(args: argparse.Namespace) -> dict[str, Any]:
    if args.output is not None:
        raise RequestError("--in-place writes to OLD itself", hint="leave -o away")
    with _File(args.patch) as patch, _Progress("applying", is_quiet=args.json) as progress:
        done = inplace_cli.apply_in_place(args, patch, progress)
        header = done["header"]
        return {
            "command": "apply",
            "output": str(args.old),
            "inverse": done["inverse"],
            "inverse_bytes": done["inverse_bytes"],
            "base_bytes": header.base_length,
            "patch_bytes": patch.length,
            "result_bytes": header.result_length,
            "ratio": _ratio(patch.length, header.result_length),
            "result_sha256": header.result_sha256.hex(),
            "decoder_memory_bytes": header.decoder_memory_bytes,
        }


def _feed_header(reader: DeltaReader, patch: _File, old: _File) -> int:
    """Feed the header, check the base against it, and return how many bytes were fed."""
    offset = 0
    while reader.header is None and offset < patch.length:
        # Byte by byte towards its end, as it may be longer than usual: a segment must not be fed with it.
        part = patch.read_at(offset, HEADER_BYTES_MIN if offset == 0 else 1)
        for _ in reader.feed(part):
            raise AssertionError("there are no segments before the header")
        offset += len(part)
    if reader.header is not None and old.sha256() != reader.header.base_sha256:
        raise WrongBaseError(
            f"{old.path}: not the file that the delta was made for, its SHA-256 differs",
            hint=f"a file with SHA-256 {reader.header.base_sha256.hex()} is needed",
        )
    return offset


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Tell what a delta file holds.

    Raises:
        WhimbrelError: One line for the user, and nothing left behind.
    """
    with _File(args.patch) as patch:
        found = inspect_delta(patch)
    header = found.header
    return {
        "command": "inspect",
        "profile": header.profile.name.lower(),
        "base_bytes": header.base_length,
        "base_sha256": header.base_sha256.hex(),
        "result_bytes": header.result_length,
        "result_sha256": header.result_sha256.hex(),
        "patch_bytes": found.patch_length,
        "ratio": _ratio(found.patch_length, header.result_length),
        "decoder_memory_bytes": header.decoder_memory_bytes,
        "codecs": _codecs(found.segments, found.patch_bytes, found.result_bytes),
        "layouts": {layout.value: size for layout, size in found.layout_bytes.most_common()},
        "tensors": _tensors(found),
    }


def _tensors(found: Inspection) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "layout": tensor.layout,
            "bytes": tensor.length,
            "changed_bytes": tensor.changed_bytes,
            "matched_by": tensor.matched_by or None,
            "correlation": tensor.correlation,
            "reason": tensor.reason,
        }
        for tensor in found.tensors
    ]


def _codecs(
    segments: Counter[Codec], patch_bytes: Counter[Codec], result_bytes: Counter[Codec]
) -> dict[str, dict[str, int]]:
    return {
        ("frame" if codec is Codec.END else codec.name.lower()): {
            "segments": segments[codec],
            "patch_bytes": patch_bytes[codec],
            "result_bytes": result_bytes[codec],
        }
        for codec in Codec
        if patch_bytes[codec]
    }


def _ratio(patch_bytes: int, result_bytes: int) -> float | None:
    return round(patch_bytes / result_bytes, 6) if result_bytes else None
