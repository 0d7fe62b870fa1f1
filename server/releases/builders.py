"""Deltas built in child processes: minutes of work and a model's worth of memory stay out of the server.

A child per delta, so that one that dies, hangs or eats all memory costs that delta and nothing else, and so that the
server can stop at once. This module is also the child: `python -m server.releases.builders BLOBS BASE RESULT PROFILE`,
with the names of the files beside base and result.
"""

import argparse
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
from msgspec import Struct

from protocol.delta.format import Profile
from protocol.delta.needs import in_place_needs
from protocol.delta.writer import make_delta
from protocol.errors import WhimbrelError
from protocol.ids import Digest, parse_digest
from protocol.release import DeltaName, InPlaceNeeds, ReleaseFile
from protocol.tensors import Region, map_files, map_regions
from server.adapters.blobs import FileSource, FolderBlobs, storage_errors
from server.events import DeltaBuilt, DeltaFailed, Event
from server.ports import DeltaSize, EncryptedBlob, StoredBlob

_LOG: Final = logging.getLogger(__name__)

NICENESS: Final = 10
"""A build is never urgent; answering devices is."""

_OUTPUT_BYTES_MAX: Final = 4_096


class BuiltDelta(Struct, frozen=True, kw_only=True):
    """What a child prints."""

    blob: StoredBlob
    memory_bytes: int
    in_place: InPlaceNeeds | None


def build_delta(
    blobs: FolderBlobs,
    name: DeltaName,
    base_files: Mapping[str, Digest],
    result_files: Mapping[str, Digest],
) -> BuiltDelta:
    """Build the delta between two stored files and store it.

    Args:
        blobs: Holds all files, and takes the delta.
        name: Base and result.
        base_files: Files of a release with the base, by name; they may describe its tensors.
        result_files: Likewise for the result.

    Raises:
        StorageError: A file is missing, or there is no room.
        PatchLimitError: A file is beyond the format's limits.
    """
    with blobs.partial() as partial:
        made = _make(blobs, name, base_files, result_files, partial)
        return BuiltDelta(
            blob=blobs.put_file(Path(partial.name)),
            memory_bytes=made.memory_bytes,
            in_place=made.in_place,
        )


def measure_delta(
    blobs: FolderBlobs,
    name: DeltaName,
    base_files: Mapping[str, Digest],
    result_files: Mapping[str, Digest],
) -> DeltaSize:
    """Build a delta to see how large it is, and throw it away; like `build_delta`."""
    with blobs.partial() as partial:
        return _make(blobs, name, base_files, result_files, partial)


def _make(
    blobs: FolderBlobs,
    name: DeltaName,
    base_files: Mapping[str, Digest],
    result_files: Mapping[str, Digest],
    output: BinaryIO,
) -> DeltaSize:
    with ExitStack() as opened:
        base, base_map = _open(blobs, name.base, base_files, opened)
        result, result_map = _open(blobs, name.result, result_files, opened)
        # One process: the pool already runs as many builds as the server has been given cores for.
        stats = make_delta(
            base, result, output, maps=(base_map, result_map), profile=name.profile, in_place=None
        )
        output.flush()
        return DeltaSize(
            length=stats.patch_length,
            memory_bytes=stats.header.decoder_memory_bytes,
            in_place=in_place_needs(base, result, FileSource(output)),
        )


def _open(
    blobs: FolderBlobs, digest: Digest, files: Mapping[str, Digest], opened: ExitStack
) -> tuple[FileSource, tuple[Region, ...]]:
    """Return a stored file and its map, with what the files beside it say about it."""

    def source(name: Digest) -> FileSource:
        path = blobs.path(name)
        with storage_errors(path):
            return FileSource(opened.enter_context(path.open("rb")))

    sources = {name: source(each) for name, each in files.items()}
    own = next((name for name, each in files.items() if each == digest), None)
    if own is None:
        alone = source(digest)
        return alone, map_regions(alone)
    return sources[own], map_files(sources)[own]


