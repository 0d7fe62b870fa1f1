"""What an agent believes, over stolen keys, lost roots and clocks that lie. The numbers are rows of docs/security/metadata.md."""

import pytest
from msgspec.structs import replace
from securesystemslib.signer import Signer  # type: ignore[attr-defined]  # public, but without __all__
from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # public, but without __all__

from device import events
from device.states import State
from protocol.constants import DESIRED_LEAP_MAX
from protocol.errors import MissingKeyError, TrustError
from protocol.ids import digest_of
from protocol.release import ArtifactCustom, delta_target, file_target
from protocol.trust import Documents, Target, verify
from server.fleet.registry import DeviceRecord, next_desired_sequence
from server.ports import Repository
from server.releases.metadata import Draft, expires, sign, snapshot_of, timestamp_of
from server.releases.publisher import ROLES, Publisher
from server.releases.signers import make_key, public_key_of
from server.runtime import BUNDLE_ROOTS_MAX
from tests.device.harness import DEVICE, START_MS, TOPICS, Cache, Device, model_bytes

DAY_MS = 86_400_000
YEAR_MS = 365 * DAY_MS
V1, V2, V3, EVIL = (model_bytes(seed) for seed in (1, 2, 3, 66))


@pytest.fixture
def cache() -> Cache:
    cache = Cache()
    cache.publish("v1", V1)
    return cache


def online(cache: Cache, now_ms: int = START_MS) -> Device:
    device = Device(cache, V1)
    device.now_ms = now_ms
    device.has_server()
    device.connect()
    device.settle()
    return device


def ask(device: Device, version: str) -> None:
    device.deliver(TOPICS.desired(DEVICE), device.cache.desire(version))
    device.settle()


def published_again(cache: Cache, now_ms: int) -> None:
    """Documents whose life begins now."""
    cache.server_ms = now_ms
    cache.repository = cache.publisher.publish(cache.repository, (), (), now_ms).repository
    cache.repository = cache.publisher.renew(cache.repository, "releases.digits", now_ms).repository
    cache.repository = cache.publisher.renew(cache.repository, "artifacts", now_ms).repository
    cache.repository = cache.publisher.renew(cache.repository, "targets", now_ms).repository
    cache.repository = cache.publisher.renew(cache.repository, "root", now_ms).repository
    cache.publish_metadata()
    if cache.desired is not None:
        cache.desire_again()


def reason(device: Device) -> str:
    update = device.reports[-1].update
    assert update is not None
    return update.code


def rotated(cache: Cache, *roles: str, now_ms: int = START_MS) -> None:
    """New keys for roles; the old ones are worth nothing afterwards."""
    keys = {role: make_key(None) for role in roles}
    named: dict[str, bytes | Signer] = dict(cache.publisher._named)
    named |= {f"old {role}": named[role] for role in roles}
    cache.publisher = Publisher(named | {role: private for role, (private, _) in keys.items()})

    def change(draft: Draft) -> None:
        for role, (_, public) in keys.items():
            draft.assign(role, [public_key_of(role, public)], 1)

    documents = cache.publisher.change(cache.repository, {}, change, now_ms)
    cache.repository = cache.publisher.submit(cache.repository, documents, (), now_ms).repository
    cache.publish_metadata()


def stolen(cache: Cache, version: int) -> Repository:
    """What a thief of the online keys can sign: any snapshot and timestamp, over documents that exist."""
    documents, keys = cache.repository.documents, cache.publisher._named
    listed = dict(documents.delegated) | {"targets": documents.targets}
    snapshot = signed_by(snapshot_of(version, listed, START_MS), keys["snapshot"])
    timestamp = signed_by(timestamp_of(version, snapshot, START_MS), keys["timestamp"])
    return replace(cache.repository, documents=replace(documents, snapshot=snapshot, timestamp=timestamp))


def signed_by(document: object, signer: Signer) -> bytes:
    return sign("snapshot", document, [signer])


# --- stolen and lost keys


