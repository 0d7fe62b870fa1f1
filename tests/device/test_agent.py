import random
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import pytest

from device import effects, events
from device.blobs import blob_file
from device.slots import SlotHealth, SlotName, measure_slot
from device.states import State
from protocol.chunks import encode_chunk
from protocol.errors import StorageError
from protocol.ids import DeviceId, digest_of
from protocol.messages import (
    ChunkRequest,
    LatencySummary,
    MetadataRequest,
    TrialEvidence,
    decode_request,
    decode_window,
)
from protocol.release import Resources
from protocol.topics import ChunkTopic
from server.runtime import bundle
from simulator.power import PowerCutError
from tests.device.harness import (
    DEVICE,
    TOPICS,
    Cache,
    Device,
    good_evidence,
    model_bytes,
)

_Item = TypeVar("_Item")

V1 = model_bytes(1)
V2 = model_bytes(2)
NORMAL_PATH = [
    "idle requested syncing",
    "syncing metadata_verified admitting",
    "admitting admitted downloading",
    "downloading downloaded installing",
    "installing installed verifying",
    "verifying verified trial",
    "trial trial_passed committing",
    "committing committed idle",
]


@pytest.fixture
def cache() -> Cache:
    cache = Cache()
    cache.publish("v1", V1)
    return cache


def online(cache: Cache, config: dict[str, object] | None = None) -> Device:
    device = Device(cache, V1, config=config)
    device.connect()
    device.settle()
    return device


def ask(device: Device, version: str, *, sequence: int | None = None) -> None:
    device.deliver(TOPICS.desired(DEVICE), device.cache.desire(version, sequence=sequence))


