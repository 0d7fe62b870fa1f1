"""What an operator may ask of the agent: pause, resume, rollback, and what is remembered of updates."""

import random
from itertools import count

import pytest

from device import effects, events
from device.events import Wish
from device.journal import HISTORY_MAX
from device.slots import SlotHealth, SlotName, slot_file
from device.states import State
from protocol.constants import CHUNK_BYTES
from protocol.errors import StorageError, StorageReadOnlyError
from protocol.ids import digest_of
from simulator.power import PowerCutError
from tests.device.harness import DEVICE, TOPICS, Cache, Device, good_evidence, model_bytes

V1, V2, V3 = (model_bytes(seed, 9 * CHUNK_BYTES + 17) for seed in (1, 2, 3))  # more than one group of chunks
_serials = count(1)


@pytest.fixture
def cache() -> Cache:
    cache = Cache()
    for version, model in (("v1", V1), ("v2", V2), ("v3", V3)):
        cache.publish(version, model)
    return cache


def online(cache: Cache, **config: object) -> Device:
    device = Device(cache, V1, config=config)
    device.connect()
    device.settle()
    return device


def want(device: Device, version: str) -> None:
    device.deliver(TOPICS.desired(DEVICE), device.cache.desire(version))


def updated(cache: Cache) -> Device:
    """A device that runs v2, with v1 in its other slot."""
    device = online(cache)
    want(device, "v2")
    device.settle()
    assert device.answer() == digest_of(V2)
    return device


def wish(device: Device, what: Wish) -> int:
    serial = next(_serials)
    device.queue.append(events.OperatorAsked(serial, what))
    return serial


def answer_to(device: Device, serial: int) -> effects.AnswerOperator:
    """The first answer: later ones find nobody who listens."""
    return next(
        effect
        for effect in device.effects
        if isinstance(effect, effects.AnswerOperator) and effect.serial == serial
    )


def asked(device: Device, what: Wish) -> effects.AnswerOperator:
    serial = wish(device, what)
    device.settle()
    return answer_to(device, serial)


# --- pause -------------------------------------------------------------------------------------------------


def test_a_paused_device_takes_up_no_request_until_it_goes_on(cache: Cache) -> None:
    device = online(cache)
    assert asked(device, Wish.PAUSE) == effects.AnswerOperator(
        device.effects[-1].serial,  # type: ignore[union-attr]  # the answer itself
        "",
        "updates are paused",
    )
    want(device, "v2")
    device.settle()
    assert device.rows == []
    assert device.answer() == digest_of(V1)
    assert asked(device, Wish.RESUME).code == ""
    assert device.answer() == digest_of(V2)
    assert asked(device, Wish.RESUME).text == "updates were not paused"


def test_a_pause_survives_restarts_and_lost_connections(cache: Cache) -> None:
    device = online(cache)
    asked(device, Wish.PAUSE)
    want(device, "v2")
    device.settle()
    for _ in range(2):
        device.disk.crash(random.Random(1))
        device.boot()
        device.connect()
        device.deliver(TOPICS.desired(DEVICE), cache.retained[TOPICS.desired(DEVICE)])
        device.settle()
        assert device.record.paused_ms is not None
        assert device.answer() == digest_of(V1)
    asked(device, Wish.RESUME)
    assert device.answer() == digest_of(V2)


@pytest.mark.parametrize(
    "state",
    [State.SYNCING, State.ADMITTING, State.DOWNLOADING, State.INSTALLING, State.VERIFYING, State.SUSPENDED],
)
def test_an_update_that_is_paused_anywhere_waits_and_then_goes_on_where_it_was(
    cache: Cache, state: State
) -> None:
    device = online(cache)
    want(device, "v2")
    if state is State.SUSPENDED:
        device.settle(until=lambda: device.state is State.DOWNLOADING)
        device.disconnect()
    device.settle(until=lambda: device.state is state)
    assert device.state is state
    answer = asked(device, Wish.PAUSE)
    assert answer.code == ""
    assert "v2" in answer.text
    assert device.engine.trials == []
    assert device.answer() == digest_of(V1)
    assert device.state in {State.SUSPENDED, State.INSTALLING, State.VERIFYING, State.TRIAL}
    assert not [topic for topic in device.subscriptions if "/b/" in topic or topic.endswith("/md/snapshot")]
    stored = [effect for effect in device.effects if isinstance(effect, effects.WriteChunk)]
    if not device.is_connected:
        device.connect()
        device.settle()
        assert device.state is State.SUSPENDED
    asked(device, Wish.RESUME)
    device.settle()
    assert device.answer() == digest_of(V2)
    chunks = [
        (effect.blob, effect.index) for effect in device.effects if isinstance(effect, effects.WriteChunk)
    ]
    assert len(chunks) == len(set(chunks))
    assert len(chunks) > len(stored) or state in {State.INSTALLING, State.VERIFYING}