class BuildPool:
    """`DeltaBuilder` with a bounded number of children.

    Args:
        folder: Of the blob store.
        workers: Children at the same time.
        timeout_s: After which a build is given up.
        post: Takes `DeltaBuilt` and `DeltaFailed`; called from threads of this class.
        encrypt: Puts the encrypted form of a delta in its place; called from there too.
    """

    def __init__(
        self,
        folder: Path,
        workers: int,
        timeout_s: int,
        post: Callable[[Event], None],
        encrypt: Callable[[StoredBlob], EncryptedBlob] | None = None,
    ) -> None:
        self._folder = folder
        self._timeout_s = timeout_s
        self._post = post
        self._encrypt = encrypt
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="whimbrel-build")
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._is_stopping = False

    def build(
        self,
        name: DeltaName,
        base_files: Sequence[ReleaseFile] = (),
        result_files: Sequence[ReleaseFile] = (),
    ) -> None:
        """See `DeltaBuilder.build`."""
        self._threads.submit(self._build, name, _beside(base_files), _beside(result_files))

    def stop(self) -> None:
        """End all children; what they had not finished is built again after the next start."""
        with self._lock:
            self._is_stopping = True
            for child in self._children:
                child.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _build(self, name: DeltaName, base_files: Sequence[str], result_files: Sequence[str]) -> None:
        event = self._run(name, base_files, result_files)
        if isinstance(event, DeltaFailed) and not self._is_stopping:
            _LOG.warning("delta %.12s to %.12s: %s", name.base, name.result, event.detail)
        if not self._is_stopping:
            self._post(event)

    def _run(self, name: DeltaName, base_files: Sequence[str], result_files: Sequence[str]) -> Event:
        profile = name.profile.name.lower()
        command = [
            sys.executable,
            "-m",
            __name__,
            str(self._folder.absolute()),
            name.base,
            name.result,
            profile,
            *("--base-files", *base_files),
            *("--result-files", *result_files),
        ]
        with self._lock:
            if self._is_stopping:
                return DeltaFailed(name, "the server stops")
            try:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
            except OSError as error:
                return DeltaFailed(name, f"no process: {error.strerror}")
            self._children.add(child)
        try:
            with child:
                output, errors = child.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return DeltaFailed(name, f"given up after {self._timeout_s} s")
        finally:
            with self._lock:
                self._children.discard(child)
        if child.returncode != 0:
            last = errors.decode("utf-8", "replace").strip().splitlines()[-1:] or [""]
            return DeltaFailed(name, f"ended with {child.returncode}: {last[0][:400]}")
        built = msgspec.json.decode(output[:_OUTPUT_BYTES_MAX], type=BuiltDelta)
        if not name.is_encrypted:
            return DeltaBuilt(name, built.blob, built.memory_bytes, built.in_place)
        assert self._encrypt is not None, "whoever publishes secrets can encrypt"
        try:
            encrypted = self._encrypt(built.blob)
        except WhimbrelError as error:
            return DeltaFailed(name, f"{error.code}: {error}")
        return DeltaBuilt(name, encrypted.blob, built.memory_bytes, built.in_place, encrypted.encryption)


def _beside(files: Sequence[ReleaseFile]) -> list[str]:
    return [f"{file.name}={file.sha256}" for file in files]


def _named_digest(text: str) -> tuple[str, Digest]:
    name, _, digest = text.partition("=")
    return name, parse_digest(digest)


def main(argv: list[str] | None = None) -> int:
    """The child."""
    parser = argparse.ArgumentParser(description="Build one delta between two stored files.")
    parser.add_argument("blobs", type=Path)
    parser.add_argument("base", type=parse_digest)
    parser.add_argument("result", type=parse_digest)
    parser.add_argument("profile", choices=[profile.name.lower() for profile in Profile])
    for option in ("--base-files", "--result-files"):
        parser.add_argument(option, nargs="*", type=_named_digest, default=[], metavar="NAME=DIGEST")
    arguments = parser.parse_args(argv)
    os.nice(NICENESS)
    try:
        name = DeltaName(arguments.base, arguments.result, Profile[arguments.profile.upper()])
        built = build_delta(
            FolderBlobs(arguments.blobs), name, dict(arguments.base_files), dict(arguments.result_files)
        )
    except WhimbrelError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(built))
    return 0


if __name__ == "__main__":
    sys.exit(main())