def test_15_the_theft_of_every_online_key_installs_nothing_and_is_recovered_from(cache: Cache) -> None:
    """Timestamp, snapshot and artifacts: version 2^63 - 1, deltas and files of the thief's; then new keys by a new root."""
    device = online(cache)
    cache.publish("v2", V2)
    honest = cache.repository
    thief = Publisher({role: cache.publisher._named[role] for role in ("timestamp", "snapshot", "artifacts")})
    for role in ("releases.digits", "targets", "root"):  # none of these is in its power
        with pytest.raises(MissingKeyError):
            thief.renew(honest, role, START_MS)
    cache.repository = stolen(cache, version=(1 << 63) - 1)
    cache.publish_metadata()
    ask(device, "v2")  # a release that people signed: the thief may choose among these
    assert device.answer() == digest_of(V2)
    assert device.record.floors.timestamp == (1 << 63) - 1
    cache.repository = honest
    cache.publish("v3", V3)
    ask(device, "v3")
    assert (device.state, reason(device)) == (State.FAILED, "trust.rollback")
    assert device.answer() == digest_of(V2)
    rotated(cache, "timestamp", "snapshot", "artifacts")
    ask(device, "v3")
    assert device.answer() == digest_of(V3)
    assert device.record.floors.timestamp < 1 << 62
    assert device.record.floors.root == 2


def test_15_a_thief_of_online_keys_cannot_bring_back_what_was_withdrawn(cache: Cache) -> None:
    """Old documents of targets and of the family were signed once, and are replayed under a new snapshot."""
    device = online(cache)
    cache.publish("v2", V2)
    old = dict(cache.repository.documents.delegated)["releases.digits"]
    cache.retire("releases/digits/v2.json")
    cache.publish("v3", V3)
    ask(device, "v3")
    assert device.answer() == digest_of(V3)
    delegated = dict(cache.repository.documents.delegated) | {"releases.digits": old}
    documents = replace(cache.repository.documents, delegated=tuple(sorted(delegated.items())))
    cache.repository = replace(cache.repository, documents=documents)
    cache.repository = stolen(cache, version=1000)
    cache.publish_metadata()
    ask(device, "v2")
    assert (device.state, reason(device)) == (State.FAILED, "trust.rollback")
    assert device.answer() == digest_of(V3)


def test_17_the_root_key_is_replaced_and_the_old_one_is_worth_nothing(cache: Cache) -> None:
    device = online(cache)
    old = Publisher(dict(cache.publisher._named))
    before = cache.repository
    rotated(cache, "root", "targets", "snapshot", "timestamp")
    cache.publish("v2", V2)
    ask(device, "v2")
    assert device.answer() == digest_of(V2)
    forged = old.renew(before, "root", START_MS).repository  # another root 2, by the old key
    with pytest.raises(TrustError):
        verify(
            cache.repository.roots[1],
            replace(forged.documents, roots=forged.roots[1:]),
            device.record.floors,
            START_MS,
        )


def test_17_a_false_root_in_the_broker_costs_time_and_nothing_else(cache: Cache) -> None:
    device = online(cache)
    rotated(cache, "timestamp")
    cache.publish("v2", V2)
    true = cache.retained[TOPICS.root(2)]
    cache.retained[TOPICS.root(2)] = Cache().root
    device.has_server()
    ask(device, "v2")
    assert device.answer() == digest_of(V2)
    assert device.record.floors.root == 2
    assert device.executor.boot_event(0).root == true


@pytest.mark.parametrize("is_retained", [True, False])
def test_19_a_device_that_was_away_for_fifty_rotations_arrives(cache: Cache, is_retained: bool) -> None:
    """More than one answer can hold; every timestamp key is new, so that nothing verifies before the last root."""
    device = online(cache)
    for _ in range(50):
        rotated(cache, "timestamp")
    assert BUNDLE_ROOTS_MAX < 50
    cache.publish("v2", V2)
    if not is_retained:
        cache.retained = {topic: data for topic, data in cache.retained.items() if "/md/" not in topic}
    device.has_server()
    ask(device, "v2")
    assert device.answer() == digest_of(V2)
    assert device.record.floors.root == 51


def test_19_a_power_cut_on_the_way_along_the_roots_loses_none_that_was_followed(cache: Cache) -> None:
    device = online(cache)
    for _ in range(3):
        rotated(cache, "timestamp")
    cache.publish("v2", V2)
    timestamp = cache.retained.pop(TOPICS.metadata("timestamp"))
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: device.record.floors.root == 4)
    device.boot()
    assert device.record.floors.root == 4
    device.connect()
    cache.retained[TOPICS.metadata("timestamp")] = timestamp
    device.settle()
    assert device.answer() == digest_of(V2)


# --- wishes, which nobody signs