def test_a_paused_installation_goes_on_after_a_restart_only_when_told_to(cache: Cache) -> None:
    device = online(cache)
    want(device, "v2")
    device.settle(until=lambda: device.state is State.INSTALLING)
    asked(device, Wish.PAUSE)
    device.disk.crash(random.Random(1))
    device.boot()
    device.connect()
    device.settle()
    assert device.engine.trials == []
    asked(device, Wish.RESUME)
    assert device.answer() == digest_of(V2)
    assert device.engine.trials == [digest_of(V2)]


def test_a_trial_under_way_decides_although_updates_are_paused(cache: Cache) -> None:
    device = online(cache)
    want(device, "v2")
    device.settle(until=lambda: device.state is State.TRIAL)
    answer = asked(device, Wish.PAUSE)
    assert "comes to its end first (trial)" in answer.text
    assert device.answer() == digest_of(V2)
    want(device, "v3")
    device.settle()
    assert device.answer() == digest_of(V2)


def test_a_pause_within_a_retry_holds_it_back(cache: Cache) -> None:
    device = online(cache)
    cache.retained = {topic: data for topic, data in cache.retained.items() if "/b/" not in topic}
    want(device, "v2")
    device.settle(until=lambda: device.state is State.FAILED, deadlines=400)
    asked(device, Wish.PAUSE)
    assert device.agent.deadline() is None
    before = len(device.rows)
    device.settle()
    assert len(device.rows) == before
    for version, model in (("v2", V2),):
        cache.publish(version, model)
    asked(device, Wish.RESUME)
    assert device.answer() == digest_of(V2)


def test_a_newer_request_replaces_one_that_waits_for_the_end_of_a_pause(cache: Cache) -> None:
    device = online(cache)
    asked(device, Wish.PAUSE)
    want(device, "v2")
    want(device, "v3")
    device.settle()
    asked(device, Wish.RESUME)
    assert device.answer() == digest_of(V3)
    assert device.engine.trials == [digest_of(V3)]


def test_a_pause_that_cannot_be_written_down_is_said_to_be_none(cache: Cache) -> None:
    device = online(cache)
    device.disk.is_read_only = True
    answer = asked(device, Wish.PAUSE)
    assert answer.code == StorageReadOnlyError.code
    device.disk.is_read_only = False
    assert device.record.paused_ms is None


# --- rollback ----------------------------------------------------------------------------------------------


def test_a_rollback_leads_to_the_version_before_and_quarantines_the_other(cache: Cache) -> None:
    device = updated(cache)
    floors, sequence = device.record.floors, device.record.desired_sequence
    answer = asked(device, Wish.ROLLBACK)
    assert (answer.code, answer.text) == ("", "going back from v2 to v1")
    assert device.rows[-2:] == ["idle recalled rolling_back", "rolling_back restored rolled_back"]
    assert device.answer() == digest_of(V1)
    assert device.disk.links["current"] == "slots/a"
    assert device.disk.names("slots/b") == []
    record = device.record
    assert (record.floors, record.desired_sequence) == (floors, sequence)
    report = device.reports[-1]
    assert (report.version, report.files) == ("v1", {"model.onnx": digest_of(V1)})
    assert report.update is not None
    assert (report.update.rollout, report.update.version) == ("r1", "v2")
    assert (report.update.outcome, report.update.code) == ("rolled_back", "operator.rollback")
    device.deliver(TOPICS.desired(DEVICE), cache.retained[TOPICS.desired(DEVICE)])
    device.settle()
    assert device.answer() == digest_of(V1)  # the retained request is old news
    want(device, "v2")
    device.settle()
    assert device.reports[-1].update is not None
    assert device.reports[-1].update.code == "admission.quarantined"
    want(device, "v3")
    device.settle()
    assert device.answer() == digest_of(V3)


def test_the_version_that_is_given_up_answers_until_the_one_before_does(cache: Cache) -> None:
    device = updated(cache)
    wish(device, Wish.ROLLBACK)
    answers = []

    def note() -> bool:
        answers.append(device.answer())
        return False

    device.settle(until=note)
    assert set(answers) == {digest_of(V1), digest_of(V2)}
    assert answers == sorted(answers, key=lambda digest: digest == digest_of(V1))


