"""The server's part in identities while it runs: answers those who ask for certificates, and checks who reports come from.

What is decided stands in `fleet/identities.py`; what an operator decides comes by the store.
"""

import logging
from functools import partial
from typing import Final

from protocol.errors import ForgedReportError, MessageError, MissingKeyError, RequestError
from protocol.identity import PublicKey, key_digest, read_request
from protocol.ids import DeviceId, digest_of
from protocol.messages import CertificateAnswer, Report
from server.adapters.authority import Authority
from server.adapters.mqtt import MqttTransport
from server.adapters.store import SqlStore
from server.audit import Act, Actor, new_act
from server.config import ServerConfig
from server.events import ClaimUsed, IdentityEvent, RenewalRequested
from server.fleet.identities import (
    ClaimRecord,
    EnrolmentError,
    Identities,
    IdentityRecord,
    PendingError,
    UnavailableError,
    answer,
    refusal,
    renew,
    use_claim,
)
from server.identity import AUTHORITY_FOLDER, RENEW_MS, issuer
from server.ports import Clock

WARNED_MAX: Final = 1_000
"""Devices and claims of which is remembered what was logged; of more nothing is."""

_LOG: Final = logging.getLogger(__name__)


class Enrolment:
    """Claims, renewals and signatures of one running server.

    Args:
        store: Where claims and certificates are.
        config: The server's settings.
        clock: Wall clock.
    """

    def __init__(self, store: SqlStore, config: ServerConfig, clock: Clock) -> None:
        self._store = store
        self._config = config
        self._clock = clock
        self._authority = Authority(config.folder / AUTHORITY_FOLDER)
        self._changes = -1
        self._identities = Identities()
        self._read()
        self._warned: dict[str, str] = {}
        self._published: dict[str, str] = {}  # state of each claim of which the answer is retained
        for record in self._identities.expiring(clock.now_ms(), RENEW_MS):
            _LOG.warning(
                "the certificate of the %s %s ends soon: `whimbrel broker config`", record.role, record.name
            )

    def open_report(self, device: DeviceId, topic: str, payload: bytes) -> Report:
        """A report that comes from whom it says; called from the transport's thread.

        A server that speaks to its broker with certificates believes nobody without a signature; one that does not believes
        devices that never had a certificate.

        Raises:
            MessageError: As `Identities.checked_report`.
        """
        check = partial(
            Identities.checked_report,
            device=device,
            topic=topic,
            payload=payload,
            now_ms=self._clock.now_ms(),
            is_strict=self._config.tls is not None,
        )
        known = self._identities
        try:
            return check(known)
        except ForgedReportError:
            self._read()
            if self._identities is known:
                raise
            return check(self._identities)  # an operator, or a server on the same store, gave it a moment ago

    def public_keys(self, device: DeviceId) -> list[PublicKey]:
        """Keys of the certificates with which a device may speak now."""
        self._read()
        return [record.public_key for record in self._identities.valid(device, self._clock.now_ms())]

    def handle(self, event: IdentityEvent, transport: MqttTransport) -> None:
        """Answer somebody who asks for a certificate."""
        who = f"claim {event.claim}" if isinstance(event, ClaimUsed) else event.device
        try:
            key = key_digest(read_request(event.request.csr).key)
        except MessageError as error:
            self._warn(who, str(error))
            return
        self._read()
        try:
            if isinstance(event, ClaimUsed):
                self._use_claim(event)
            else:
                self._renew(event)
        except EnrolmentError as error:
            self._reply(transport, event, refusal(key, error))
            if not isinstance(error, PendingError):
                self._warn(who, f"gets no certificate: {error}")
            return
        self._warned.pop(who, None)
        found = answer(self._identities, key)
        revoked = EnrolmentError("the certificate was revoked", hint="ask the operator for a new claim")
        self._reply(transport, event, found or refusal(key, revoked))

    def _warn(self, who: str, text: str) -> None:
        """Say something once, until it is something else."""
        if self._warned.get(who) != text and (who in self._warned or len(self._warned) < WARNED_MAX):
            self._warned[who] = text
            _LOG.warning("%s: %s", who, text)

    def refresh(self, transport: MqttTransport) -> None:
        """Commands of other processes may have changed how things stand."""
        self._read()
        self._publish(transport)

    def publish(self, transport: MqttTransport) -> None:
        """Retain what came of claims, at a broker that may have forgotten everything."""
        self._published.clear()
        self._publish(transport)

    def _read(self) -> None:
        """Take over what changed: a claim may be used in the instant in which it was made."""
        changes = self._store.changes()
        if changes != self._changes:
            self._identities = self._store.identities()
            self._changes = changes  # last: whoever sees it finds the identities of then, or newer ones

    def _publish(self, transport: MqttTransport) -> None:
        now_ms = self._clock.now_ms()
        for claim in self._identities.claims.values():
            if not claim.requested_key or self._published.get(claim.claim) == claim.state:
                continue
            if now_ms >= claim.expires_ms:
                transport.answer_claim(claim.claim, None, is_retained=True)
            elif claim.state != "pending":
                transport.answer_claim(claim.claim, self._outcome(claim), is_retained=True)
            self._published[claim.claim] = claim.state

    def _outcome(self, claim: ClaimRecord) -> CertificateAnswer:
        key = digest_of(claim.requested_key)
        found = answer(self._identities, key)
        if claim.state == "accepted" and found is not None:
            return found
        return refusal(key, EnrolmentError(f"the claim was {claim.state}", hint="ask for a new one"))

    def _use_claim(self, event: ClaimUsed) -> None:
        now_ms = self._clock.now_ms()
        use_claim(
            self._identities, event.claim, event.request, event.topic, now_ms
        )  # refuses without a write

        def change(before: Identities) -> list[IdentityRecord | Act]:
            records = use_claim(before, event.claim, event.request, event.topic, now_ms)
            device = next((each.device for each in records if isinstance(each, ClaimRecord)), event.claim)
            by = Actor(kind="device", name=device)
            asked = new_act(by, now_ms, "device.enroll", device, "it used its claim", claim=event.claim)
            return [*records, asked] if records else []

        self._identities = self._store.change_identities(change)
        claim = self._identities.claims[event.claim]
        if claim.state == "pending":
            _LOG.info(
                "%s asks for a certificate for the key %s: `whimbrel devices accept %s`",
                claim.device,
                claim.fingerprint,
                claim.device,
            )
            raise PendingError("an operator has to accept it", hint=f"whimbrel devices accept {claim.device}")

    def _renew(self, event: RenewalRequested) -> None:
        now_ms = self._clock.now_ms()
        change = partial(
            renew,
            device=event.device,
            request=event.request,
            topic=event.topic,
            issue=issuer(self._authority, now_ms, self._config.certificate_days),
            now_ms=now_ms,
        )
        try:
            if change(self._identities):  # refuses without a write
                by = Actor(kind="device", name=event.device)
                act = new_act(by, now_ms, "device.renew", event.device, "a further certificate was issued")
                self._identities = self._store.change_identities(
                    lambda before: [*records, act] if (records := change(before)) else []
                )
        except (MissingKeyError, RequestError) as error:
            _LOG.error("certificates cannot be renewed: %s", error)
            raise UnavailableError("the server cannot issue certificates now") from error

    def _reply(self, transport: MqttTransport, event: IdentityEvent, message: CertificateAnswer) -> None:
        if isinstance(event, ClaimUsed):
            transport.answer_claim(event.claim, message, is_retained=not message.code)
        else:
            transport.answer_renewal(event.device, message)
