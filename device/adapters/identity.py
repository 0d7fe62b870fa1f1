"""The device's key and certificate: files, TLS, signatures, and how a certificate is exchanged for the next one (SPEC section 10).

Imported only where `[tls]` is configured, or for `enroll` and `doctor`: it loads `cryptography`. The private key is made here and
never leaves the device. Key and certificate lie in one file, so that one rename exchanges both.
"""

import logging
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from device.adapters.disk import RealDisk
from device.config import IDENTITY_FOLDER, TlsConfig
from device.ports import OpenedKey
from device.renewal import Life
from protocol.encryption import ContentCipher, content_key_name, unwrap_key
from protocol.errors import MessageError, RequestError, StorageError
from protocol.identity import (
    PrivateKey,
    PublicKey,
    certificate_request,
    key_digest,
    key_pem,
    make_key,
    public_der,
    seal_report,
)
from protocol.ids import DeviceId, Digest, FleetId
from protocol.messages import CertificateAnswer, WrappedKey, decode_message, encode_message

IDENTITY_FILE: Final = f"{IDENTITY_FOLDER}/identity.pem"
CA_FILE: Final = f"{IDENTITY_FOLDER}/ca.pem"
NEW_KEY_FILE: Final = f"{IDENTITY_FOLDER}/new.key"
"""A key for which a certificate was asked; it becomes part of `IDENTITY_FILE` with the answer."""

PEM_BYTES_MAX: Final = 1 << 20
"""A bundle of authorities; a key and a certificate have 700 bytes."""

NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which the module `ssl` has no name for."""

_LOG: Final = logging.getLogger(__name__)


class Clock(Protocol):
    """Milliseconds since 1970."""

    def now_ms(self) -> int:
        """The instant."""


class NotEnrolledError(RequestError):
    """There is no key or no certificate."""

    code = "identity.missing"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A key and the certificate for it, as they were read."""

    key: PrivateKey
    certificate: x509.Certificate

    @property
    def life(self) -> Life:
        """From when until when the certificate is valid."""
        start, end = self.certificate.not_valid_before_utc, self.certificate.not_valid_after_utc
        return Life(int(start.timestamp()) * 1000, int(end.timestamp()) * 1000)

    @property
    def name(self) -> str:
        """Whom the certificate is for."""
        return common_name(self.certificate)


class Identity:
    """One device's key and certificate.

    Args:
        device: Its name.
        files: Where they are.
        disk: The state folder, in which `enroll` leaves them and a renewal exchanges them.
        clock: The machine's.
    """

    def __init__(self, device: DeviceId, files: TlsConfig, disk: RealDisk, clock: Clock) -> None:
        self._device = device
        self._files = files
        self._disk = disk
        self._clock = clock
        self._lock = threading.Lock()  # connections are opened in threads of their own
        self._read: Credentials | None = None

    def credentials(self) -> Credentials:
        """Key and certificate; read once, and anew after a renewal.

        Raises:
            NotEnrolledError: One of them is not there.
            RequestError: One of them is damaged, or they do not belong together.
        """
        with self._lock:
            if self._read is None:
                self._read = read_credentials(self._files)
            return self._read

    def tls(self) -> ssl.SSLContext:
        """What the next connection to the broker is made with; the files are read anew.

        The dates of the broker's certificate count only while the clock lies within the life of our own: outside, either the
        clock is wrong, as on a board without a battery for it, or the broker will not let us in anyway (ADR 25).

        Raises:
            RequestError: As `credentials`, or the authority's certificate cannot be read.
        """
        with self._lock:
            self._read = None
        life = self.credentials().life
        context = tls_context(self._files.ca, self._files.certificate, self._files.key)
        if not life.holds(self._clock.now_ms()):
            context.verify_flags |= ssl.VerifyFlags(NO_CHECK_TIME)
            _LOG.warning(
                "the clock is outside of the life of this device's certificate; it cannot judge the broker's"
            )
        return context

    def seal(self, topic: str, report: bytes) -> bytes:
        """A report with our signature.

        Raises:
            RequestError: As `credentials`.
        """
        return seal_report(self.credentials().key, topic, report)

    def open_key(self, fleet: FleetId, wrapped: WrappedKey) -> OpenedKey | None:
        """See `device.ports.KeyOpener`."""
        key = self.credentials().key
        if wrapped.recipient != key_digest(key.public_key()):
            return None  # of the certificate before this one, or of the next
        content_key = unwrap_key(wrapped.wrapped, key, fleet, self._device, Digest(wrapped.blob))
        return OpenedKey(content_key_name(content_key), ContentCipher(content_key))

    def request(self, topic: str) -> bytes:
        """Ask for the next certificate, for a new key that stays the same until there is one.

        Raises:
            WhimbrelError: As `credentials`, or the disk cannot be written.
        """
        request = certificate_request(self._device, new_key(self._disk), self.credentials().key, topic)
        return encode_message(request)

    def take(self, payload: bytes) -> str:
        """Exchange key and certificate for those of an answer.

        Returns:
            One line for the log; empty for an answer to a question that is not asked any more.

        Raises:
            WhimbrelError: The answer is malformed, or not what was asked for; nothing has changed.
        """
        answer = decode_message(CertificateAnswer, payload)
        key = pending_key(self._disk)
        if key is None or answer.key != key_digest(key.public_key()):
            return ""
        if answer.code:
            return f"no new certificate yet: {answer.detail or answer.code}"
        try:
            authorities = self._files.ca.read_bytes()
        except OSError as error:
            raise RequestError(
                f"{self._files.ca}: {error.strerror}", hint="whimbrel-device doctor"
            ) from error
        certificate = checked_certificate(answer.certificate, key, self._device, authorities)
        install(self._disk, key, certificate)
        with self._lock:
            self._read = Credentials(key, certificate)
        return f"the certificate was renewed and is valid until {certificate.not_valid_after_utc:%Y-%m-%d}"


