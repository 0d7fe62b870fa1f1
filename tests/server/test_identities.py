"""Every decision about claims and certificates, without a broker and without a clock."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from protocol.errors import ForgedReportError, RequestError
from protocol.identity import PrivateKey, certificate_request, make_key, public_der, seal_report
from protocol.ids import ClaimId, DeviceId, FleetId
from protocol.messages import CertificateRequest, Report, encode_message
from protocol.topics import Topics
from server.adapters.authority import Authority
from server.adapters.keys import KeyFolder
from server.adapters.store import SqlStore
from server.fleet.identities import (
    KEEP_MS,
    CertificateRecord,
    CertificateRemoval,
    ClaimRecord,
    ClaimRemoval,
    EarlyRenewalError,
    EnrolmentError,
    ExpiredClaimError,
    Identities,
    IdentityRecord,
    Issue,
    UnknownClaimError,
    UsedClaimError,
    WrongKeyError,
    WrongNameError,
    accept,
    answer,
    open_claim,
    refuse,
    renew,
    revoke,
    use_claim,
)
from server.identity import issuer
from server.releases.publisher import Publisher

NOW_MS = 1_800_000_000_000
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
DEVICE, OTHER = DeviceId("shelf-7"), DeviceId("shelf-8")
CLAIM = ClaimId("0123456789abcdef")
TOPICS = Topics(FleetId("lab"))
CLAIM_TOPIC, RENEWAL_TOPIC = TOPICS.claim_request(CLAIM), TOPICS.renewal(DEVICE)
REPORT_TOPIC = TOPICS.report(DEVICE)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("authority") / "ca")
    authority.create(FleetId("lab"), NOW_MS)
    return authority


@pytest.fixture
def issue(authority: Authority) -> Issue:
    return issuer(authority, NOW_MS, 90)


class Book:
    """How things stand, and what changes it."""

    def __init__(self) -> None:
        self.records: dict[object, IdentityRecord] = {}
        self.claim_key = make_key()
        self.key = make_key()

    @property
    def now(self) -> Identities:
        claims = [record for record in self.records.values() if isinstance(record, ClaimRecord)]
        certificates = [record for record in self.records.values() if isinstance(record, CertificateRecord)]
        return Identities(claims, certificates)

    def take(self, records: list[IdentityRecord]) -> "Book":
        for record in records:
            match record:
                case ClaimRecord():
                    self.records[record.claim] = record
                case CertificateRecord():
                    self.records[record.serial] = record
                case ClaimRemoval():
                    del self.records[record.claim]
                case CertificateRemoval():
                    del self.records[record.serial]
        return self

    def claim(self, device: DeviceId = DEVICE, number: ClaimId = CLAIM) -> ClaimRecord:
        public = public_der(self.claim_key.public_key())
        return ClaimRecord(
            claim=number, device=device, public_key=public, created_ms=NOW_MS, expires_ms=NOW_MS + HOUR_MS
        )

    def request(
        self,
        signer: PrivateKey | None = None,
        *,
        key: PrivateKey | None = None,
        name: DeviceId = DEVICE,
        topic: str = CLAIM_TOPIC,
    ) -> CertificateRequest:
        return certificate_request(name, key or self.key, signer or self.claim_key, topic)


@pytest.fixture
def book() -> Book:
    """A server that gave one claim."""
    book = Book()
    return book.take(open_claim(book.now, DEVICE, book.claim, NOW_MS))


@pytest.fixture
def enrolled(book: Book, issue: Issue) -> Book:
    """And that has given a certificate for it."""
    book.take(use_claim(book.now, CLAIM, book.request(), CLAIM_TOPIC, NOW_MS))
    return book.take(accept(book.now, DEVICE, issue, NOW_MS))


def test_a_claim_waits_for_an_operator_who_gives_a_certificate_for_the_key_that_was_asked_about(
    book: Book, issue: Issue
) -> None:
    book.take(use_claim(book.now, CLAIM, book.request(), CLAIM_TOPIC, NOW_MS))
    (waiting,) = book.now.pending(NOW_MS)
    assert waiting.device == DEVICE
    assert not book.now.of_device(DEVICE)
    book.take(accept(book.now, DEVICE, issue, NOW_MS, waiting.fingerprint))
    (record,) = book.now.valid(DEVICE, NOW_MS)
    assert public_der(record.public_key) == public_der(book.key.public_key())
    assert not book.now.pending(NOW_MS)
    given = answer(book.now, record.key)
    assert given is not None
    assert given.certificate == record.certificate


def test_the_same_request_again_changes_nothing(enrolled: Book) -> None:
    assert use_claim(enrolled.now, CLAIM, enrolled.request(), CLAIM_TOPIC, NOW_MS) == []


@pytest.mark.parametrize(
    ("error", "number", "signer", "key", "name", "at_ms"),
    [
        (UnknownClaimError, "f" * 16, None, None, DEVICE, NOW_MS),
        (WrongKeyError, CLAIM, make_key(), None, DEVICE, NOW_MS),
        (WrongNameError, CLAIM, None, None, OTHER, NOW_MS),
        (ExpiredClaimError, CLAIM, None, None, DEVICE, NOW_MS + HOUR_MS),
    ],
)
def test_a_claim_is_refused_with_a_reason(
    book: Book,
    error: type[EnrolmentError],
    number: str,
    signer: PrivateKey | None,
    key: PrivateKey | None,
    name: DeviceId,
    at_ms: int,
) -> None:
    request = book.request(signer, key=key, name=name)
    with pytest.raises(error):
        use_claim(book.now, ClaimId(number), request, CLAIM_TOPIC, at_ms)


def test_a_request_that_was_made_for_another_claim_is_refused(book: Book) -> None:
    request = book.request(topic=TOPICS.claim_request(ClaimId("a" * 16)))
    with pytest.raises(WrongKeyError):
        use_claim(book.now, CLAIM, request, CLAIM_TOPIC, NOW_MS)


def test_a_claim_is_good_for_one_key(book: Book, issue: Issue) -> None:
    book.take(use_claim(book.now, CLAIM, book.request(), CLAIM_TOPIC, NOW_MS))
    with pytest.raises(UsedClaimError):
        use_claim(book.now, CLAIM, book.request(key=make_key()), CLAIM_TOPIC, NOW_MS)
    book.take(accept(book.now, DEVICE, issue, NOW_MS))
    with pytest.raises(UsedClaimError):
        use_claim(book.now, CLAIM, book.request(key=make_key()), CLAIM_TOPIC, NOW_MS)


def test_a_device_that_has_a_certificate_or_waits_for_one_gets_no_second_claim(
    book: Book, issue: Issue
) -> None:
    book.take(use_claim(book.now, CLAIM, book.request(), CLAIM_TOPIC, NOW_MS))
    with pytest.raises(RequestError, match="has asked for a certificate"):
        open_claim(book.now, DEVICE, book.claim, NOW_MS)
    book.take(accept(book.now, DEVICE, issue, NOW_MS))
    with pytest.raises(RequestError, match="has a certificate"):
        open_claim(book.now, DEVICE, book.claim, NOW_MS)
    book.take(revoke(book.now, DEVICE, "device", NOW_MS))
    assert open_claim(book.now, DEVICE, book.claim, NOW_MS)


def test_claims_do_not_pile_up(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.fleet.identities.CLAIMS_OPEN_MAX", 1)
    with pytest.raises(RequestError, match="1 claims are open, allowed are 1"):
        open_claim(book.now, OTHER, lambda: book.claim(OTHER, ClaimId("b" * 16)), NOW_MS)
    assert open_claim(book.now, OTHER, lambda: book.claim(OTHER, ClaimId("b" * 16)), NOW_MS + HOUR_MS)


def test_a_new_claim_voids_the_one_before(book: Book) -> None:
    book.take(open_claim(book.now, DEVICE, lambda: book.claim(number=ClaimId("b" * 16)), NOW_MS))
    with pytest.raises(EnrolmentError, match="withdrawn"):
        use_claim(book.now, CLAIM, book.request(), CLAIM_TOPIC, NOW_MS)


def test_what_the_operator_refuses_is_refused(book: Book, issue: Issue) -> None:
    book.take(use_claim(book.now, CLAIM, book.request(), CLAIM_TOPIC, NOW_MS))
    book.take(refuse(book.now, DEVICE, NOW_MS))
    with pytest.raises(EnrolmentError, match="refused"):
        use_claim(book.now, CLAIM, book.request(), CLAIM_TOPIC, NOW_MS)
    with pytest.raises(RequestError, match="waits for no certificate"):
        accept(book.now, DEVICE, issue, NOW_MS)


def test_an_operator_who_expects_another_key_is_told(book: Book, issue: Issue) -> None:
    book.take(use_claim(book.now, CLAIM, book.request(), CLAIM_TOPIC, NOW_MS))
    with pytest.raises(RequestError, match="and not 0000-"):
        accept(book.now, DEVICE, issue, NOW_MS, "0000-1111")


def test_a_certificate_is_renewed_on_the_word_of_the_present_one(enrolled: Book, issue: Issue) -> None:
    new, later_ms = make_key(), NOW_MS + 60 * DAY_MS
    request = enrolled.request(enrolled.key, key=new, topic=RENEWAL_TOPIC)
    enrolled.take(renew(enrolled.now, DEVICE, request, RENEWAL_TOPIC, issue, later_ms))
    assert len(enrolled.now.valid(DEVICE, later_ms)) == 2
    assert renew(enrolled.now, DEVICE, request, RENEWAL_TOPIC, issue, later_ms) == []


@pytest.mark.parametrize("days", [0, 44])
def test_a_renewal_before_half_of_the_life_is_refused(enrolled: Book, issue: Issue, days: int) -> None:
    request = enrolled.request(enrolled.key, key=make_key(), topic=RENEWAL_TOPIC)
    with pytest.raises(EarlyRenewalError):
        renew(enrolled.now, DEVICE, request, RENEWAL_TOPIC, issue, NOW_MS + days * DAY_MS)


def test_a_renewal_without_a_valid_certificate_is_refused(enrolled: Book, issue: Issue) -> None:
    at_ms = NOW_MS + 60 * DAY_MS
    own = enrolled.request(enrolled.key, key=make_key(), topic=RENEWAL_TOPIC)
    for signer in (make_key(), enrolled.claim_key):
        forged = enrolled.request(signer, key=make_key(), topic=RENEWAL_TOPIC)
        with pytest.raises(WrongKeyError):
            renew(enrolled.now, DEVICE, forged, RENEWAL_TOPIC, issue, at_ms)
    with pytest.raises(WrongKeyError):  # on the word of another device
        renew(enrolled.now, OTHER, own, TOPICS.renewal(OTHER), issue, at_ms)
    request = enrolled.request(enrolled.key, key=make_key(), name=OTHER, topic=RENEWAL_TOPIC)
    with pytest.raises(WrongNameError):
        renew(enrolled.now, DEVICE, request, RENEWAL_TOPIC, issue, at_ms)
    with pytest.raises(WrongKeyError):  # expired
        renew(enrolled.now, DEVICE, own, RENEWAL_TOPIC, issue, NOW_MS + 91 * DAY_MS)
    enrolled.take(revoke(enrolled.now, DEVICE, "device", at_ms))
    with pytest.raises(WrongKeyError):
        renew(enrolled.now, DEVICE, own, RENEWAL_TOPIC, issue, at_ms)


def test_what_is_revoked_is_named_until_the_device_has_something_valid_again(
    enrolled: Book, issue: Issue
) -> None:
    assert enrolled.now.barred(NOW_MS) == []
    enrolled.take(revoke(enrolled.now, DEVICE, "device", NOW_MS + 1))
    (record,) = enrolled.now.of_device(DEVICE)
    assert enrolled.now.revoked(NOW_MS) == [(record.serial, NOW_MS + 1)]
    assert enrolled.now.revoked(NOW_MS + 91 * DAY_MS) == []
    assert enrolled.now.barred(NOW_MS) == [DEVICE]
    assert answer(enrolled.now, record.key) is None
    with pytest.raises(RequestError, match="no valid certificate and no claim"):
        revoke(enrolled.now, DEVICE, "device", NOW_MS)
    enrolled.take([issue(DEVICE, make_key().public_key())])
    assert enrolled.now.barred(NOW_MS) == []


def test_a_device_that_is_called_like_the_broker_is_not_barred_with_it(book: Book, issue: Issue) -> None:
    broker = replace(issue(DeviceId("broker"), make_key().public_key()), role="broker", revoked_ms=NOW_MS)
    book.take([broker])
    assert book.now.barred(NOW_MS) == []
    assert book.now.of_device(DeviceId("broker")) == []


def report(device: DeviceId = DEVICE) -> bytes:
    return encode_message(Report(device=device, sequence=1, state="idle", family="digits"))


def check(book: Book, payload: bytes, at_ms: int = NOW_MS, *, is_strict: bool = False) -> Report:
    return book.now.checked_report(DEVICE, REPORT_TOPIC, payload, at_ms, is_strict=is_strict)


def test_a_report_counts_if_a_valid_certificate_of_its_device_signed_it(enrolled: Book, issue: Issue) -> None:
    assert check(enrolled, seal_report(enrolled.key, REPORT_TOPIC, report())).device == DEVICE
    enrolled.take([issue(OTHER, make_key().public_key())])
    for forged in (
        report(),
        seal_report(make_key(), REPORT_TOPIC, report()),
        seal_report(enrolled.key, TOPICS.report(OTHER), report()),
    ):
        with pytest.raises(ForgedReportError):
            check(enrolled, forged)
    with pytest.raises(ForgedReportError):
        check(enrolled, seal_report(enrolled.key, REPORT_TOPIC, report()), NOW_MS + 91 * DAY_MS)


def test_both_keys_of_a_renewal_may_speak_until_the_old_one_expires(enrolled: Book, issue: Issue) -> None:
    new = make_key()
    enrolled.take([replace(issue(DEVICE, new.public_key()), expires_ms=NOW_MS + 150 * DAY_MS)])
    for key, days, is_good in (
        (enrolled.key, 89, True),
        (new, 89, True),
        (enrolled.key, 91, False),
        (new, 91, True),
    ):
        payload = seal_report(key, REPORT_TOPIC, report())
        if is_good:
            assert check(enrolled, payload, NOW_MS + days * DAY_MS).device == DEVICE
        else:
            with pytest.raises(ForgedReportError):
                check(enrolled, payload, NOW_MS + days * DAY_MS)


def test_a_device_that_never_had_a_certificate_is_believed_only_where_nobody_needs_one(book: Book) -> None:
    assert check(book, report()).device == DEVICE
    with pytest.raises(ForgedReportError, match="without a signature"):
        check(book, report(), is_strict=True)
    with pytest.raises(ForgedReportError, match="no valid certificate"):
        check(book, seal_report(make_key(), REPORT_TOPIC, report()), is_strict=True)


def test_what_has_expired_is_forgotten_after_a_while(enrolled: Book, authority: Authority) -> None:
    (old,) = enrolled.now.of_device(DEVICE)
    late_ms = old.expires_ms + KEEP_MS + 1
    new = make_key()
    enrolled.take([replace(issuer(authority, late_ms - 60 * DAY_MS, 90)(DEVICE, new.public_key()))])
    request = enrolled.request(new, key=make_key(), topic=RENEWAL_TOPIC)
    changes = renew(enrolled.now, DEVICE, request, RENEWAL_TOPIC, issuer(authority, late_ms, 90), late_ms)
    assert CertificateRemoval(serial=old.serial) in changes
    assert len(enrolled.take(changes).now.of_device(DEVICE)) == 2
    claims = open_claim(enrolled.now, OTHER, lambda: enrolled.claim(OTHER, ClaimId("c" * 16)), late_ms)
    assert ClaimRemoval(claim=CLAIM) in claims


def test_certificates_that_people_see_to_are_named_before_they_end(book: Book, authority: Authority) -> None:
    old = replace(issuer(authority, NOW_MS, 90)(DeviceId("b"), make_key().public_key()), role="broker")
    book.take([old, issuer(authority, NOW_MS, 1)(DEVICE, make_key().public_key())])
    assert book.now.expiring(NOW_MS, 60 * DAY_MS) == []
    assert book.now.expiring(NOW_MS + 40 * DAY_MS, 60 * DAY_MS) == [old]
    newer = issuer(authority, NOW_MS + 39 * DAY_MS, 90)(DeviceId("b"), make_key().public_key())
    book.take([replace(newer, role="broker")])
    assert book.now.expiring(NOW_MS + 40 * DAY_MS, 60 * DAY_MS) == []


def test_records_are_kept_by_the_store(enrolled: Book, tmp_path: Path) -> None:
    KeyFolder(tmp_path / "keys").create()
    store = SqlStore(f"sqlite:///{tmp_path / 'store.sqlite'}")
    store.create(Publisher(KeyFolder(tmp_path / "keys").load()).create(NOW_MS).repository)
    before = store.changes()
    after = store.change_identities(lambda known: list(enrolled.records.values()) if not known.claims else [])
    assert after.claims == store.identities().claims == enrolled.now.claims
    assert after.certificates == enrolled.now.certificates
    assert store.changes() == before + 1
    store.change_identities(lambda _: [])
    assert store.changes() == before + 1
    with pytest.raises(RequestError):
        store.change_identities(lambda known: refuse(known, DEVICE, NOW_MS))
    assert store.changes() == before + 1
    serials = [CertificateRemoval(serial=serial) for serial in after.certificates]
    emptied = store.change_identities(lambda _: [ClaimRemoval(claim=CLAIM), *serials])
    assert (emptied.claims, emptied.certificates) == ({}, {})
    store.close()
