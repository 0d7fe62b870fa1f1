"""The project's own delta coder, as the server builds and a device applies. The option is the profile."""

from pathlib import Path

from benchmarks.methods.child import run
from protocol.constants import CHUNK_BYTES
from protocol.delta.format import Profile
from protocol.delta.reader import DeltaReader
from protocol.delta.writer import make_delta
from server.adapters.blobs import FileSource


def build(base: Path, new: Path, patch: Path, options: list[str]) -> None:
    """Writes a delta file."""
    with base.open("rb") as old_file, new.open("rb") as new_file, patch.open("wb") as sink:
        make_delta(FileSource(old_file), FileSource(new_file), sink, profile=Profile[options[0].upper()])


def apply(base: Path, patch: Path, out: Path, _options: list[str]) -> None:
    """Reads a delta file in pieces as the network brings them, and writes the result in order."""
    with base.open("rb") as old_file, patch.open("rb") as source, out.open("wb") as sink:
        reader = DeltaReader(FileSource(old_file))
        while data := source.read(CHUNK_BYTES):
            for piece in reader.feed(data):
                sink.seek(piece.offset)
                sink.write(piece.data)
        reader.finish()


if __name__ == "__main__":
    run(build, apply)
