"""Who may say what a device runs, and who may tell it the time. The numbers are rows of docs/security/metadata.md."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from device.assignments import LOOK_PERIOD_MS
from device.effects import Publish, Subscribe
from device.journal import Director
from device.states import State
from device.timekeeping import CLOCK_BEHIND_MS_MAX
from protocol.constants import DESIRED_LEAP_MAX
from protocol.director import DESIRED_LIFE_MS, time_statement
from protocol.ids import DeviceId, FleetId, digest_of
from protocol.messages import (
    Desired,
    MetadataBundle,
    MetadataRequest,
    decode_message,
    decode_request,
    encode_message,
)
from protocol.topics import Topics
from server.releases.metadata import Draft
from server.releases.publisher import Publisher
from server.releases.signers import make_key, public_key_of
from tests.device.harness import DEVICE, FAMILY, FLEET, START_MS, TOPICS, Cache, Device, model_bytes
from tests.device.test_trust_agent import published_again, reason, rotated

DAY_MS = 86_400_000
YEAR_MS = 365 * DAY_MS
SEQUENCE_MAX = DESIRED_LEAP_MAX  # the highest number that a device takes at once
V1, V2, V3 = (model_bytes(seed, 70_000) for seed in (1, 2, 3))


@pytest.fixture
def cache() -> Cache:
    cache = Cache()
    cache.publish("v1", V1)
    cache.publish("v2", V2)
    return cache


def online(
    cache: Cache, now_ms: int = START_MS, *, has_looked: bool = True, is_clock_set: bool = True
) -> Device:
    device = Device(cache, V1, has_looked=has_looked)
    device.is_clock_set = is_clock_set
    device.now_ms = now_ms
    device.has_server()
    device.boot()
    device.connect()
    device.settle()
    return device


def wish(version: str, sequence: int, rollout: str = "r1") -> Desired:
    return Desired(sequence=sequence, rollout=rollout, family=FAMILY, version=version)


def tell(device: Device, payload: bytes) -> None:
    device.deliver(TOPICS.desired(DEVICE), payload)
    while device.step():
        pass


def alarm(device: Device) -> str:
    return device.reports[-1].alarm or ""


def looks(device: Device) -> int:
    timestamp = TOPICS.metadata("timestamp")
    return sum(isinstance(effect, Subscribe) and timestamp in effect.filters for effect in device.effects)


def requests(device: Device) -> list[MetadataRequest]:
    topic = TOPICS.request(DEVICE)
    payloads = [each.payload for each in device.effects if isinstance(each, Publish) and each.topic == topic]
    return [each for each in map(decode_request, payloads) if isinstance(each, MetadataRequest)]


def forged_unsigned(_cache: Cache) -> bytes:
    return encode_message(wish("v2", SEQUENCE_MAX))


def forged_by_a_stranger(_cache: Cache) -> bytes:
    return Cache().sealed(wish("v2", SEQUENCE_MAX))


def of_another_device(cache: Cache) -> bytes:
    topic = Topics(FLEET).desired(DeviceId("device-2"))
    return cache.publisher.director(cache.repository).seal(topic, wish("v2", SEQUENCE_MAX), START_MS)


def of_another_fleet(cache: Cache) -> bytes:
    topic = Topics(FleetId("other-fleet")).desired(DEVICE)
    return cache.publisher.director(cache.repository).seal(topic, wish("v2", SEQUENCE_MAX), START_MS)


def with_a_longer_life(cache: Cache) -> bytes:
    return cache.sealed(wish("v2", 7)).replace(b'"expires_ms":', b'"expires_ms":9')


def with_another_content(cache: Cache) -> bytes:
    return cache.sealed(wish("v1", 7)).replace(b'"version":"v1"', b'"version":"v2"')


FORGERIES = [
    forged_unsigned,
    forged_by_a_stranger,
    of_another_device,
    of_another_fleet,
    with_a_longer_life,
    with_another_content,
]


# --- wishes


@pytest.mark.parametrize("forgery", FORGERIES)
def test_26_a_forged_wish_is_not_taken_and_blocks_none_that_is_true(
    cache: Cache, forgery: Callable[[Cache], bytes]
) -> None:
    device = online(cache)
    tell(device, forgery(cache))
    device.settle()
    assert (device.state, device.answer()) == (State.IDLE, digest_of(V1))
    assert (device.record.desired_sequence, device.record.update) == (0, None)
    assert alarm(device) == "trust.director"
    ask_for(device, "v2")
    assert (device.answer(), alarm(device)) == (digest_of(V2), "")


@pytest.mark.parametrize("forgery", FORGERIES[:3])
def test_26_a_device_that_has_never_looked_learns_who_may_wish_from_the_update(
    cache: Cache, forgery: Callable[[Cache], bytes]
) -> None:
    device = online(cache, has_looked=False)
    device.deliver(TOPICS.desired(DEVICE), forgery(cache))
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))  # neither is known to be true
    device.settle()
    assert device.answer() == digest_of(V2)
    assert [past.code for past in device.record.history] == ["trust.director", ""]
    assert (device.record.desired_sequence, alarm(device)) == (1, "")


def test_26_forged_wishes_cost_a_device_no_more_than_a_look_now_and_then(cache: Cache) -> None:
    device = online(cache)
    writes = device.record.boots
    for number in range(12):
        tell(device, Cache(number).sealed(wish("v2", SEQUENCE_MAX - number)))
    assert looks(device) == 1
    device.now_ms += LOOK_PERIOD_MS
    device.settle()
    assert looks(device) == 2
    tell(device, Cache(11).sealed(wish("v2", SEQUENCE_MAX - 11)))  # judged before, and the same again
    device.settle()
    assert looks(device) == 2
    assert device.record.boots == writes


@pytest.mark.parametrize("state", [State.SYNCING, State.DOWNLOADING, State.INSTALLING, State.VERIFYING])
def test_26_a_forged_wish_does_not_disturb_an_update(cache: Cache, state: State) -> None:
    device = online(cache)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: device.state is state)
    tell(device, forged_by_a_stranger(cache))
    device.settle()
    assert device.answer() == digest_of(V2)
    assert device.rows.count("idle requested syncing") == 1
    assert not any("withdrawn" in row or "suspended" in row for row in device.rows)


def test_26_a_replayed_older_wish_changes_nothing(cache: Cache) -> None:
    device = online(cache)
    older = cache.desire("v2")
    ask_for(device, "v1")  # taken back before the device heard of it
    tell(device, older)
    device.settle()
    assert (device.state, device.answer()) == (State.IDLE, digest_of(V1))


def test_26_a_wish_that_has_expired_is_not_acted_upon_until_it_is_signed_anew(cache: Cache) -> None:
    """Somebody kept it back while the device was away; the server would have signed it anew every few days."""
    device = online(cache)
    cache.server_ms = START_MS - DESIRED_LIFE_MS
    ask_for(device, "v2")
    assert (device.state, reason(device), device.answer()) == (State.FAILED, "trust.expired", digest_of(V1))
    cache.server_ms = device.now_ms
    tell(device, cache.desire_again())
    device.settle()
    assert device.answer() == digest_of(V2)


def test_15_a_stolen_director_key_chooses_only_among_signed_releases(cache: Cache) -> None:
    device = online(cache)
    cache.retire("releases/digits/v2.json")
    for sequence, version in enumerate(("v2", "v9"), start=1):  # withdrawn, and never there
        cache.desire(version, sequence=sequence)
        ask_again(device)
        assert (device.state, reason(device)) == (State.FAILED, "release.invalid")
    assert device.answer() == digest_of(V1)
    cache.publish("v3", V3)
    cache.desire("v3", sequence=SEQUENCE_MAX)
    ask_again(device)
    assert device.answer() == digest_of(V3)


def ask_for(device: Device, version: str) -> None:
    device.cache.desire(version)
    ask_again(device)


def ask_again(device: Device) -> None:
    """Until it is over, or has failed for the first time."""
    device.deliver(TOPICS.desired(DEVICE), device.cache.retained[TOPICS.desired(DEVICE)])
    while device.step():
        pass
    device.settle(until=lambda: device.state is State.FAILED)


def test_15_the_numbers_of_a_stolen_director_key_go_with_it(cache: Cache) -> None:
    device = online(cache)
    thief = Publisher(dict(cache.publisher._named)).director(cache.repository)
    tell(device, thief.seal(TOPICS.desired(DEVICE), wish("v1", SEQUENCE_MAX), START_MS))
    assert device.record.desired_sequence == SEQUENCE_MAX
    ask_for(device, "v2")
    assert device.answer() == digest_of(V1)  # blocked, until people take the key away
    rotated(cache, "director")
    cache.desire_again()
    ask_again(device)
    assert (device.answer(), device.record.desired_sequence) == (digest_of(V2), 1)
    device.now_ms += LOOK_PERIOD_MS
    tell(device, thief.seal(TOPICS.desired(DEVICE), wish("v1", SEQUENCE_MAX - 1), device.now_ms))
    device.settle()
    assert (device.answer(), alarm(device)) == (digest_of(V2), "trust.director")


def test_15_a_wish_of_a_director_that_was_replaced_meanwhile_is_refused(cache: Cache) -> None:
    """The device has not heard of it: the metadata that the update itself brings says so."""
    device = online(cache)
    old = cache.desire("v2", sequence=SEQUENCE_MAX)
    rotated(cache, "director")
    tell(device, old)
    device.settle()
    assert (device.state, reason(device)) == (State.REJECTED, "trust.director")
    assert (device.answer(), device.record.desired_sequence) == (digest_of(V1), 0)
    cache.desire("v2", sequence=1)
    ask_again(device)
    assert device.answer() == digest_of(V2)


def test_15_two_keys_of_the_director_count_while_they_are_exchanged(cache: Cache) -> None:
    device = online(cache)
    old = cache.publisher._named["director"]
    private, public = make_key(None)
    cache.publisher = Publisher(dict(cache.publisher._named) | {"second": private})
    added(cache, public)
    second = Publisher(dict(cache.publisher._named) | {"director": private}).director(cache.repository)
    first = cache.publisher.director(cache.repository)
    assert first.keyid == old.public_key.keyid
    tell(device, first.seal(TOPICS.desired(DEVICE), wish("v1", 5), START_MS))
    seconds = Publisher({"second": private}).director(cache.repository)
    assert seconds.keyid != first.keyid
    assert second.is_named
    tell(
        device, seconds.seal(TOPICS.desired(DEVICE), wish("v2", 5), START_MS)
    )  # not higher: one count for both
    device.settle()
    assert device.answer() == digest_of(V1)
    device.now_ms += LOOK_PERIOD_MS
    tell(device, seconds.seal(TOPICS.desired(DEVICE), wish("v2", 6), START_MS))
    device.settle()
    assert device.answer() == digest_of(V2)


def added(cache: Cache, public: bytes) -> None:
    """A second key for the director."""

    def change(draft: Draft) -> None:
        draft.assign("director", [*draft.keys("director"), public_key_of("second", public)], 1)

    documents = cache.publisher.change(cache.repository, {}, change, START_MS)
    cache.repository = cache.publisher.submit(cache.repository, documents, (), START_MS).repository
    cache.publish_metadata()


def test_a_power_cut_at_any_write_of_a_first_look_loses_no_wish(cache: Cache) -> None:
    rotated(cache, "director")
    for operations in range(1000):
        device = online(cache, has_looked=False)
        payload = cache.desire("v2", sequence=1)
        device.deliver(TOPICS.desired(DEVICE), payload)
        device.disk.operations_left = None
        if not device.settle_until_cut(operations):
            break
        if operations > 8:  # the look and what follows from it is over
            break
        device.boot()
        device.connect()
        device.settle()
        assert device.answer() == digest_of(V2), operations


# --- a fleet that has none yet


def without_director(seed: int = 3) -> Cache:
    """A repository as it was made before there were directors."""
    cache = Cache(seed)

    def change(draft: Draft) -> None:
        assert draft.targets.delegations is not None
        assert draft.targets.delegations.roles is not None
        del draft.targets.delegations.roles["director"]
        draft.changed.add("targets")

    documents = cache.publisher.change(cache.repository, {}, change, START_MS)
    repository = cache.publisher.submit(cache.repository, documents, (), START_MS).repository
    delegated = tuple(each for each in repository.documents.delegated if each[0] != "director")
    cache.repository = replace(repository, documents=replace(repository.documents, delegated=delegated))
    cache.publish("v1", V1)
    cache.publish("v2", V2)
    return cache


def test_a_fleet_without_a_director_goes_on_as_it_was() -> None:
    cache = without_director()
    assert cache.desire("v2") == encode_message(wish("v2", 1))
    device = online(cache, has_looked=False)
    ask_again(device)
    assert device.answer() == digest_of(V2)
    assert device.record.director == Director(is_named=False)


def test_once_there_is_a_director_nothing_counts_that_is_not_signed() -> None:
    cache = without_director()
    device = online(cache, has_looked=False)
    tell(
        device, encode_message(wish("v1", SEQUENCE_MAX))
    )  # whoever speaks for the broker could block a device
    device.settle()
    assert device.record.desired_sequence == SEQUENCE_MAX
    draft_keys = {"director": cache.publisher._named["director"]}

    def change(draft: Draft) -> None:
        draft.assign("director", [draft_keys["director"].public_key], 1)

    documents = cache.publisher.change(cache.repository, {}, change, START_MS)
    cache.repository = cache.publisher.submit(cache.repository, documents, (), START_MS).repository
    cache.publish_metadata()
    cache.desire("v2")
    ask_again(device)
    assert (device.answer(), device.record.desired_sequence) == (digest_of(V2), 1)
    device.now_ms += LOOK_PERIOD_MS
    tell(device, encode_message(wish("v1", SEQUENCE_MAX)))
    device.settle()
    assert (device.answer(), alarm(device)) == (digest_of(V2), "trust.director")


def test_a_wish_that_was_not_signed_is_refused_by_the_update_that_learns_of_a_director() -> None:
    cache = without_director()
    device = online(cache, has_looked=False)
    tell(device, encode_message(wish("v1", 1)))
    device.settle()
    assert device.record.director == Director(is_named=False)

    def change(draft: Draft) -> None:
        draft.assign("director", [cache.publisher._named["director"].public_key], 1)

    documents = cache.publisher.change(cache.repository, {}, change, START_MS)
    cache.repository = cache.publisher.submit(cache.repository, documents, (), START_MS).repository
    cache.publish_metadata()
    tell(device, encode_message(wish("v2", 2)))
    device.settle()
    assert (device.state, reason(device), device.answer()) == (
        State.REJECTED,
        "trust.director",
        digest_of(V1),
    )


# --- time


def frozen(cache: Cache, device: Device, now_ms: int) -> None:
    """The broker shows what there was; a server says what time it is."""
    cache.server_ms = now_ms
    device.has_server()


def test_8_frozen_metadata_is_refused_by_a_device_without_a_clock_that_has_not_looked_for_months(
    cache: Cache,
) -> None:
    """It was sold with v1 and lay on a shelf: nothing that it knows says that what it is shown has ended."""
    device = online(cache, 0)
    assert device.record.floors.time_ms == 0
    frozen(cache, device, START_MS + 100 * DAY_MS)
    ask_for(device, "v2")
    assert (device.state, reason(device), device.answer()) == (State.FAILED, "trust.expired", digest_of(V1))
    published_again(cache, cache.server_ms)
    device.settle()
    assert (device.answer(), device.now_ms < YEAR_MS) == (digest_of(V2), True)
    assert device.record.floors.time_ms == cache.server_ms


def test_8_the_release_that_was_withdrawn_meanwhile_is_not_installed(cache: Cache) -> None:
    device = online(cache, 0)
    old = dict(cache.retained)
    cache.retire("releases/digits/v2.json")
    published_again(cache, START_MS + 100 * DAY_MS)
    cache.retained |= {topic: data for topic, data in old.items() if "/md/" in topic}
    cache.desire("v2")
    ask_again(device)
    assert (device.state, device.answer()) == (State.FAILED, digest_of(V1))


@pytest.mark.parametrize("clock", ["1970", "behind", "ahead", "ahead and trusted", "frozen", "backwards"])
def test_27_28_29_no_clock_is_so_wrong_that_something_old_is_installed(cache: Cache, clock: str) -> None:
    """The broker shows an old repository; in the end it shows the new one."""
    later_ms = START_MS + 100 * DAY_MS
    now_ms = {"ahead": later_ms + 10 * YEAR_MS, "ahead and trusted": later_ms + 10 * YEAR_MS, "1970": 0}
    device = online(cache, now_ms.get(clock, START_MS), is_clock_set=clock == "ahead and trusted")
    cache.server_ms = later_ms
    for step in range(3):
        cache.desire("v2", sequence=1 + step)
        if clock == "backwards":
            device.now_ms -= 10 * DAY_MS
            device.boot()
            device.connect()
        if clock == "frozen":
            device.deliver(TOPICS.desired(DEVICE), cache.retained[TOPICS.desired(DEVICE)])
            while device.step():
                pass
        else:
            ask_again(device)
        assert device.answer() == digest_of(V1)
        assert not device.engine.trials
    published_again(cache, later_ms)
    cache.desire("v2", sequence=9)
    ask_again(device)
    assert device.answer() == digest_of(V1 if clock == "ahead and trusted" else V2)


def test_27_a_replayed_answer_about_the_time_is_refused(cache: Cache) -> None:
    device = online(cache, 0)
    answers: list[bytes] = []

    def overhear(_topic: str, payload: bytes) -> None:
        data = cache.answer(payload)
        assert data is not None
        answers.append(data)
        device.deliver(TOPICS.metadata_answer(DEVICE), answers[0])  # always the first

    device.answer_requests = overhear
    ask_for(device, "v2")
    assert device.answer() == digest_of(V2)
    cache.server_ms = START_MS + 100 * DAY_MS  # what is published has ended
    cache.publish("v3", V3)
    ask_for(device, "v3")
    assert (device.state, reason(device), device.answer()) == (
        State.FAILED,
        "trust.unverified",
        digest_of(V2),
    )
    assert len({each.nonce for each in requests(device)}) == len(requests(device)) > 8


@pytest.mark.parametrize("stranger", ["other key", "other device", "other fleet", "director", "none"])
def test_27_the_time_from_a_stranger_is_refused(cache: Cache, stranger: str) -> None:
    device, other = online(cache, 0), Cache(5)
    topics = {
        "other device": Topics(FLEET).metadata_answer(DeviceId("device-2")),
        "other fleet": Topics(FleetId("other-fleet")).metadata_answer(DEVICE),
    }

    def answer(_topic: str, payload: bytes) -> None:
        data = cache.answer(payload)
        assert data is not None
        bundle = decode_message(MetadataBundle, data)
        request = decode_request(payload)
        assert isinstance(request, MetadataRequest)
        topic = topics.get(stranger, TOPICS.metadata_answer(DEVICE))
        signer = cache.publisher.director(cache.repository)
        if stranger == "other key":
            signer = other.publisher.director(other.repository)
        time = signer.attest(topic, request.nonce, START_MS)
        assert time is not None
        if stranger == "director":
            key = cache.publisher._named["director"]
            signature = key.sign(time_statement(topic, request.nonce, START_MS)).signature
            time = replace(time, signatures={key.public_key.keyid: signature})
        forged = replace(bundle, time=None if stranger == "none" else time)
        device.deliver(TOPICS.metadata_answer(DEVICE), encode_message(forged))

    device.answer_requests = answer
    ask_for(device, "v2")
    code = "trust.no_time" if stranger == "none" else "trust.unverified"
    assert (device.state, reason(device), device.answer()) == (State.FAILED, code, digest_of(V1))
    assert device.record.floors.time_ms == 0


def test_27_a_device_with_a_right_clock_asks_nobody(cache: Cache) -> None:
    device = online(cache)
    ask_for(device, "v2")
    assert (device.answer(), requests(device)) == (digest_of(V2), [])


def test_28_a_clock_that_is_behind_what_was_signed_is_not_believed(cache: Cache) -> None:
    device = online(cache, START_MS - CLOCK_BEHIND_MS_MAX - 1)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: device.state is State.ADMITTING)
    assert requests(device) == []  # only now does it know better
    device.settle()
    assert device.answer() == digest_of(V2)
    assert [len(request.nonce) for request in requests(device)] == [16]


def test_9_an_installation_does_not_begin_on_metadata_that_is_believed_because_the_clock_stands_still(
    cache: Cache,
) -> None:
    device = online(cache, 0)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: device.state is State.DOWNLOADING)
    device.disconnect()
    while device.step():
        pass
    cache.retire("releases/digits/v2.json")
    published_again(cache, START_MS + 100 * DAY_MS)  # and the device's clock shows what it showed
    device.connect()
    device.settle()
    assert (device.state, device.answer()) == (State.FAILED, digest_of(V1))
    assert device.engine.trials == []


def test_9_a_download_that_outlives_its_metadata_looks_again_before_anything_is_installed(
    cache: Cache,
) -> None:
    device = online(cache)
    device.deliver(TOPICS.desired(DEVICE), cache.desire("v2"))
    device.settle(until=lambda: device.state is State.DOWNLOADING)
    device.now_ms += 100 * DAY_MS  # a slow link that never broke
    cache.retire("releases/digits/v2.json")
    published_again(cache, device.now_ms)
    device.settle()
    assert (device.state, device.answer()) == (State.FAILED, digest_of(V1))
    assert device.engine.trials == []


def test_15_a_director_that_is_replaced_twice_in_a_row_is_followed_at_once(cache: Cache) -> None:
    """Looks are rationed for the sake of forged wishes; one that was worth it keeps none waiting."""
    device = online(cache)
    cache.publish("v3", V3)
    begun_ms = device.now_ms
    for version, data in (("v2", V2), ("v3", V3)):
        rotated(cache, "director")
        cache.desire(version)
        tell(device, cache.retained[TOPICS.desired(DEVICE)])
        device.settle()
        assert (device.answer(), alarm(device)) == (digest_of(data), "")
    assert device.now_ms - begun_ms < LOOK_PERIOD_MS