@pytest.mark.parametrize("sequence", [(1 << 53) - 1, DESIRED_LEAP_MAX + 1])
def test_26_a_wish_with_the_highest_number_of_all_keeps_no_later_one_out(cache: Cache, sequence: int) -> None:
    """For what runs already, so that no update would tell the server of it."""
    device = online(cache)
    cache.publish("v2", V2)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v1", sequence=sequence))
    device.settle()
    assert device.record.desired_sequence == 0
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2", sequence=1))
    device.settle()
    assert device.answer() == digest_of(V2)


def test_26_a_server_goes_above_whatever_somebody_else_has_asked_for(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v1", sequence=DESIRED_LEAP_MAX))
    device.settle()
    known = DeviceRecord(device=DEVICE, report=device.reports[-1], desired_sequence=7)
    assert device.reports[-1].update is None
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2", sequence=next_desired_sequence(known)))
    device.settle()
    assert device.answer() == digest_of(V2)


# --- clocks


@pytest.mark.parametrize("now_ms", [0, 1, START_MS - 50 * YEAR_MS])
def test_27_a_clock_at_1970_updates_and_learns_the_time_from_what_was_signed(
    cache: Cache, now_ms: int
) -> None:
    device = online(cache, max(0, now_ms))
    cache.publish("v2", V2)
    ask(device, "v2")
    assert device.answer() == digest_of(V2)
    assert device.record.floors.time_ms == START_MS


def test_27_a_clock_at_1970_takes_nothing_that_had_ended_when_it_last_looked(cache: Cache) -> None:
    device = online(cache, 0)
    cache.publish("v2", V2)
    old = cache.repository
    later_ms = START_MS + 30 * DAY_MS
    published_again(cache, later_ms)
    cache.publish("v3", V3)
    cache.repository = cache.publisher.publish(cache.repository, (), (), later_ms).repository
    cache.publish_metadata()
    ask(device, "v3")
    assert device.answer() == digest_of(V3)
    assert device.record.floors.time_ms == later_ms
    with pytest.raises(TrustError, match="expired"):  # whatever versions it has seen
        verify(
            old.roots[0],
            old.documents,
            replace(device.record.floors, root=1, timestamp=0, snapshot=0, targets=0, delegated=()),
            now_ms=0,
        )


def test_28_a_clock_ten_years_ahead_keeps_updates_out_and_nothing_else(cache: Cache) -> None:
    device = online(cache, START_MS + 10 * YEAR_MS)
    cache.publish("v2", V2)
    ask(device, "v2")
    assert (device.state, reason(device)) == (State.FAILED, "trust.expired")
    assert device.answer() == digest_of(V1)
    assert device.record.floors.time_ms == 0  # its own clock is no source
    device.boot()  # the clock is corrected
    device.now_ms = START_MS
    device.connect()
    device.settle()
    assert device.answer() == digest_of(V1)
    ask(device, "v2")
    assert device.answer() == digest_of(V2)


def test_28_a_year_that_a_thief_signed_goes_with_the_timestamp_key(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    honest = cache.repository
    far_ms = START_MS + 10 * YEAR_MS
    far = signed_by(timestamp_of(99, honest.documents.snapshot, far_ms), cache.publisher._named["timestamp"])
    cache.repository = replace(honest, documents=replace(honest.documents, timestamp=far))
    cache.publish_metadata()
    ask(device, "v2")
    assert (device.state, reason(device)) == (State.FAILED, "trust.expired")
    assert (device.answer(), device.record.floors.time_ms) == (digest_of(V1), far_ms)
    cache.repository = honest
    cache.publish("v3", V3)
    ask(device, "v3")
    assert (device.state, reason(device)) == (State.FAILED, "trust.expired")
    rotated(cache, "timestamp")
    ask(device, "v3")
    assert (device.answer(), device.record.floors.time_ms) == (digest_of(V3), START_MS)


@pytest.mark.parametrize("step_ms", [-DAY_MS, -10 * YEAR_MS, 6 * DAY_MS])
def test_29_a_clock_that_jumps_in_the_middle_of_an_update_changes_nothing(cache: Cache, step_ms: int) -> None:
    cache.publish("v2", V2)
    for state in (State.SYNCING, State.ADMITTING, State.DOWNLOADING, State.INSTALLING, State.VERIFYING):
        device = online(cache)
        device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
        device.settle(until=lambda state=state, device=device: device.state is state)  # type: ignore[misc]
        device.now_ms = max(0, device.now_ms + step_ms)
        device.boot()
        device.connect()
        device.settle()
        assert device.answer() == digest_of(V2), state


def test_29_a_frozen_clock_neither_installs_what_was_not_signed_nor_stops_inference(cache: Cache) -> None:
    device = online(cache, 0)
    cache.publish("v2", V2)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    while device.step():  # no deadline ever comes
        assert device.answer() in {digest_of(V1), digest_of(V2)}
    assert device.answer() == digest_of(V2)
    assert device.now_ms == 0


def test_9_a_download_that_was_away_for_longer_than_its_metadata_looks_again(cache: Cache) -> None:
    """The version was withdrawn meanwhile: what is on disk of it is never installed."""
    device = online(cache)
    cache.publish("v2", V2)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: device.state is State.DOWNLOADING)
    device.disconnect()
    device.settle()
    assert device.rows[-1] == "downloading suspended suspended"
    device.now_ms += 30 * DAY_MS
    cache.retire("releases/digits/v2.json")
    published_again(cache, device.now_ms)
    device.connect()
    device.settle()
    assert device.state is State.FAILED
    assert device.answer() == digest_of(V1)
    assert digest_of(V2) not in device.engine.trials


def test_9_a_download_that_looks_again_keeps_what_it_has(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: device.agent._desk.ledger.tally.received_chunks >= 2)
    assert device.state is State.DOWNLOADING
    device.disconnect()
    device.settle()
    device.now_ms += 30 * DAY_MS
    published_again(cache, device.now_ms)
    device.connect()
    device.settle()
    assert device.answer() == digest_of(V2)
    assert device.rows.count("suspended sync_resumed syncing") == 1
    after = device.reports[-1].update
    assert after is not None
    assert after.redundant_chunks == 0


def test_8_expired_metadata_fails_an_update_and_newer_metadata_heals_it(cache: Cache) -> None:
    device = online(cache, START_MS + 100 * DAY_MS)
    cache.publish("v2", V2)
    ask(device, "v2")
    assert (device.state, reason(device)) == (State.FAILED, "trust.expired")
    assert device.answer() == digest_of(V1)
    published_again(cache, device.now_ms)
    ask(device, "v2")
    assert device.answer() == digest_of(V2)


def test_1_a_file_that_only_the_artifacts_key_vouches_for_is_never_run(cache: Cache) -> None:
    """The thief of that key signs its own bytes under the name of the file that the release names."""
    device = online(cache)
    cache.publish("v2", V2)
    name, tree = cache.add_blob(EVIL)
    honest = dict(cache.repository.documents.delegated)
    evil = [
        Target(file_target(digest_of(V2)), len(EVIL), name, ArtifactCustom(chunks=tree)),
        Target(delta_target(digest_of(V1), digest_of(V2)), len(EVIL), name, ArtifactCustom(chunks=tree)),
    ]
    cache.repository = cache.publisher.publish(cache.repository, evil, (), START_MS).repository
    assert dict(cache.repository.documents.delegated)["releases.digits"] == honest["releases.digits"]
    cache.publish_metadata()
    ask(device, "v2")
    assert device.answer() == digest_of(V1)
    assert device.engine.loads.count(digest_of(EVIL)) == 0
    assert device.engine.trials == []


def test_a_repository_from_before_delegations_is_believed_as_it_is(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    keys = cache.publisher._named
    everything = Draft(cache.repository, {}).documents
    targets = Targets(1, "1.0.31", expires("targets", START_MS))
    for document in everything.values():
        targets.targets |= document.targets
    signed = {"targets": sign("targets", targets, [keys["targets"]])}
    snapshot = signed_by(snapshot_of(9, signed, START_MS), keys["snapshot"])
    timestamp = signed_by(timestamp_of(9, snapshot, START_MS), keys["timestamp"])
    documents = Documents(timestamp=timestamp, snapshot=snapshot, targets=signed["targets"])
    cache.repository = replace(cache.repository, documents=documents)
    cache.retained = {topic: data for topic, data in cache.retained.items() if "/md/" not in topic}
    cache.publish_metadata()
    device.has_server()
    ask(device, "v2")
    assert device.answer() == digest_of(V2)
    assert device.record.floors.delegated == ()


def test_the_keys_of_a_new_repository_are_all_different() -> None:
    publisher = Cache().publisher
    assert len({publisher._named[role].public_key.keyid for role in ROLES}) == len(ROLES)


def test_events_that_name_other_documents_are_ignored(cache: Cache) -> None:
    device = online(cache)
    cache.publish("v2", V2)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: device.state is State.SYNCING)
    device.queue.append(events.MessageReceived(TOPICS.metadata("releases.other"), b"nonsense"))
    device.settle()
    assert device.answer() == digest_of(V2)
