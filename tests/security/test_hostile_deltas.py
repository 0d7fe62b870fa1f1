"""Attacks by deltas, by decoders and by whoever can write beside a slot: rows 22 to 24, 65 and 66 of `docs/security/input.md`."""

import tracemalloc
from pathlib import Path

import pytest
import zstandard

from device import effects
from device.adapters.disk import RealDisk
from device.decoding import Decoded, DeltaJob, LocalDecoder
from device.ports import Disk
from device.slots import SlotName, measure_slot, slot_file
from protocol.delta.compression import decompress
from protocol.delta.format import SEGMENT_BYTES_MAX, Header, Profile
from protocol.delta.reader import DeltaReader
from protocol.errors import PatchError, PatchLimitError, StorageError
from protocol.ids import digest_of
from protocol.tensors import BytesSource
from tests.device.harness import Cache, Device, fine_tuned, model_bytes
from tests.device.test_chains import ask

_WINDOW_BYTES = 256 << 20
_OLD = model_bytes(1)
_NEW = fine_tuned(_OLD, 2)
_MODEL = slot_file(SlotName.A, "model.onnx")


def test_row_65_a_header_of_a_result_as_long_as_all_disks_takes_no_memory() -> None:
    header = Header(Profile.FAST, 5, bytes(32), 1 << 40, bytes(32), 1 << 20, SEGMENT_BYTES_MAX)
    tracemalloc.start()
    try:
        assert list(DeltaReader(BytesSource(b"12345")).feed(header.pack())) == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_row_65_a_decoder_that_declares_more_memory_than_there_may_be() -> None:
    header = Header(Profile.FAST, 5, bytes(32), 5, bytes(32), 1 << 41, 1024)
    with pytest.raises(PatchLimitError, match="2199023255552 bytes of memory"):
        list(DeltaReader(BytesSource(b"12345")).feed(header.pack()))


def test_row_66_a_frame_with_a_window_of_hundreds_of_megabytes() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    data = bytes(_WINDOW_BYTES)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compress(data)
    assert len(frame) < 64 << 10
    with pytest.raises(PatchError, match="needs a window of 268435456 bytes"):
        decompress(frame, _WINDOW_BYTES)


@pytest.fixture
def disk(tmp_path: Path) -> RealDisk:
    disk = RealDisk(tmp_path / "state")
    disk.prepare()
    disk.create(_MODEL, 4)
    (tmp_path / "secret").write_bytes(b"secret")
    return disk


def test_row_24_a_symbolic_link_in_place_of_a_file_is_not_followed(disk: RealDisk, tmp_path: Path) -> None:
    Path(disk.path(_MODEL)).unlink()
    Path(disk.path(_MODEL)).symlink_to(tmp_path / "secret")
    for attempt in (
        lambda: disk.read(_MODEL, 0, 6),
        lambda: disk.write(_MODEL, 0, b"mine"),
        lambda: disk.resize(_MODEL, 0),
        lambda: disk.sync(_MODEL),
    ):
        with pytest.raises(StorageError):
            attempt()
    assert measure_slot(disk, SlotName.A) == {}, "what is a link is no file of the slot"
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_row_24_a_symbolic_link_in_place_of_a_slot_is_not_followed(disk: RealDisk, tmp_path: Path) -> None:
    slot = Path(disk.path(_MODEL)).parent
    slot.rename(tmp_path / "elsewhere")
    slot.symlink_to(tmp_path / "elsewhere")
    for attempt in (
        lambda: disk.read(_MODEL, 0, 4),
        lambda: disk.create(_MODEL, 4),
        lambda: disk.remove(_MODEL),
    ):
        with pytest.raises(StorageError, match="is a symbolic link"):
            attempt()


def test_row_24_files_of_a_slot_are_their_owners_alone(disk: RealDisk) -> None:
    assert Path(disk.path(_MODEL)).stat().st_mode & 0o777 == 0o600


class _Lying(LocalDecoder):
    """A decoder that was taken over, and writes a model of its own."""

    def __init__(self, model: bytes) -> None:
        self._model = model

    def decode(self, disk: Disk, job: DeltaJob, _state: bytes) -> Decoded:
        disk.write(job.result, 0, self._model[: job.length])
        return Decoded(is_finished=True)


class _Forging(LocalDecoder):
    """A decoder that was taken over, and hands back a state of its own."""

    def decode(self, disk: Disk, job: DeltaJob, state: bytes) -> Decoded:
        if state:
            return super().decode(disk, job, state)
        return Decoded(state=b"WBS3" + bytes(200))


@pytest.mark.parametrize("decoder", [_Lying(b"evil" * (1 << 20)), _Lying(_OLD), _Forging()])
def test_row_23_what_a_decoder_made_is_measured_before_anything_runs_it(decoder: LocalDecoder) -> None:
    cache = Cache()
    cache.publish("v1", _OLD)
    cache.publish("v2", _NEW)
    cache.publish_delta(_OLD, _NEW)
    device = Device(cache, _OLD)
    device.connect()
    device.settle()
    device.executor._decoder = decoder
    ask(device, "v2")
    device.settle()
    taken = {effect.blob for effect in device.effects if isinstance(effect, effects.WriteChunk)}
    assert digest_of(_NEW) in taken, "the whole file took the place of the delta"
    assert device.answer() == digest_of(_NEW)
    update = device.reports[-1].update
    assert update is not None
    assert update.outcome == "committed"


def test_row_22_a_base_that_is_no_longer_what_was_installed_is_not_built_upon() -> None:
    cache = Cache()
    cache.publish("v1", _OLD)
    cache.publish("v2", _NEW)
    delta = cache.publish_delta(_OLD, _NEW)
    device = Device(cache, _OLD)
    device.connect()
    device.settle()
    device.disk.write(_MODEL, 1000, b"somebody was here")
    ask(device, "v2")
    device.settle()
    taken = {effect.blob for effect in device.effects if isinstance(effect, effects.WriteChunk)}
    assert digest_of(_NEW) in taken
    assert delta not in taken, "it was not even fetched"
    assert device.answer() == digest_of(_NEW)