def test_a_paused_device_can_be_taken_back(cache: Cache) -> None:
    device = updated(cache)
    asked(device, Wish.PAUSE)
    want(device, "v3")
    device.settle()
    assert asked(device, Wish.ROLLBACK).code == ""
    assert device.answer() == digest_of(V1)
    assert device.record.paused_ms is not None
    asked(device, Wish.RESUME)
    assert device.answer() == digest_of(V3)


def test_a_device_that_starts_serves_before_it_goes_back(cache: Cache) -> None:
    device = updated(cache)
    device.boot()
    device.step()
    serial = wish(device, Wish.ROLLBACK)
    device.settle()
    assert answer_to(device, serial).code == "operator.busy"
    assert device.answer() == digest_of(V2)
    assert asked(device, Wish.ROLLBACK).code == ""
    assert device.answer() == digest_of(V1)


def test_there_is_no_way_back_from_the_first_version(cache: Cache) -> None:
    device = online(cache)
    answer = asked(device, Wish.ROLLBACK)
    assert (answer.code, answer.text) == ("operator.nothing_before", "there is no version before v1")
    assert device.answer() == digest_of(V1)


def test_there_is_one_step_back_and_no_way_forward_to_what_was_given_up(cache: Cache) -> None:
    device = updated(cache)
    asked(device, Wish.ROLLBACK)
    assert asked(device, Wish.ROLLBACK).code == "operator.nothing_before"
    assert device.answer() == digest_of(V1)


def test_a_version_that_failed_its_trial_is_no_way_back(cache: Cache) -> None:
    device = online(cache)
    device.engine.evidence[digest_of(V2)] = good_evidence(prompts_passed=0)
    want(device, "v2")
    device.settle()
    assert device.state is State.ROLLED_BACK
    assert asked(device, Wish.ROLLBACK).code == "operator.nothing_before"


def test_a_rollback_is_refused_while_an_update_is_under_way(cache: Cache) -> None:
    device = updated(cache)
    want(device, "v3")
    device.settle(until=lambda: device.state is State.SYNCING)
    answer = asked(device, Wish.ROLLBACK)
    assert answer.code == "operator.busy"
    assert "v3" in answer.text
    assert device.answer() == digest_of(V3)


def test_an_update_that_begins_while_the_version_before_is_measured_goes_first(cache: Cache) -> None:
    device = updated(cache)
    serial = wish(device, Wish.ROLLBACK)
    want(device, "v3")
    device.settle()
    assert answer_to(device, serial).code == "operator.busy"
    assert device.answer() == digest_of(V3)


def test_a_version_before_that_was_damaged_is_not_gone_back_to(cache: Cache) -> None:
    device = updated(cache)
    device.disk.write(slot_file(SlotName.A, "model.onnx"), 100, b"damage")
    answer = asked(device, Wish.ROLLBACK)
    assert answer.code == "operator.damaged"
    assert device.state is State.IDLE
    assert device.answer() == digest_of(V2)
    assert device.record.slots[SlotName.B].health is SlotHealth.GOOD


def test_a_version_before_that_cannot_be_read_is_not_gone_back_to(cache: Cache) -> None:
    device = updated(cache)
    serial = wish(device, Wish.ROLLBACK)
    read, target = device.disk.read, slot_file(SlotName.A, "model.onnx")

    def failing(name: str, offset: int, length: int) -> bytes:
        if name == target:
            raise StorageError(f"{name}: I/O error")
        return read(name, offset, length)

    device.disk.read = failing  # type: ignore[method-assign]  # the disk fails
    device.settle()
    assert answer_to(device, serial).code == StorageError.code
    assert device.answer() == digest_of(V2)


def test_a_version_before_that_does_not_load_leaves_the_one_that_runs(cache: Cache) -> None:
    device = updated(cache)
    device.engine.unloadable.add(digest_of(V1))
    assert asked(device, Wish.ROLLBACK).code == ""  # it is found out later
    assert device.state is State.FAILED
    assert device.answer() == digest_of(V2)
    record = device.record
    assert record.active is SlotName.B
    assert record.quarantine == ()
    assert record.update is not None
    assert (record.update.outcome, record.update.code) == ("failed", "operator.unservable")
    assert device.disk.names("slots/b") == ["slots/b/model.onnx"]