def test_a_good_release_takes_the_normal_path_and_is_served(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle()
    assert device.rows == NORMAL_PATH
    assert device.answer() == digest_of(V2)
    assert device.disk.links["current"] == "slots/b"
    report = device.reports[-1]
    assert report.version == "v2"
    assert report.files == {"model.onnx": digest_of(V2)}
    assert report.update is not None
    assert report.update.outcome == "committed"
    assert report.update.redundant_chunks == 0
    assert report.update.received_bytes >= len(V2)
    assert device.record.active is SlotName.B
    assert device.record.slots[SlotName.A].health is SlotHealth.GOOD
    assert device.disk.names("blobs") == []


def test_the_old_version_answers_until_the_new_one_is_committed(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    answers = []

    def note() -> bool:
        answers.append((device.state, device.answer()))
        return False

    device.settle(until=note)
    assert {answer for state, answer in answers if state is State.TRIAL} == {digest_of(V1)}
    assert answers[-1] == (State.IDLE, digest_of(V2))


def test_a_release_that_fails_its_trial_is_rolled_back_and_never_tried_again(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v3", V2)
    device.engine.evidence[digest_of(V2)] = good_evidence(prompts_passed=1)
    ask(device, "v3")
    device.settle()
    assert device.state is State.ROLLED_BACK
    assert device.answer() == digest_of(V1)
    update = device.reports[-1].update
    assert update is not None
    assert (update.outcome, update.code) == ("rolled_back", "trial.answers")
    assert device.disk.names("slots/b") == []
    ask(device, "v3")
    device.settle()
    update = device.reports[-1].update
    assert update is not None
    assert (update.outcome, update.code) == ("rejected", "admission.quarantined")
    assert device.engine.trials == [digest_of(V2)]


@pytest.mark.parametrize(
    ("evidence", "code"),
    [
        (good_evidence(prompts_passed=3), "trial.answers"),
        (good_evidence(memory_peak_bytes=2 << 30), "trial.memory"),
        (good_evidence(latency=None, detail="killed by signal 11"), "trial.crashed"),
        (good_evidence(latency=LatencySummary(p50_ms=1, p95_ms=1, p99_ms=101)), "trial.latency"),
    ],
)
def test_each_health_limit_rolls_back_with_its_own_code(
    cache: Cache, evidence: TrialEvidence, code: str
) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    device.engine.evidence[digest_of(V2)] = evidence
    ask(device, "v2")
    device.settle()
    update = device.reports[-1].update
    assert update is not None
    assert (update.outcome, update.code) == ("rolled_back", code)
    assert device.answer() == digest_of(V1)


def test_a_model_that_passes_its_trial_and_cannot_be_served_is_rolled_back(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    device.engine.unloadable.add(digest_of(V2))
    ask(device, "v2")
    device.settle()
    assert device.state is State.ROLLED_BACK
    assert device.answer() == digest_of(V1)
    assert device.disk.links["current"] == "slots/a"
    assert device.record.active is SlotName.A


@pytest.mark.parametrize(
    ("changes", "config", "code"),
    [
        ({"resources": Resources(memory_bytes=2 << 30)}, {}, "admission.memory"),
        ({"resources": Resources(tiers=["jetson"])}, {}, "admission.tier"),
        ({"runtime": "llama"}, {}, "admission.runtime"),
        ({"runtime_version_min": "1.31"}, {}, "admission.runtime"),
        ({}, {"disk_reserve_bytes": 1 << 41}, "admission.disk"),
        ({}, {"family": "other"}, "admission.family"),
    ],
)
def test_what_cannot_succeed_is_refused_before_its_first_byte(
    cache: Cache, changes: dict[str, object], config: dict[str, object], code: str
) -> None:
    device = online(cache, config)
    cache.publish("v2", V2, changes=changes)
    ask(device, "v2")
    device.settle()
    assert device.state is State.REJECTED
    update = device.reports[-1].update
    assert update is not None
    assert (update.outcome, update.code) == ("rejected", code)
    stored = {effect.blob for effect in device.effects if isinstance(effect, effects.WriteChunk)}
    assert digest_of(V2) not in stored
    assert device.answer() == digest_of(V1)


def test_a_repeated_or_older_wish_changes_nothing(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2", sequence=5)
    device.settle()
    before = len(device.rows)
    ask(device, "v1", sequence=5)
    ask(device, "v1", sequence=4)
    device.settle()
    assert len(device.rows) == before
    assert device.reports[-1].version == "v2"


def test_a_wish_for_what_runs_withdraws_an_update_under_way(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.DOWNLOADING)
    ask(device, "v1")
    device.settle()
    assert device.state is State.IDLE
    assert device.reports[-1].version == "v1"
    assert device.disk.names("blobs") == []


def test_a_trial_that_was_given_up_because_the_disk_failed_cannot_pass_afterwards(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.TRIAL and bool(device.jobs))
    device.queue.append(events.EffectFailed(0, "storage.failed", "the disk failed once", True))
    device.settle()
    assert "trial trial_failed rolling_back" in device.rows
    assert device.state in {State.ROLLED_BACK, State.IDLE}
    assert "trial trial_passed committing" not in device.rows
    assert device.answer() == digest_of(V1)


@pytest.mark.parametrize("end", ["withdrawn", "failed"])
def test_an_update_that_ends_half_way_leaves_nothing_in_the_slot_that_it_was_building(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.VERIFYING)
    assert device.disk.names("slots/b") == ["slots/b/model.onnx"]
    if end == "withdrawn":
        ask(device, "v1")
    else:
        monkeypatch.setattr("device.executor.measure_slot", lambda *_: {"model.onnx": "0" * 64})
    device.settle()
    assert device.state is {"withdrawn": State.IDLE, "failed": State.FAILED}[end]
    assert device.disk.names("slots/b") == []
    assert device.answer() == digest_of(V1)


def test_a_slot_that_a_power_cut_brought_back_after_a_rollback_is_emptied_at_the_next_start(
    cache: Cache,
) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    device.engine.evidence[digest_of(V2)] = good_evidence(prompts_passed=1)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.ROLLED_BACK and bool(device.jobs))
    assert device.disk.names("slots/b") == ["slots/b/model.onnx"]
    device.boot()  # the process was killed before it removed them, or the power came back without the removal
    device.settle()
    assert device.disk.names("slots/b") == []
    assert device.answer() == digest_of(V1)


def test_a_start_keeps_the_version_before_and_does_not_write_for_tidying_up(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle()
    device.boot()
    device.connect()
    device.settle()
    assert device.disk.names("slots") == ["slots/a/model.onnx", "slots/b/model.onnx"]
    device.engine.evidence[digest_of(V1)] = good_evidence(prompts_passed=1)
    ask(device, "v1")
    device.settle()
    assert device.state is State.ROLLED_BACK
    assert device.disk.names("slots") == ["slots/b/model.onnx"]
    device.boot()
    syncs = device.disk.syncs
    device.settle()
    assert device.disk.syncs == syncs + 1, "the record, for the count of boots"


def test_a_wish_during_the_trial_waits_for_its_end(cache: Cache) -> None:
    device = online(cache)
    v4 = model_bytes(4)
    cache.publish("v2", V2)
    cache.publish("v4", v4)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.TRIAL)
    ask(device, "v4")
    device.settle()
    assert device.answer() == digest_of(v4)
    assert [row for row in device.rows if row.endswith("committed idle")] == ["committing committed idle"] * 2


def test_a_lost_connection_makes_no_chunk_come_twice(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    rng = random.Random(7)
    for _ in range(12):
        steps = rng.randrange(4, 12)
        for _ in range(steps):
            device.step()
        device.disconnect()
        device.settle()
        device.connect()
    device.settle()
    assert device.answer() == digest_of(V2)
    update = device.reports[-1].update
    assert update is not None
    assert update.resumes >= 5
    assert update.redundant_chunks == 0
    stored = Counter(
        (effect.blob, effect.index) for effect in device.effects if isinstance(effect, effects.WriteChunk)
    )
    assert max(stored.values()) == 1


def test_chunks_that_no_cache_has_are_asked_for_by_bitmap(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    hidden = {topic: payload for topic, payload in cache.retained.items() if digest_of(V2) in topic}
    for topic in hidden:
        del cache.retained[topic]
    asked: Counter[int] = Counter()

    def serve(topic: str, payload: bytes) -> None:
        assert topic == TOPICS.request(DEVICE)
        request = decode_request(payload)
        assert isinstance(request, ChunkRequest)
        for index in decode_window(request):
            asked[index] += 1
            device.deliver(TOPICS.chunk_answer(DEVICE), hidden[TOPICS.chunk(digest_of(V2), index)])

    device.answer_requests = serve
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)
    assert len(asked) == len(hidden)
    assert set(asked.values()) == {1}


def test_metadata_comes_by_request_where_the_broker_keeps_nothing(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    documents = {topic: payload for topic, payload in cache.retained.items() if "/md/" in topic}
    for topic in documents:
        del cache.retained[topic]

    def serve(_topic: str, payload: bytes) -> None:
        request = decode_request(payload)
        assert isinstance(request, MetadataRequest)
        answer = bundle(cache.repository, request.root_version, request.roles)
        device.deliver(TOPICS.metadata_answer(DEVICE), answer)

    device.answer_requests = serve
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)


def test_a_poisoned_chunk_in_the_cache_costs_time_and_nothing_else(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    topic = TOPICS.chunk(digest_of(V2), 3)
    good = cache.retained[topic]
    cache.retained[topic] = encode_chunk(digest_of(V2), 3, b"\0" * (len(good) - 40))

    def serve(_topic: str, payload: bytes) -> None:
        request = decode_request(payload)
        assert isinstance(request, ChunkRequest)
        assert decode_window(request) == [3]
        device.deliver(TOPICS.chunk_answer(DEVICE), good)

    device.answer_requests = serve
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)
    update = device.reports[-1].update
    assert update is not None
    assert update.invalid_chunks == 1


def test_an_update_that_nobody_serves_fails_for_good_after_bounded_attempts(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    for topic in list(cache.retained):
        if isinstance(TOPICS.parse(topic), ChunkTopic) and digest_of(V2) in topic:
            del cache.retained[topic]
    ask(device, "v2")
    device.settle()
    assert device.state is State.FAILED
    update = device.reports[-1].update
    assert update is not None
    assert (update.outcome, update.code) == ("failed", "transport.stalled")
    assert device.agent.deadline() is None
    assert device.answer() == digest_of(V1)


def test_metadata_that_does_not_verify_is_never_acted_on(cache: Cache) -> None:
    device = online(cache)
    stranger = Cache()
    stranger.publish("v2", V2)
    cache.retained.update({topic: data for topic, data in stranger.retained.items() if "/dev/" not in topic})
    ask(device, "v2")
    device.settle()
    assert device.state is State.FAILED
    update = device.reports[-1].update
    assert update is not None
    assert update.code == "trust.unverified"


def test_a_replayed_older_repository_is_refused_by_the_floors(cache: Cache) -> None:
    device = online(cache)
    old = {topic: payload for topic, payload in cache.retained.items() if "/md/" in topic}
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle()
    cache.retained.update(old)
    ask(device, "v1")
    device.settle()
    assert device.state is State.FAILED
    update = device.reports[-1].update
    assert update is not None
    assert update.code == "trust.rollback"


def test_a_full_disk_fails_the_update_and_leaves_the_old_version(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.DOWNLOADING)
    device.disk.capacity_bytes -= device.disk.free_bytes()
    device.settle()
    assert device.answer() == digest_of(V1)
    assert "downloading failed failed" in device.rows
    assert "storage.full" in {report.update.code for report in device.reports if report.update is not None}
    update = device.reports[-1].update
    assert update is not None
    assert (update.outcome, update.code) == ("rejected", "admission.disk")


def test_a_disk_that_cannot_be_written_does_not_stop_inference(cache: Cache) -> None:
    device = online(cache)
    device.disk.is_read_only = True
    device.boot()
    device.connect()
    device.settle()
    assert device.answer() == digest_of(V1)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V1)
    assert device.record.active is SlotName.A
    assert "storage.read_only" in {
        report.update.code for report in device.reports if report.update is not None
    }


@pytest.mark.parametrize("name", ["record.0", "record.1", "slots/a/model.onnx"])
def test_a_file_that_cannot_be_read_at_first_is_read_again_at_a_boot(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    device = online(cache)
    before = device.record
    read, failures = device.disk.read, [name] * 3

    def failing(path: str, offset: int, length: int) -> bytes:
        if path in failures:
            failures.pop()
            raise StorageError(f"{path}: input/output error")
        return read(path, offset, length)

    monkeypatch.setattr(device.disk, "read", failing)
    device.boot()
    device.settle()
    assert failures == []
    assert device.record.boots == before.boots + 1
    assert device.answer() == digest_of(V1)


def test_a_disk_that_fails_once_at_the_boot_after_a_commit_costs_the_update_and_not_the_model(
    cache: Cache,
) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.COMMITTING)
    assert device.record.active is SlotName.B
    device.disk.crash(random.Random(1))
    device.boot()
    device.disk.is_read_only = True
    assert device.step()  # the answer about the slot that was committed is still to come
    device.disk.is_read_only = False
    device.settle()
    record = device.record
    assert record.active is not None
    assert measure_slot(device.disk, record.active) == record.active_slot.files != {}
    assert device.answer() == record.active_slot.files["model.onnx"]


@pytest.mark.parametrize("state", [State.TRIAL, State.COMMITTING])
def test_a_disk_that_fails_at_the_end_of_an_update_keeps_the_old_version_and_blames_nobody(
    cache: Cache, state: State
) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    trigger = {State.TRIAL: effects.StartTrial, State.COMMITTING: effects.StartTrial}[state]
    device.settle(until=lambda: isinstance(device.effects[-1], trigger))
    if state is State.TRIAL:
        device.disk.is_read_only = True
    else:
        device.settle(until=lambda: not device.jobs)
        device.disk.is_read_only = True
    device.settle()
    assert device.answer() == digest_of(V1)
    assert device.record.active is SlotName.A
    device.disk.is_read_only = False
    device.boot()
    device.connect()
    device.settle()
    assert device.answer() == digest_of(V2)
    assert device.record.quarantine == ()


def test_a_disk_that_fails_while_a_committed_version_is_loaded_blames_nobody(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.COMMITTING)

    def fail(_source: object) -> None:
        monkeypatch.undo()
        raise StorageError("slots/b/model.onnx: input/output error")

    monkeypatch.setattr(device.engine, "load", fail)
    device.settle()
    update = device.reports[-1].update
    assert update is not None
    assert (update.outcome, update.code) == ("rolled_back", "storage.failed")
    assert device.record.quarantine == ()
    assert device.answer() == digest_of(V1)
    ask(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)


def test_a_committed_version_whose_load_never_ends_is_given_up(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle(until=lambda: device.state is State.COMMITTING)
    device.jobs.clear()  # the worker hangs
    device.settle(until=lambda: device.state is State.ROLLING_BACK)
    assert device.answer() == digest_of(V1)
    device.settle()
    update = device.reports[-1].update
    assert update is not None
    assert (update.outcome, update.code) == ("rolled_back", "effect.timeout")
    assert device.answer() == digest_of(V1)


def test_an_empty_wish_is_no_wish(cache: Cache) -> None:
    device = online(cache)
    device.deliver(TOPICS.desired(DEVICE), b"")
    device.settle()
    assert device.state is State.IDLE
    assert device.rows == []


def test_a_damaged_active_slot_is_noticed_at_boot_and_the_other_one_serves(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    device.settle()
    device.disk.write("slots/b/model.onnx", 1000, b"rot")
    device.boot()
    device.connect()
    device.settle()
    assert device.answer() == digest_of(V1)
    assert device.reports[-1].version == "v1"


def test_garbage_from_the_broker_never_stops_the_agent(cache: Cache) -> None:
    device = online(cache)
    rng = random.Random(3)
    topics = [
        *cache.retained,
        TOPICS.desired(DEVICE),
        TOPICS.chunk_answer(DEVICE),
        "wb1.other/md/timestamp",
        "x",
        "",
    ]
    for _ in range(2000):
        device.deliver(rng.choice(topics), rng.randbytes(rng.choice((0, 1, 39, 40, 41, 300))))
    device.deliver(TOPICS.desired(DeviceId("other")), cache.desire("v9"))
    device.settle()
    assert device.state is State.IDLE
    assert device.answer() == digest_of(V1)


def test_a_power_cut_at_any_effect_leads_to_the_new_version_or_keeps_the_old(cache: Cache) -> None:
    """Cuts the power before every single effect of an update, with unsynced data kept, lost or torn."""
    cache.publish("v2", V2)
    reference = online(cache)
    ask(reference, "v2", sequence=1)
    reference.settle()
    count = len(reference.effects)
    assert count > 60
    for cut_at in range(count):
        device = Device(cache, V1, seed=cut_at)
        device.cut_at = cut_at
        rng = random.Random(cut_at)
        try:
            device.connect()
            device.settle()
        except PowerCutError:
            device.disk.crash(rng)
            device.cut_at = None
            device.boot()
            device.settle()
            assert device.answer() in {digest_of(V1), digest_of(V2)}, f"cut at {cut_at}"
            device.connect()
            device.settle()
        assert device.answer() == digest_of(V2), f"cut at {cut_at}: {device.rows}"
        update = device.reports[-1].update
        assert update is not None
        assert update.outcome == "committed", f"cut at {cut_at}"


class LosesAll:
    """The chance by which a power cut takes everything that was not synced."""

    def choice(self, items: Sequence[_Item], /) -> _Item:
        return items[0]

    def randrange(self, _count: int, /) -> int:
        return 0


def test_chunks_whose_sync_failed_are_durable_before_they_are_a_version(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    sync, failures = device.disk.sync, ["the last chunk"]

    def failing_once(name: str) -> None:
        if name == blob_file(digest_of(V2)) and failures:
            failures.pop()
            raise StorageError("input/output error")
        sync(name)

    device.disk.sync = failing_once  # type: ignore[method-assign]  # a disk that fails once
    ask(device, "v2")
    device.settle()
    assert not failures
    assert "installing failed failed" in device.rows
    assert device.answer() == digest_of(V2)
    device.disk.crash(LosesAll())
    device.boot()
    device.settle()
    assert device.answer() == digest_of(V2)
    assert device.record.active is SlotName.B


def test_a_release_that_takes_the_device_down_is_given_up_after_three_trials(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    ask(device, "v2")
    for _ in range(10):
        device.settle(
            until=lambda: any(isinstance(effect, effects.StartTrial) for effect in device.effects[-2:])
        )
        if device.state is not State.TRIAL:
            break
        device.disk.crash(random.Random(1))
        device.boot()
        device.connect()
    device.settle()
    assert device.state is State.ROLLED_BACK
    update = device.reports[-1].update
    assert update is not None
    assert (update.code, update.tries) == ("trial.crashed", 3)
    assert device.engine.trials == []
