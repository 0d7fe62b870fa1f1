"""The server's side of wishes and of the time: who signs, with which keys, and when again."""

import dataclasses

import pytest

from protocol.director import DESIRED_LIFE_MS, received_statement, time_statement
from protocol.errors import MissingKeyError, RequestError, TrustError
from protocol.ids import DeviceId, FleetId
from protocol.messages import Desired, UpdateReport, decode_desired, encode_message
from protocol.topics import Topics
from protocol.trust import Floors, is_signed, verify, verify_time
from server.coordinator import WISH_PERIOD_MS
from server.effects import PublishDesired
from server.events import BrokerConnected, DeadlineReached, MetadataChanged, ReportReceived
from server.ports import Repository
from server.releases.metadata import Draft
from server.releases.publisher import Publisher
from server.releases.signers import make_key, public_key_of
from simulator.models import publisher_of
from tests.server.samples import NOW_MS, report
from tests.server.transcript import Play

DEVICE = DeviceId("a")
TOPICS = Topics(FleetId("lab"))
WISH = Desired(sequence=3, rollout="r1", family="digits", version="v2")


@pytest.fixture(scope="module")
def publisher() -> Publisher:
    return publisher_of(1)


@pytest.fixture(scope="module")
def repository(publisher: Publisher) -> Repository:
    return publisher.create(NOW_MS).repository


def test_a_wish_is_signed_with_a_key_that_devices_know_from_the_metadata(
    publisher: Publisher, repository: Repository
) -> None:
    verified = verify(repository.roots[0], repository.documents, Floors(), NOW_MS)
    director = publisher.director(repository)
    assert verified.director == (director.public,)
    topic = TOPICS.desired(DEVICE)
    payload = director.seal(topic, WISH, NOW_MS)
    received = decode_desired(payload)
    assert (received.desired, received.signed_ms, received.expires_ms) == (
        WISH,
        NOW_MS,
        NOW_MS + DESIRED_LIFE_MS,
    )
    assert is_signed(director.public, received_statement(topic, received), received.signature)
    assert not is_signed(
        director.public, received_statement(TOPICS.desired(DeviceId("b")), received), received.signature
    )
    assert len(payload) - len(encode_message(WISH)) < 200


def test_a_server_without_the_key_of_the_director_asks_nobody(repository: Repository) -> None:
    director = Publisher({}).director(repository)
    assert director.is_named
    with pytest.raises(MissingKeyError, match="director"):
        director.seal(TOPICS.desired(DEVICE), WISH, NOW_MS)
    assert director.attest(TOPICS.metadata_answer(DEVICE), b"n" * 16, NOW_MS) is None


def test_the_time_is_signed_for_one_question_with_the_keys_of_the_timestamp(
    publisher: Publisher, repository: Repository
) -> None:
    topic, root = TOPICS.metadata_answer(DEVICE), repository.roots[0]
    director = publisher.director(repository)
    time = director.attest(topic, b"n" * 16, NOW_MS)
    assert time is not None
    verify_time(root, time_statement(topic, b"n" * 16, NOW_MS), time.signatures)
    for statement in (
        time_statement(topic, b"m" * 16, NOW_MS),
        time_statement(topic, b"n" * 16, NOW_MS + 1),
        time_statement(TOPICS.metadata_answer(DeviceId("b")), b"n" * 16, NOW_MS),
    ):
        with pytest.raises(TrustError):
            verify_time(root, statement, time.signatures)
    for signatures in ({}, {"": ""}, dict.fromkeys(time.signatures, "00"), {"x": "ab" * 64}):
        with pytest.raises(TrustError):
            verify_time(root, time_statement(topic, b"n" * 16, NOW_MS), signatures)
    assert director.attest(topic, b"", NOW_MS) is None  # nobody asked


def test_the_director_has_ed25519_keys_and_one_signature(
    publisher: Publisher, repository: Repository
) -> None:
    keys = [public_key_of(str(number), make_key(None)[1]) for number in range(9)]
    for given, threshold, said in ((keys[:2], 2, "one key signs"), (keys, 1, "9 keys")):
        with pytest.raises(RequestError, match=said):
            Draft(repository, {}).assign("director", given, threshold)
    draft = Draft(repository, {})
    draft.assign("director", [publisher._named[name].public_key for name in ("director", "artifacts")], 1)
    draft.targets.delegations.roles["director"].threshold = 2  # type: ignore[union-attr,index]  # by other means
    documents = draft.sign(publisher._signers, NOW_MS)
    published = publisher.submit(repository, documents, (), NOW_MS).repository
    assert verify(published.roots[0], published.documents, Floors(), NOW_MS).director == ()


def asked(play: Play) -> list[str]:
    return sorted(effect.device for effect in play.last_effects if isinstance(effect, PublishDesired))


def under_way() -> Play:
    """Devices a and b were asked, c was not; a has answered."""
    play = Play()
    play.play(
        """
        > report a 1
        > report b 1
        > rollout r1 2 canary=2
        > built 1-2 1000
        > signed
        > report a 2 committed r1
        """
    )
    done = UpdateReport(rollout="r1", sequence=1, version="2", outcome="committed", finished_ms=NOW_MS)
    play.happen(ReportReceived(DEVICE, report("a", 1 << 40, "2", done)))
    return play


def test_wishes_that_wait_are_signed_anew_before_they_end() -> None:
    play = under_way()
    play.happen(BrokerConnected())
    assert asked(play) == ["a", "b"]
    assert WISH_PERIOD_MS * 3 < DESIRED_LIFE_MS
    play.now_ms += WISH_PERIOD_MS
    deadline = play.coordinator.deadline()
    assert deadline is not None
    assert deadline <= play.now_ms
    play.happen(DeadlineReached())
    assert asked(play) == ["b"]  # the other one has answered


def test_every_wish_is_signed_anew_once_another_key_speaks_for_the_director() -> None:
    play = under_way()
    catalog = play.coordinator.catalog
    play.happen(MetadataChanged(catalog))
    assert asked(play) == []
    play.happen(MetadataChanged(dataclasses.replace(catalog, director="another")))
    assert asked(play) == ["a", "b"]