def test_a_rollback_that_cannot_be_written_down_leaves_the_version_that_runs(cache: Cache) -> None:
    device = updated(cache)
    serial = wish(device, Wish.ROLLBACK)
    device.step()
    device.disk.is_read_only = True
    device.settle(until=lambda: device.state is State.FAILED)
    assert answer_to(device, serial).code == StorageReadOnlyError.code
    assert device.answer() == digest_of(V2)
    device.disk.is_read_only = False
    device.settle()
    assert device.record.active is SlotName.B
    device.boot()
    device.settle()
    assert device.answer() == digest_of(V2)


def test_a_power_cut_at_any_effect_of_a_rollback_leaves_one_of_the_two_versions(cache: Cache) -> None:
    reference = updated(cache)
    start = len(reference.effects)
    asked(reference, Wish.ROLLBACK)
    effects_count = len(reference.effects)
    assert effects_count - start > 8
    for cut_at in range(start, effects_count):
        device = updated_once_more(cache)
        assert len(device.effects) == start
        device.cut_at = cut_at
        wish(device, Wish.ROLLBACK)
        with pytest.raises(PowerCutError):
            device.settle()
        device.cut_at = None
        device.disk.crash(random.Random(cut_at))
        device.boot()
        device.connect()
        device.settle()
        record = device.record
        assert device.answer() == record.active_slot.files["model.onnx"], f"cut at {cut_at}"
        assert device.state in {State.IDLE, State.ROLLED_BACK}
        if device.state is State.ROLLED_BACK:
            assert device.answer() == digest_of(V1)
            assert len(record.quarantine) == 1
        else:
            assert device.answer() == digest_of(V2)
            asked(device, Wish.ROLLBACK)
            assert device.answer() == digest_of(V1)


def test_a_power_cut_at_any_change_of_the_disk_during_a_rollback_leaves_a_version(cache: Cache) -> None:
    for operations in count():
        device = updated_once_more(cache)
        wish(device, Wish.ROLLBACK)
        if not device.settle_until_cut(operations):
            break
        device.boot()
        device.connect()
        device.settle()
        assert device.answer() == device.record.active_slot.files["model.onnx"], f"cut at {operations}"
    assert operations > 4


def updated_once_more(cache: Cache) -> Device:
    cache.sequence = 0
    cache.retained.pop(TOPICS.desired(DEVICE), None)
    return updated(cache)


# --- history -----------------------------------------------------------------------------------------------


def outcomes(device: Device) -> list[tuple[str, str, str, str]]:
    return [(past.version, past.outcome, past.code, past.active) for past in device.record.history]


def test_the_history_tells_every_update_once_whatever_became_of_it(cache: Cache) -> None:
    device = updated(cache)
    device.engine.evidence[digest_of(V3)] = good_evidence(prompts_passed=0)
    want(device, "v3")
    device.settle()
    want(device, "v3")
    device.settle()
    want(device, "v9")
    device.settle(until=lambda: device.state is State.SYNCING)
    want(device, "v2")
    device.settle()
    assert outcomes(device) == [
        ("v2", "committed", "", "v2"),
        ("v3", "rolled_back", "trial.answers", "v2"),
        ("v3", "rejected", "admission.quarantined", "v2"),
        ("v9", "failed", "update.withdrawn", "v2"),
    ]
    first = device.record.history[0]
    assert first.started_ms <= first.finished_ms
    assert first.received_bytes >= len(V2)
    assert first.tries == 1


def test_an_update_that_is_replaced_by_another_is_remembered(cache: Cache) -> None:
    device = online(cache)
    want(device, "v2")
    device.settle(until=lambda: device.state is State.DOWNLOADING)
    want(device, "v3")
    device.settle()
    assert outcomes(device) == [("v2", "failed", "update.replaced", "v1"), ("v3", "committed", "", "v3")]


def test_the_history_is_bounded_and_forgets_the_oldest(cache: Cache) -> None:
    device = online(cache)
    for _ in range(HISTORY_MAX // 2 + 1):
        for model in (V2, V1):
            want(device, "v2" if model is V2 else "v1")
            device.settle()
            assert device.answer() == digest_of(model)
    history = device.record.history
    assert len(history) == HISTORY_MAX
    assert [past.version for past in history[-2:]] == ["v2", "v1"]


def test_the_history_says_what_the_record_says_after_a_power_cut_at_any_change(cache: Cache) -> None:
    """The end of an update and its line in the history are one write."""
    for operations in count():
        cache.sequence = 0
        device = Device(cache, V1)
        device.connect()
        want(device, "v2")
        if not device.settle_until_cut(operations):
            break
        record = device.record
        is_over = record.update is not None and record.update.finished_ms is not None
        assert [past.version for past in record.history] == ["v2"] * is_over, f"cut at {operations}"
    assert operations > 30
