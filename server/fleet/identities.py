"""Who may speak for which device: claims, certificates, and every decision about them (SPEC section 10). Pure.

A decision takes how things stand and gives the records that change, or an error that says why not; whoever calls it keeps
others from changing them meanwhile. Certificates are made by a function that is given, since that takes a key and entropy.
"""

from collections.abc import Callable, Iterable
from typing import Final, Literal

from cryptography import x509
from msgspec import Struct
from msgspec.structs import replace

from protocol.errors import ForgedReportError, RequestError, WhimbrelError
from protocol.identity import (
    PublicKey,
    fingerprint,
    is_report_signed,
    is_request_signed,
    key_digest,
    load_public,
    public_der,
    read_request,
)
from protocol.ids import ClaimId, DeviceId, Digest
from protocol.messages import CertificateAnswer, CertificateRequest, Report, decode_report

CLAIMS_OPEN_MAX: Final = 100_000
"""Claims that wait at a time; operators make them by script."""

DEVICE_DAYS: Final = 90
"""Life of a device's certificate, unless the settings say otherwise."""

KEEP_MS: Final = 90 * 24 * 3600 * 1000
"""How long is known of what has expired; then it goes, with the next claim or the next renewal."""

Role = Literal["device", "server", "broker"]
ClaimState = Literal["open", "pending", "accepted", "refused", "withdrawn"]


class ClaimRecord(Struct, frozen=True, kw_only=True):
    """Leave for one device to ask for its first certificate, once.

    Attributes:
        claim: Its number.
        device: Whom it is for.
        public_key: Of the claim; the private one is in what the operator was given.
        created_ms: When it was made.
        expires_ms: When it ends.
        state: What became of it.
        requested_key: For which the device asked for a certificate.
        requested_ms: When it did.
        serial: Of the certificate that came of it.
    """

    v: int = 1
    claim: ClaimId
    device: DeviceId
    public_key: bytes
    created_ms: int
    expires_ms: int
    state: ClaimState = "open"
    requested_key: bytes = b""
    requested_ms: int = 0
    serial: str = ""

    @property
    def fingerprint(self) -> str:
        """Of the key that the certificate will be for; the device printed it too."""
        return fingerprint(load_public(self.requested_key))


class CertificateRecord(Struct, frozen=True, kw_only=True):
    """A certificate that was issued.

    Attributes:
        serial: In hexadecimal.
        role: What it is for.
        name: The device, the server, or the first name of the broker.
        certificate: X.509, DER.
        key: SHA-256 of its public key.
        issued_ms: When.
        expires_ms: End of its life.
        revoked_ms: When it was revoked.
    """

    v: int = 1
    serial: str
    role: Role
    name: str
    certificate: bytes
    key: Digest
    issued_ms: int
    expires_ms: int
    revoked_ms: int | None = None

    @property
    def public_key(self) -> PublicKey:
        """Whose holder may speak under this name."""
        key = x509.load_der_x509_certificate(self.certificate).public_key()
        assert isinstance(key, PublicKey), "it was issued here"
        return key

    def is_valid(self, now_ms: int) -> bool:
        """Whether it opens anything."""
        return self.revoked_ms is None and now_ms < self.expires_ms


class ClaimRemoval(Struct, frozen=True, kw_only=True):
    """A claim that is of no interest any more."""

    claim: ClaimId


class CertificateRemoval(Struct, frozen=True, kw_only=True):
    """A certificate that is of no interest any more."""

    serial: str


IdentityRecord = ClaimRecord | CertificateRecord | ClaimRemoval | CertificateRemoval
Issue = Callable[[DeviceId, PublicKey], CertificateRecord]
"""Makes a certificate for a device."""


class EnrolmentError(WhimbrelError):
    """A certificate is not given, or not yet; the code is sent to the device."""

    code = "enroll.refused"


class UnknownClaimError(EnrolmentError):
    """This server gave no such claim."""

    code = "enroll.unknown"


class ExpiredClaimError(EnrolmentError):
    """The claim was good until a while ago."""

    code = "enroll.expired"


class UsedClaimError(EnrolmentError):
    """The claim was made good with another key."""

    code = "enroll.used"


class WrongKeyError(EnrolmentError):
    """The request was not signed with the key that allows it."""

    code = "enroll.wrong_key"


class WrongNameError(EnrolmentError):
    """The request is for another name than the claim, or than the present certificate."""

    code = "enroll.wrong_name"


class PendingError(EnrolmentError):
    """An operator has to accept it first."""

    code = "enroll.pending"


class UnavailableError(EnrolmentError):
    """The server cannot issue certificates at the moment."""

    code = "enroll.unavailable"


class EarlyRenewalError(EnrolmentError):
    """The present certificate is good for long enough."""

    code = "enroll.early"


