"""Deltas from real child processes."""

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.delta.format import Profile
from protocol.delta.reader import DeltaReader
from protocol.ids import Digest, digest_of
from protocol.release import DeltaName, ReleaseFile
from protocol.tensors import BytesSource
from server.adapters.blobs import FolderBlobs
from server.events import DeltaBuilt, DeltaFailed, Event
from server.releases.builders import BuildPool, main
from tests.protocol.model_files import external_model, weights
from tests.server.samples import write_model


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


@pytest.fixture
def events() -> queue.Queue[Event]:
    return queue.Queue()


@pytest.fixture
def pool(tmp_path: Path, events: queue.Queue[Event]) -> Iterator[BuildPool]:
    pool = BuildPool(tmp_path / "blobs", 2, 60, events.put)
    yield pool
    pool.stop()


@pytest.mark.parametrize("profile", Profile)
def test_a_delta_is_built_stored_and_gives_the_new_file(
    blobs: FolderBlobs, pool: BuildPool, events: queue.Queue[Event], tmp_path: Path, profile: Profile
) -> None:
    old, new = (write_model(tmp_path / f"{seed}.onnx", seed).read_bytes() for seed in (1, 2))
    blobs.put(old)
    blobs.put(new)
    pool.build(DeltaName(digest_of(old), digest_of(new), profile))
    built = events.get(timeout=60)
    assert isinstance(built, DeltaBuilt)
    assert built.name == DeltaName(digest_of(old), digest_of(new), profile)
    assert built.blob.length < len(new) / 10
    assert built.blob == blobs.describe(built.blob.digest)
    # The memory that metadata promises is enough, and the result is the new file.
    reader = DeltaReader(BytesSource(old), memory_limit_bytes=built.memory_bytes)
    patch = blobs.path(built.blob.digest).read_bytes()
    assert b"".join(piece.data for piece in reader.feed(patch)) == new
    reader.finish()
    assert reader.header is not None
    assert reader.header.profile is profile
    assert not list((tmp_path / "blobs").glob(".partial-*"))


def test_a_file_of_external_data_is_built_with_what_the_models_beside_it_say(
    blobs: FolderBlobs, pool: BuildPool, events: queue.Queue[Event], tmp_path: Path
) -> None:
    releases: list[list[ReleaseFile]] = []
    for update in (0.0, 0.01):
        model = external_model(tmp_path / f"{update}", {"w": weights((256, 128), 1, update)})
        paths = (model, model.with_name("model.onnx.data"))
        stored = [(path.name, blobs.put(path.read_bytes())) for path in paths]
        releases.append(
            [ReleaseFile(name=name, length=blob.length, sha256=blob.digest) for name, blob in stored]
        )
    old, new = (Digest(release[1].sha256) for release in releases)
    pool.build(DeltaName(old, new), *releases)
    described = events.get(timeout=60)
    pool.build(DeltaName(old, new))
    alone = events.get(timeout=60)
    assert isinstance(described, DeltaBuilt)
    assert isinstance(alone, DeltaBuilt)
    assert described.blob.length < 0.8 * alone.blob.length
    base = BytesSource(blobs.path(old).read_bytes())
    reader = DeltaReader(base, memory_limit_bytes=described.memory_bytes)
    patch = blobs.path(described.blob.digest).read_bytes()
    assert digest_of(b"".join(piece.data for piece in reader.feed(patch))) == new
    reader.finish()


def test_a_file_that_is_missing_fails_that_delta_only(
    blobs: FolderBlobs, pool: BuildPool, events: queue.Queue[Event]
) -> None:
    blobs.put(b"a" * 1000)
    blobs.put(b"b" * 1000)
    a, b, missing = digest_of(b"a" * 1000), digest_of(b"b" * 1000), digest_of(b"c")
    pool.build(DeltaName(a, missing))
    pool.build(DeltaName(a, b))
    outcomes = [events.get(timeout=60) for _ in range(2)]
    (failed,) = [event for event in outcomes if isinstance(event, DeltaFailed)]
    assert failed.name == DeltaName(a, missing)
    assert "storage.failed" in failed.detail
    assert any(isinstance(event, DeltaBuilt) for event in outcomes)


def test_a_build_that_takes_too_long_is_given_up(
    blobs: FolderBlobs, tmp_path: Path, events: queue.Queue[Event]
) -> None:
    blob = blobs.put(b"a" * 1000)
    pool = BuildPool(tmp_path / "blobs", 1, 0, events.put)
    pool.build(DeltaName(blob.digest, blob.digest))
    event = events.get(timeout=60)
    assert isinstance(event, DeltaFailed)
    assert "given up" in event.detail
    pool.stop()


def test_stopping_ends_children_at_once_and_says_nothing(
    blobs: FolderBlobs, pool: BuildPool, events: queue.Queue[Event]
) -> None:
    data = bytes(range(256)) * 40_000
    blobs.put(data)
    blobs.put(data[::-1])
    for _ in range(5):
        pool.build(DeltaName(digest_of(data), digest_of(data[::-1])))
    pool.stop()
    assert events.empty()
    assert not pool._children


def test_the_child_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = digest_of(b"x")
    assert main([str(tmp_path / "blobs"), digest, digest, "small"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
