"""Experiments with real model files: what deltas cost, and what an update costs the disk."""

import io
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Final

from protocol.delta.format import Profile
from protocol.delta.inplace import Files, InPlace, read_header
from protocol.delta.reader import DeltaReader
from protocol.delta.undo_journal import journal_bytes
from protocol.delta.writer import make_delta
from protocol.errors import RequestError
from protocol.tensors import BytesSource
from simulator.peers import bsdiff_bytes, compressed_bytes

VERSIONS: Final = ("base", "polished", "tuned", "retrained")
BUILD_TIMEOUT_S: Final = 300
LARGE_BYTES: Final = 1 << 30


class CountingFile:
    """A file in memory that counts what is written to it.

    Args:
        content: At first.
    """

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.written = 0

    @property
    def length(self) -> int:
        """Bytes in it."""
        return len(self.content)

    def read_at(self, offset: int, length: int) -> bytes:
        """As `Medium.read_at`."""
        return bytes(self.content[offset : offset + length])

    def write_at(self, offset: int, data: bytes) -> None:
        """As `Medium.write_at`."""
        end = offset + len(data)
        if end > len(self.content):
            self.content.extend(bytes(end - len(self.content)))
        self.content[offset:end] = data
        self.written += len(data)

    def sync(self) -> None:
        """Nothing is lost here."""

    def resize(self, length: int) -> None:
        """As `Medium.resize`."""
        del self.content[length:]
        self.content.extend(bytes(length - len(self.content)))


@lru_cache(maxsize=1)
def model_files() -> dict[str, bytes]:
    """Four versions of a classifier, trained here: seconds.

    Raises:
        RequestError: The examples are not there.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "examples" / "digits").is_dir():
        raise RequestError("the examples are not installed", hint="run from a checkout")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "examples.digits.drift", "--out", folder]
        try:
            done = subprocess.run(
                command, cwd=root, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise RequestError(
                f"training the models took more than {BUILD_TIMEOUT_S} s",
                hint="try again when the machine is idle",
            ) from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RequestError(f"the models cannot be trained: {last}", hint="set up with `make demo`")
        return {name: (Path(folder) / f"{name}.onnx").read_bytes() for name in VERSIONS}


def delta_of(old: bytes, new: bytes, profile: Profile, *, in_place: bool = False) -> bytes:
    """The delta, checked by applying it."""
    sink = io.BytesIO()
    make_delta(BytesSource(old), BytesSource(new), sink, profile=profile, in_place=in_place)
    patch = sink.getvalue()
    reader = DeltaReader(BytesSource(old))
    made = bytearray(len(new))
    for piece in reader.feed(patch):
        made[piece.offset : piece.offset + len(piece.data)] = piece.data
    reader.finish()
    assert bytes(made) == new
    return patch


def delta_sizes() -> dict[str, float]:
    """Whole file, bsdiff4 and ours, after training a little, more, and from scratch; in percent of the file."""
    files = model_files()
    figures: dict[str, float] = {"file_mb": len(files["base"]) / 1e6}
    for old, new in pairwise(VERSIONS):
        before, after = files[old], files[new]
        percent = 100 / len(after)
        figures[f"{new}_zstd_percent"] = compressed_bytes(after) * percent
        figures[f"{new}_bsdiff_percent"] = bsdiff_bytes(before, after) * percent
        figures[f"{new}_small_percent"] = len(delta_of(before, after, Profile.SMALL)) * percent
        figures[f"{new}_fast_percent"] = len(delta_of(before, after, Profile.FAST)) * percent
    figures["times_smaller"] = figures["tuned_zstd_percent"] / figures["tuned_small_percent"]
    return figures


def disk_costs() -> dict[str, float]:
    """Room and writes of an update into a second slot and in place, and of the way back; in percent of the model file."""
    files = model_files()
    old, new = files["base"], files["tuned"]
    patch = delta_of(old, new, Profile.SMALL, in_place=True)
    percent = 100 / len(new)
    header = read_header(BytesSource(patch))
    journal = CountingFile(bytes(journal_bytes(header)))
    large = replace(header, base_length=LARGE_BYTES, result_length=LARGE_BYTES)
    target, inverse = CountingFile(old), CountingFile()
    parts = Files(target, BytesSource(patch), journal, inverse)
    work = InPlace(parts, inverse_bytes_max=2 * len(new))
    work.begin(header.base_sha256)
    while not work.step():
        pass
    assert bytes(target.content) == new
    written = target.written + journal.written + inverse.written + len(patch)
    way_back = inverse.length
    work.undo()
    while not work.step():
        pass
    assert bytes(target.content) == old
    return {
        "delta_percent": len(patch) * percent,
        "slot_room_percent": (len(new) + len(patch)) * percent,
        "slot_written_percent": (len(new) + len(patch)) * percent,
        "place_room_percent": (way_back + len(patch)) * percent,
        "place_written_percent": written * percent,
        "inverse_percent": way_back * percent,
        "journal_large_mb": journal_bytes(large) / 1e6,
    }