class Identities:
    """Claims and certificates, and what follows from them.

    Args:
        claims: All.
        certificates: All.
    """

    def __init__(
        self, claims: Iterable[ClaimRecord] = (), certificates: Iterable[CertificateRecord] = ()
    ) -> None:
        self.claims: Final = {record.claim: record for record in claims}
        self.certificates: Final = {record.serial: record for record in certificates}
        self._of_device: dict[str, list[CertificateRecord]] = {}
        for record in self.certificates.values():
            if record.role == "device":
                self._of_device.setdefault(record.name, []).append(record)

    def of_device(self, device: DeviceId) -> list[CertificateRecord]:
        """All certificates that a device ever had."""
        return self._of_device.get(device, [])

    def valid(self, device: DeviceId, now_ms: int) -> list[CertificateRecord]:
        """Those with which it may speak now: one, or two around a renewal."""
        return [record for record in self.of_device(device) if record.is_valid(now_ms)]

    def pending(self, now_ms: int) -> list[ClaimRecord]:
        """Claims that wait for an operator, oldest first."""
        waiting = [
            claim for claim in self.claims.values() if claim.state == "pending" and now_ms < claim.expires_ms
        ]
        return sorted(waiting, key=lambda claim: claim.requested_ms)

    def servers(self, now_ms: int) -> list[str]:
        """Names of the servers that may speak to the broker."""
        valid = (record for record in self.certificates.values() if record.is_valid(now_ms))
        return sorted({record.name for record in valid if record.role == "server"})

    def revoked(self, now_ms: int) -> list[tuple[str, int]]:
        """Serial numbers of what was revoked and has not expired, and when it was."""
        return [
            (record.serial, record.revoked_ms)
            for record in self.certificates.values()
            if record.revoked_ms is not None and now_ms < record.expires_ms
        ]

    def expiring(self, now_ms: int, within_ms: int) -> list[CertificateRecord]:
        """The newest certificates of servers and brokers, where those end soon: people see to them."""
        newest: dict[tuple[Role, str], CertificateRecord] = {}
        for record in self.certificates.values():
            known = newest.get((record.role, record.name))
            if record.role != "device" and (known is None or known.issued_ms < record.issued_ms):
                newest[record.role, record.name] = record
        return [
            record
            for record in newest.values()
            if record.revoked_ms is None and record.expires_ms - now_ms < within_ms
        ]

    def barred(self, now_ms: int) -> list[str]:
        """Names that have nothing valid and something revoked: their open connections must fall silent."""
        clients = [record for record in self.certificates.values() if record.role != "broker"]
        valid = {record.name for record in clients if record.is_valid(now_ms)}
        return sorted({record.name for record in clients if record.revoked_ms is not None} - valid)

    def checked_report(
        self, device: DeviceId, topic: str, payload: bytes, now_ms: int, *, is_strict: bool
    ) -> Report:
        """A report that comes from whom it says.

        Args:
            device: Whose topic it arrived on.
            topic: That topic.
            payload: As it arrived.
            now_ms: The instant.
            is_strict: Refuse reports without a signature from devices that never had a certificate, too.

        Raises:
            ForgedReportError: It is not signed, or not with a certificate of that device which is valid now.
            MessageError: It is malformed.
        """
        received = decode_report(payload)
        if not self.of_device(device) and not is_strict:
            return received.report
        if not received.signature:
            raise ForgedReportError(f"{device}: a report without a signature")
        for record in self.valid(device, now_ms):
            if is_report_signed(record.public_key, topic, received.signed, received.signature):
                return received.report
        raise ForgedReportError(f"{device}: a report that no valid certificate of the device has signed")


def open_claim(
    identities: Identities, device: DeviceId, make: Callable[[], ClaimRecord], now_ms: int
) -> list[IdentityRecord]:
    """Let a device ask for its first certificate; claims for it that were not used are withdrawn.

    Raises:
        RequestError: It has a certificate, or has asked for one.
    """
    valid = identities.valid(device, now_ms)
    if valid:
        raise RequestError(
            f"{device} has a certificate", hint=f"revoke it first: `whimbrel devices revoke {device}`"
        )
    if any(claim.device == device for claim in identities.pending(now_ms)):
        raise RequestError(
            f"{device} has asked for a certificate",
            hint=f"`whimbrel devices accept {device}`, or `whimbrel devices refuse {device}`",
        )
    live = [
        claim for claim in identities.claims.values() if claim.state == "open" and now_ms < claim.expires_ms
    ]
    if len(live) >= CLAIMS_OPEN_MAX:
        raise RequestError(f"{len(live)} claims are open, allowed are {CLAIMS_OPEN_MAX}")
    withdrawn = [replace(claim, state="withdrawn") for claim in live if claim.device == device]
    forgotten = [
        ClaimRemoval(claim=claim.claim)
        for claim in identities.claims.values()
        if claim.expires_ms + KEEP_MS < now_ms
    ]
    return [*withdrawn, *forgotten, make()]


