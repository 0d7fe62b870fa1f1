"""`whimbrel delta make | apply | inspect`: delta files by hand, on any two files; `graph` is in `graph_cli.py`.

Results appear under their name only when they are whole and verified; whatever goes wrong, nothing half done is left.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import resource
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from protocol.delta.format import HEADER_BYTES_MIN, Codec, Profile
from protocol.delta.inspection import Inspection, inspect_delta
from protocol.delta.reader import DeltaReader
from protocol.delta.writer import DEFAULT_SEGMENT_BYTES, make_delta
from protocol.errors import (
    PatchError,
    RequestError,
    StorageError,
    StorageFullError,
    StorageReadOnlyError,
    WrongBaseError,
)
from server import graph_cli, inplace_cli
from server.model_folder import map_in_folder
from server.releases.chain_workers import ChainWorkers, workers_for

_READ_BYTES = 64 * 1024
_HASH_BYTES = 1 << 20
_MEMORY_LIMIT_MIB = 256
_TENSORS_SHOWN = 12


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """Register `delta` with its commands; `args.run(args)` executes the chosen one.

    Args:
        subparsers: Of the `whimbrel` command.
        common: Options of the commands that work on a server's folder.
    """
    delta = subparsers.add_parser(
        "delta", help="make, apply or inspect a delta file; show the fleet's deltas"
    )
    commands = delta.add_subparsers(dest="delta_command", required=True, metavar="COMMAND")

    make = _make_parser(commands)
    apply = commands.add_parser("apply", help="turn OLD into the new file")
    apply.add_argument("old", type=Path, metavar="OLD")
    apply.add_argument("patch", type=Path, metavar="PATCH")
    apply.add_argument("-o", "--output", type=Path, metavar="OUT", help="required without --in-place")
    apply.add_argument(
        "--memory-limit-mib",
        type=int,
        default=_MEMORY_LIMIT_MIB,
        metavar="MIB",
        help="refuse a delta that declares more (default: %(default)s)",
    )

    make.add_argument(
        "--in-place",
        action="store_true",
        help="make it so that devices without room for two files can apply it",
    )
    apply.add_argument(
        "--in-place",
        action="store_true",
        help="turn OLD itself into the new file; again after an interruption",
    )
    apply.add_argument(
        "--inverse",
        type=Path,
        metavar="FILE",
        help="with --in-place: the delta back, which is written meanwhile",
    )

    inspect = commands.add_parser("inspect", help="show what a delta file holds")
    inspect.add_argument("patch", type=Path, metavar="PATCH")

    graph_cli.add_parser(commands, common)

    for command in (make, apply):
        command.add_argument("--force", action="store_true", help="replace an output file that exists")
    for command in (make, apply, inspect):
        command.add_argument("--json", action="store_true", help="print one JSON object for programs")
        command.set_defaults(run=run)


def _make_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    make = commands.add_parser("make", help="write the delta that turns OLD into NEW")
    make.add_argument("old", type=Path, metavar="OLD", help="what devices have")
    make.add_argument("new", type=Path, metavar="NEW", help="what they shall have")
    make.add_argument("-o", "--output", type=Path, required=True, metavar="PATCH")
    make.add_argument(
        "--profile", choices=("small", "fast"), default="small", help="fewest bytes, or most speed"
    )
    make.add_argument(
        "--segment-kib",
        type=int,
        default=DEFAULT_SEGMENT_BYTES >> 10,
        metavar="KIB",
        help="result of one segment: memory on the device, and what a power cut costs (default: %(default)s)",
    )

    make.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that work side by side on a file of more than 64 MiB (default: one for each core)",
    )
    make.add_argument(
        "--portable",
        action="store_true",
        help="for devices that have no compiled library: larger, and read at a bearable speed by Python alone",
    )
    return make


def run(args: argparse.Namespace) -> int:
    """Execute a parsed `delta` command and print its result.

    Returns:
        0; everything else is an error.

    Raises:
        WhimbrelError: One line for the user, and nothing left behind.
    """
    commands = {"make": _make, "apply": _apply, "inspect": _inspect}
    started = time.perf_counter()  # noqa: TID251 - a command reports how long it took
    report = commands[args.delta_command](args)
    report["seconds"] = round(time.perf_counter() - started, 3)  # noqa: TID251 - a command reports how long it took
    report["peak_memory_bytes"] = _peak_memory_bytes()
    if args.json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in _describe(report)))
    return 0


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


def _make(args: argparse.Namespace) -> dict[str, Any]:
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


def _apply(args: argparse.Namespace) -> dict[str, Any]:
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


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
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


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count} bytes"


def _describe(report: dict[str, Any]) -> Iterator[str]:
    if "output" in report:
        yield f"{'wrote':<9}{report['output']}"
    yield f"{'base':<9}{_size(report['base_bytes'])}"
    yield f"{'result':<9}{_size(report['result_bytes'])}"
    ratio = "" if report["ratio"] is None else f", {100 * report['ratio']:.2f} % of the result"
    yield f"{'delta':<9}{_size(report['patch_bytes'])}{ratio}"
    if "inverse" in report:
        yield f"{'inverse':<9}{_size(report['inverse_bytes'])}, {report['inverse']}"
    for side, names in report.get("described_by", {}).items():
        if names:
            yield f"{'tensors':<9}of {side.upper()} are described by {', '.join(names)}"
    yield f"{'memory':<9}{_size(report['decoder_memory_bytes'])} declared for a device"
    yield from _describe_contents(report)
    speed = report["result_bytes"] / max(report["seconds"], 1e-3) / 1e6
    yield f"{'took':<9}{report['seconds']:.2f} s ({speed:.1f} MB/s), {_size(report['peak_memory_bytes'])} at most"


def _describe_contents(report: dict[str, Any]) -> Iterator[str]:
    codecs = report.get("codecs", {})
    if codecs:
        yield ""
        yield f"{'codec':<10}{'segments':>9}{'delta':>14}{'result':>14}"
        for name, row in codecs.items():
            yield f"{name:<10}{row['segments']:>9}{_size(row['patch_bytes']):>14}{_size(row['result_bytes']):>14}"
        yield ""
    layouts = report.get("layouts", {})
    if layouts:
        yield f"{'layouts':<9}" + ", ".join(f"{name} {_size(size)}" for name, size in layouts.items())
    tensors = report.get("tensors", [])
    if tensors:
        yield f"{'tensors':<9}{len(tensors)} changed or new; those that changed most:"
        ranked = sorted(
            tensors, key=lambda row: -(row["bytes"] if row["changed_bytes"] is None else row["changed_bytes"])
        )
        for row in ranked[:_TENSORS_SHOWN]:
            changed = row["changed_bytes"]
            share = "no base" if changed is None else f"{100 * changed / row['bytes']:.1f} % of its bytes"
            reason = f"; {row['reason']}" if row["reason"] else ""
            yield f"  {row['name']:<40} {row['layout']:<8}{_size(row['bytes']):>12}  {share}{reason}"
        yield ""
