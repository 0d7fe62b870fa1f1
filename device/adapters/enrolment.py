"""`whimbrel-device enroll`: makes a key, asks for a certificate with a claim, and waits until an operator has accepted (SPEC section 10.3)."""

import contextlib
import os
import random
import ssl
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from device.adapters.clock import SystemClock
from device.adapters.disk import RealDisk
from device.adapters.identity import (
    CA_FILE,
    NotEnrolledError,
    checked_certificate,
    install,
    new_key,
    read_credentials,
    write_private,
)
from device.adapters.mqtt import BrokerAddress, MqttLoop, MqttTransport
from device.config import DeviceConfig, enrolled
from protocol.errors import RequestError, TransportError, WhimbrelError
from protocol.identity import (
    Claim,
    PrivateKey,
    certificate_request,
    fingerprint,
    key_digest,
    key_pem,
)
from protocol.messages import CertificateAnswer, decode_message, encode_message
from protocol.topics import CLAIM_PREFIX, Topics

ASK_AGAIN_S: Final = 30.0
"""A request may be lost with a connection, or reach no server."""

_PENDING: Final = {"enroll.pending", "enroll.unavailable"}


class RefusedEnrolmentError(RequestError):
    """The server gives no certificate; its own code is in the text."""

    code = "identity.refused"


def enroll(
    config: DeviceConfig,
    claim: Claim,
    *,
    wait_s: float,
    rng: random.Random,
    tell: Callable[[str], None],
    is_again: bool = False,
) -> x509.Certificate:
    """Get a first certificate; may be cut off and begun again at any time, with the same key.

    Args:
        config: The device.
        claim: Leave to ask, from the operator.
        wait_s: How long to wait for the operator.
        rng: Source of jitter.
        tell: Takes lines for people.
        is_again: Ask although there is a certificate, since it was revoked.

    Raises:
        RequestError: The claim is for another device, or there is a certificate.
        RefusedEnrolmentError: The server says no.
        TransportError: The broker cannot be reached, or nobody answered in time.
        StorageError: The state folder cannot be written.
    """
    agent = config.agent
    if (claim.fleet, claim.device) != (agent.fleet, agent.device):
        raise RequestError(
            f"the claim is for {claim.device} of {claim.fleet}, and this is {agent.device} of {agent.fleet}",
            hint="ask the operator for one for this device",
        )
    if not is_again:
        _refuse_enrolled(config)
    disk = RealDisk(config.folder)
    key = new_key(disk)
    tell(f"key of {agent.device}: {fingerprint(key.public_key())}")
    data = _Conversation(config, claim, key, rng, tell).run(wait_s)
    authority = x509.load_der_x509_certificate(claim.authority).public_bytes(Encoding.PEM)
    certificate = checked_certificate(data, key, agent.device, authority)
    write_private(disk, CA_FILE, authority)  # not before there is a certificate of it
    install(disk, key, certificate)
    return certificate


def _refuse_enrolled(config: DeviceConfig) -> None:
    try:
        credentials = read_credentials(enrolled(config.folder))
    except (NotEnrolledError, RequestError):
        return
    if credentials.name == config.agent.device and credentials.life.end_ms > SystemClock().now_ms():
        end = credentials.certificate.not_valid_after_utc
        raise RequestError(
            f"{config.agent.device} has a certificate until {end:%Y-%m-%d}, which the agent renews",
            hint="give --again if it was revoked",
        )


class _Conversation:
    """One connection with a claim, from the request to the answer."""

    def __init__(
        self,
        config: DeviceConfig,
        claim: Claim,
        key: PrivateKey,
        rng: random.Random,
        tell: Callable[[str], None],
    ) -> None:
        topics = Topics(claim.fleet)
        self._config, self._claim, self._rng, self._tell = config, claim, rng, tell
        self._request_topic, self._answer_topic = (
            topics.claim_request(claim.claim),
            topics.claim_answer(claim.claim),
        )
        request = certificate_request(claim.device, key, claim.private_key, self._request_topic)
        self._request = encode_message(request)
        self._key = key_digest(key.public_key())
        self._answer: CertificateAnswer | None = None
        self._was_told = ""
        self._loop = MqttLoop()
        self._transport: MqttTransport | None = None

    def run(self, wait_s: float) -> bytes:
        """The certificate, in DER."""
        context = _context(self._claim)
        with contextlib.closing(self._loop):
            address = BrokerAddress(self._config.broker_host, self._claim.port, lambda: context)
            self._transport = MqttTransport(
                self._loop,
                address,
                CLAIM_PREFIX + self._claim.claim,
                self._rng,
                will=None,
                on_connected=self._connected,
                on_disconnected=lambda: None,
                on_message=lambda _topic, payload: self._heard(payload),
            )
            self._transport.start()
            self._ask_again()
            is_done = self._loop.run_until(lambda: self._answer is not None, wait_s)
            trouble = self._transport.error
        if not is_done:
            where = f"{self._config.broker_host}:{self._claim.port}"
            text = (
                f"{where}: {trouble.removeprefix(f'{where}: ')}" if trouble else "nobody has accepted it yet"
            )
            raise TransportError(
                f"{text}; gave up after {wait_s:.0f} s",
                hint="once that is seen to, run enroll again: key and claim stay good",
            )
        assert self._answer is not None
        if self._answer.code:
            raise RefusedEnrolmentError(
                self._answer.detail or "the server gives no certificate", hint=self._answer.code
            )
        return self._answer.certificate

    def _connected(self) -> None:
        assert self._transport is not None
        self._transport.subscribe((self._answer_topic,), 1)
        self._ask()

    def _ask(self) -> None:
        assert self._transport is not None
        self._transport.publish(self._request_topic, self._request, 1, retain=False)

    def _ask_again(self) -> None:
        self._ask()
        self._loop.call_later(ASK_AGAIN_S, self._ask_again)

    def _heard(self, payload: bytes) -> None:
        try:
            answer = decode_message(CertificateAnswer, payload)
        except WhimbrelError:
            return
        if answer.key != self._key:
            return  # to somebody else who has this claim
        if answer.code not in _PENDING:
            self._answer = answer
        elif answer.code != self._was_told:
            self._was_told = answer.code
            self._tell(f"waiting: {answer.detail}")


def _context(claim: Claim) -> ssl.SSLContext:
    """What the port for claims is opened with. The key is shown to OpenSSL in a file that has no name."""
    certificate = x509.load_der_x509_certificate(claim.certificate).public_bytes(Encoding.PEM)
    authority = x509.load_der_x509_certificate(claim.authority).public_bytes(Encoding.PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=authority.decode())
    descriptor = os.memfd_create("claim")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(key_pem(claim.private_key) + certificate)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context