def use_claim(
    identities: Identities, number: ClaimId, request: CertificateRequest, topic: str, now_ms: int
) -> list[IdentityRecord]:
    """A device makes its claim good; from then on it waits for an operator.

    Returns:
        What changes; nothing where it asks again for the same.

    Raises:
        EnrolmentError: Why there is no certificate, or not yet; `answered` makes an answer of it.
        MessageError: The request is malformed.
    """
    claim = identities.claims.get(number)
    if claim is None:
        raise UnknownClaimError("this server gave no such claim", hint="`whimbrel devices claim` gives one")
    if not is_request_signed(request, topic, load_public(claim.public_key)):
        raise WrongKeyError("the request is not signed with the key of the claim")
    requested = read_request(request.csr)
    if claim.requested_key not in {b"", public_der(requested.key)}:
        raise UsedClaimError("this claim was used with another key", hint="ask for a new one")
    if claim.state == "accepted":
        return []
    if claim.state in {"refused", "withdrawn"}:
        raise EnrolmentError(f"the claim was {claim.state}", hint="ask the operator for a new one")
    if now_ms >= claim.expires_ms:
        raise ExpiredClaimError("the claim has expired", hint="ask the operator for a new one")
    if claim.state == "pending":
        return []
    if requested.name != claim.device:
        raise WrongNameError(f"the claim is for {claim.device}, and not for {requested.name[:80]!r}")
    key = public_der(requested.key)
    return [replace(claim, state="pending", requested_key=key, requested_ms=now_ms)]


def accept(
    identities: Identities, device: DeviceId, issue: Issue, now_ms: int, expected: str = ""
) -> list[IdentityRecord]:
    """An operator gives a device the certificate that it waits for.

    Args:
        identities: How things stand.
        device: Which.
        issue: Makes the certificate.
        now_ms: The instant.
        expected: Fingerprint that the device printed; empty where a person has compared it.

    Raises:
        RequestError: It waits for none, or its key is another one.
    """
    claim = waiting_claim(identities, device, now_ms)
    if expected and expected != claim.fingerprint:
        raise RequestError(
            f"the key of {device} has the fingerprint {claim.fingerprint}, and not {expected[:80]}",
            hint="someone else may have used the claim: refuse it, and give the device a new one",
        )
    certificate = issue(device, load_public(claim.requested_key))
    return [replace(claim, state="accepted", serial=certificate.serial), certificate]


def refuse(identities: Identities, device: DeviceId, now_ms: int) -> list[IdentityRecord]:
    """An operator does not give it.

    Raises:
        RequestError: The device waits for none.
    """
    return [replace(waiting_claim(identities, device, now_ms), state="refused")]


def waiting_claim(identities: Identities, device: DeviceId, now_ms: int) -> ClaimRecord:
    """The claim with which a device waits.

    Raises:
        RequestError: It does not.
    """
    for claim in identities.pending(now_ms):
        if claim.device == device:
            return claim
    raise RequestError(f"{device} waits for no certificate", hint="see `whimbrel devices pending`")


def renew(
    identities: Identities,
    device: DeviceId,
    request: CertificateRequest,
    topic: str,
    issue: Issue,
    now_ms: int,
) -> list[IdentityRecord]:
    """Give a device its next certificate, on the word of the present one.

    Returns:
        What changes; nothing where it asks again for what it was given.

    Raises:
        EnrolmentError: The device has no valid certificate, did not sign with its key, or is too early.
        MessageError: The request is malformed.
    """
    valid = identities.valid(device, now_ms)
    if not any(is_request_signed(request, topic, record.public_key) for record in valid):
        raise WrongKeyError("the request is not signed with a valid certificate of this device")
    requested = read_request(request.csr)
    if requested.name != device:
        raise WrongNameError(f"{device} asks for a certificate for {requested.name[:80]!r}")
    if any(record.key == key_digest(requested.key) for record in valid):
        return []
    newest = max(valid, key=lambda record: record.issued_ms)
    if now_ms - newest.issued_ms < (newest.expires_ms - newest.issued_ms) // 2:
        raise EarlyRenewalError("half of the life of the present certificate is not over")
    forgotten = [
        CertificateRemoval(serial=record.serial)
        for record in identities.of_device(device)
        if record.expires_ms + KEEP_MS < now_ms
    ]
    return [issue(device, requested.key), *forgotten]


def revoke(identities: Identities, name: str, role: Role, now_ms: int) -> list[IdentityRecord]:
    """Let a name speak no longer; its claims end too.

    Raises:
        RequestError: There is nothing to revoke.
    """
    changed: list[IdentityRecord] = [
        replace(record, revoked_ms=now_ms)
        for record in identities.certificates.values()
        if (record.name, record.role) == (name, role) and record.is_valid(now_ms)
    ]
    if role == "device":
        changed += [
            replace(claim, state="withdrawn")
            for claim in identities.claims.values()
            if claim.device == name and claim.state in {"open", "pending"}
        ]
    if not changed:
        raise RequestError(
            f"{name} has no valid certificate and no claim", hint="see `whimbrel devices certificates`"
        )
    return changed


def answer(identities: Identities, key: Digest) -> CertificateAnswer | None:
    """The valid certificate for a key; nothing where there is none."""
    for record in identities.certificates.values():
        if record.key == key and record.revoked_ms is None:
            return CertificateAnswer(key=key, certificate=record.certificate)
    return None


def refusal(key: Digest, error: EnrolmentError) -> CertificateAnswer:
    """Tell a device why there is no certificate, or not yet."""
    return CertificateAnswer(key=key, code=error.code, detail=str(error)[:512])