def tls_context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """A context that trusts one authority and shows one certificate.

    Raises:
        RequestError: A file cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(ca)
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise RequestError(
            f"{ca}, {certificate} and {key}: {error.strerror or error}", hint="whimbrel-device doctor"
        ) from error
    return context


def read_credentials(files: TlsConfig) -> Credentials:
    """Read key and certificate.

    Raises:
        NotEnrolledError: One of them is not there.
        RequestError: One of them is damaged, or they do not belong together.
    """
    texts = []
    for path in (files.certificate, files.key):
        try:
            with path.open("rb") as file:
                texts.append(file.read(PEM_BYTES_MAX))
        except FileNotFoundError as error:
            hint = "whimbrel-device enroll" if files.is_enrolled else "[tls] in the configuration names it"
            raise NotEnrolledError(f"{path} is missing", hint=hint) from error
        except OSError as error:
            raise RequestError(f"{path}: {error.strerror}", hint="use sudo") from error
    try:
        certificate = x509.load_pem_x509_certificate(texts[0])
        key = load_pem_private_key(texts[1], None)
    except (ValueError, TypeError) as error:
        raise RequestError(
            f"{files.certificate} or {files.key} is damaged: {error}", hint="enroll the device anew"
        ) from error
    if not isinstance(key, PrivateKey) or not isinstance(key.curve, SECP256R1):
        raise RequestError(f"{files.key} is not a key on P-256", hint="other kinds sign no reports")
    if not _belong_together(certificate, key):
        raise RequestError(f"{files.key} is not the key of {files.certificate}")
    return Credentials(key, certificate)


def checked_certificate(
    data: bytes, key: PrivateKey, device: DeviceId, authorities: bytes
) -> x509.Certificate:
    """A certificate in DER, if it is the one that was asked for.

    Args:
        data: The certificate.
        key: For which it was asked.
        device: Whom it should be for.
        authorities: Who vouches for the broker, PEM.

    Raises:
        MessageError: It is for another name or key, or of another authority than the one that vouches for the broker.
    """
    try:
        certificate = x509.load_der_x509_certificate(data)
        issuers = x509.load_pem_x509_certificates(authorities)
    except ValueError as error:
        raise MessageError(f"the certificate cannot be judged: {error}") from error
    if common_name(certificate) != device:
        raise MessageError(f"the certificate is for {common_name(certificate)[:80]!r}, and not for {device}")
    if not _belong_together(certificate, key):
        raise MessageError("the certificate is for another key")
    if not any(is_issued_by(certificate, issuer) for issuer in issuers):
        raise MessageError("the certificate is not of the authority that vouches for the broker")
    return certificate


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether an authority has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def install(disk: RealDisk, key: PrivateKey, certificate: x509.Certificate) -> None:
    """Make key and certificate the identity of the device, in one step.

    Raises:
        StorageError: The disk cannot be written; the old identity is whole.
    """
    write_private(disk, IDENTITY_FILE, key_pem(key) + certificate.public_bytes(Encoding.PEM))
    disk.remove(NEW_KEY_FILE)


def new_key(disk: RealDisk) -> PrivateKey:
    """The key for which a certificate is being asked: made once, and kept until there is an answer.

    Raises:
        StorageError: The disk cannot be written.
    """
    key = pending_key(disk)
    if key is None:
        key = make_key()
        write_private(disk, NEW_KEY_FILE, key_pem(key))
    return key


def pending_key(disk: RealDisk) -> PrivateKey | None:
    """The key for which a certificate is being asked."""
    with suppress(StorageError, ValueError):
        if disk.length(NEW_KEY_FILE):
            key = load_pem_private_key(disk.read(NEW_KEY_FILE, 0, PEM_BYTES_MAX), None)
            return key if isinstance(key, PrivateKey) else None
    return None


def write_private(disk: RealDisk, name: str, data: bytes) -> None:
    """Write a file that only the owner of the state folder may read, in place of an old one; durable on return.

    Raises:
        StorageError: The disk cannot be written.
    """
    temporary = f"{name}.new"
    disk.create(temporary, len(data))  # with mode 0600
    disk.write(temporary, 0, data)
    disk.sync(temporary)
    disk.replace(temporary, name)


def common_name(certificate: x509.Certificate) -> str:
    """Whom a certificate is for."""
    names = [str(attribute.value) for attribute in certificate.subject]
    return names[0] if len(names) == 1 else ""


def _belong_together(certificate: x509.Certificate, key: PrivateKey) -> bool:
    public = certificate.public_key()
    return isinstance(public, PublicKey) and public_der(public) == public_der(key.public_key())
