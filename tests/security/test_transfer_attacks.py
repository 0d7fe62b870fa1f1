"""Traffic that somebody floods, withholds, doubles or mixes up, and records that are damaged. The numbers are rows of docs/security.md."""

import random

import pytest

from device import events
from device.download import STALLS_MAX
from device.journal import DamagedRecordError, Journal, Record
from device.states import State
from protocol.chunks import encode_chunk
from protocol.constants import CHUNK_BYTES
from protocol.ids import digest_of
from protocol.messages import ChunkRequest, decode_request, decode_window
from protocol.trust import Floors
from simulator.disk import SimulatedDisk
from tests.device.harness import DEVICE, TOPICS, Cache, Device, model_bytes

V1, V2 = model_bytes(1), model_bytes(2)
BLOB = digest_of(V2)


@pytest.fixture
def cache() -> Cache:
    cache = Cache()
    cache.publish("v1", V1)
    return cache


def downloading(cache: Cache) -> Device:
    """A device that fetches v2, of which no chunk is in the cache."""
    cache.publish("v2", V2)
    for topic in [topic for topic in cache.retained if BLOB in topic]:
        del cache.retained[topic]
    device = Device(cache, V1)
    device.connect()
    device.settle()
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: device.state is State.DOWNLOADING)
    while device.step():
        continue
    return device


def chunk_of(index: int) -> bytes:
    return encode_chunk(BLOB, index, V2[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])


def test_12_chunks_without_end_take_no_room(cache: Cache) -> None:
    device = downloading(cache)
    free = device.disk.free_bytes()
    for index in [*range(10_000, 10_200), (1 << 32) - 1]:
        device.deliver(TOPICS.chunk(BLOB, 0), encode_chunk(BLOB, index, bytes(CHUNK_BYTES)))
    for number in range(200):
        other = digest_of(f"blob {number}".encode())
        device.deliver(TOPICS.chunk(other, 0), encode_chunk(other, 0, bytes(CHUNK_BYTES)))
    while device.step():
        continue
    assert device.disk.free_bytes() == free
    assert device.answer() == digest_of(V1)


def test_13_traffic_that_is_of_no_use_is_no_progress(cache: Cache) -> None:
    """Somebody keeps a device busy with false chunks: it gives up as soon as one to which nobody says anything."""
    requests: list[int] = []
    device = downloading(cache)

    def answer(_topic: str, payload: bytes) -> None:
        if isinstance(decode_request(payload), ChunkRequest):
            requests.append(device.now_ms)
            for index in range(len(V2) // CHUNK_BYTES):
                device.deliver(TOPICS.chunk_answer(DEVICE), encode_chunk(BLOB, index, bytes(CHUNK_BYTES)))

    device.answer_requests = answer
    device.settle(until=lambda: device.state is State.FAILED)
    update = device.record.update
    assert update is not None
    assert update.code == "transport.stalled"
    assert update.counters.invalid_chunks > 0
    assert len(set(requests)) == STALLS_MAX
    assert device.answer() == digest_of(V1)


def test_13_a_server_that_lets_chunks_drip_is_put_up_with_and_the_old_version_answers(cache: Cache) -> None:
    device = downloading(cache)

    def answer(_topic: str, payload: bytes) -> None:
        request = decode_request(payload)
        assert device.answer() == digest_of(V1)
        if isinstance(request, ChunkRequest):
            device.deliver(TOPICS.chunk_answer(DEVICE), chunk_of(decode_window(request)[0]))

    device.answer_requests = answer
    device.settle(deadlines=2_000)
    assert device.answer() == digest_of(V2)


def test_30_messages_that_all_come_twice_change_nothing(cache: Cache) -> None:
    cache.publish("v2", V2)
    device = Device(cache, V1)
    deliver = device.deliver

    def twice(topic: str, payload: bytes) -> None:
        deliver(topic, payload)
        deliver(topic, payload)

    device.deliver = twice  # type: ignore[method-assign]
    device.connect()
    device.settle()
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle()
    assert device.answer() == digest_of(V2)
    assert device.rows.count("trial trial_passed committing") == 1
    assert device.engine.trials == [digest_of(V2)]


@pytest.mark.parametrize("seed", range(5))
def test_31_messages_that_come_in_any_order_lead_to_the_same(cache: Cache, seed: int) -> None:
    cache.publish("v2", V2)
    rng = random.Random(seed)
    device = Device(cache, V1)
    device.connect()
    device.settle()
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    for _ in range(100_000):
        messages = [event for event in device.queue if isinstance(event, events.MessageReceived)]
        if len(messages) > 1:
            others = [event for event in device.queue if not isinstance(event, events.MessageReceived)]
            rng.shuffle(messages)
            device.queue.clear()
            device.queue.extend([*others, *messages])
        if not device.step():
            break
    device.settle()
    assert device.answer() == digest_of(V2)
    update = device.reports[-1].update
    assert update is not None
    assert update.redundant_chunks == 0


# --- damaged records


COPIES = ("record.0", "record.1")


def saved(*roots: int) -> SimulatedDisk:
    """A disk with records of growing floors, written one over the one before the last."""
    disk = SimulatedDisk()
    journal = Journal(disk)
    for root in roots:
        journal.save(Record(floors=Floors(root=root)))
    return disk


def newest(disk: SimulatedDisk) -> str:
    """The copy without which another record is the newest."""
    for name in COPIES:
        data = disk.read(name, 0, disk.length(name) or 0)
        disk.write(name, 0, bytes(len(data)))
        record = Journal(disk).load()
        disk.write(name, 0, data)
        if record is not None and record.floors.root == 5:
            return name
    raise AssertionError("no copy is newer than the other")


@pytest.mark.parametrize("offset", [0, 8, 20, 60, 100])
def test_48_a_record_that_is_torn_leaves_the_one_before(offset: int) -> None:
    disk = saved(4, 5, 6)
    disk.write(newest(disk), offset, b"\xff" * 8)
    record = Journal(disk).load()
    assert record is not None
    assert record.floors.root == 5


def test_55_a_device_that_lost_both_copies_of_its_record_does_not_begin_with_floors_of_zero() -> None:
    disk = saved(5, 6)
    for name in COPIES:
        disk.write(name, 60, b"\xff" * 8)
    with pytest.raises(DamagedRecordError, match="both copies"):
        Journal(disk).load()
