"""The server's certificate authority: who may speak to the broker (SPEC section 10). Unrelated to the keys that sign releases.

Two authorities lie in one folder: `devices` issues to devices, servers and the broker; `claims` issues what opens the port for
claims, and nothing else. A certificate says what its key is for: a device's cannot pass for the broker's, nor the broker's for a client's.
"""

import ipaddress
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.errors import MissingKeyError, RequestError
from protocol.identity import PrivateKey, PublicKey, key_digest, make_key, public_der
from protocol.ids import ClaimId, DeviceId, Digest, FleetId
from protocol.topics import CLAIM_PREFIX
from server.adapters.blobs import storage_errors, sync_folder

PASSPHRASE_VARIABLE: Final = "WHIMBREL_CA_PASSPHRASE_FILE"  # noqa: S105 - a name
"""Names a file whose first line encrypts the keys of the authorities."""

PASSPHRASE_BYTES_MAX: Final = 1024

AUTHORITY_DAYS: Final = 7_300
BROKER_DAYS: Final = 397
"""For the broker and for servers: people see to these; about a year."""

CLAIM_GRACE: Final = timedelta(days=1)
"""The broker lets a claim in for so long after it expired, so that the server can say that it did."""

CLOCK_SKEW: Final = timedelta(hours=1)
"""How far a device's clock may be behind the server's."""

_HOST_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,9}")
_Name = Literal["devices", "claims"]


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was made.

    Attributes:
        serial: In hexadecimal.
        certificate: X.509, DER.
        key: SHA-256 of the public key.
        expires_ms: End of its life.
    """

    serial: str
    certificate: bytes
    key: Digest
    expires_ms: int


class Authority:
    """The authorities in one folder.

    Args:
        folder: `devices.pem`, `devices.key`, `claims.pem`, `claims.key`.
        passphrase: Asked for when keys are made or found encrypted; `passphrase_of_file` where none is given.
    """

    def __init__(self, folder: Path, passphrase: Callable[[], bytes | None] | None = None) -> None:
        self.folder = folder
        self._passphrase = passphrase or passphrase_of_file
        self._keys: dict[_Name, PrivateKey] = {}

    @property
    def exists(self) -> bool:
        """Whether there are authorities here."""
        return (self.folder / "devices.pem").exists()

    def create(self, fleet: FleetId, now_ms: int) -> None:
        """Make both authorities, or neither.

        Raises:
            RequestError: They are there already.
            StorageError: The folder cannot be written.
        """
        if self.exists:
            raise RequestError(f"{self.folder} holds certificate authorities, which are never overwritten")
        partial = self.folder.with_name(f".{self.folder.name}.new")
        passphrase = self._passphrase()
        encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        with storage_errors(self.folder):
            shutil.rmtree(partial, ignore_errors=True)  # of an attempt that was cut off
            partial.mkdir(mode=0o700)
            for name in ("devices", "claims"):
                _write_authority(partial, name, fleet, now_ms, encryption)
            sync_folder(partial)
            partial.replace(self.folder)
            sync_folder(self.folder.parent)

    def pem(self, name: _Name = "devices") -> bytes:
        """Certificate of an authority.

        Raises:
            RequestError: There is none.
        """
        return self._certificate(name).public_bytes(Encoding.PEM)

    def der(self, name: _Name = "devices") -> bytes:
        """Certificate of an authority, as claims carry it.

        Raises:
            RequestError: There is none.
        """
        return self._certificate(name).public_bytes(Encoding.DER)

    def check_key(self) -> None:
        """Make sure that certificates can be issued.

        Raises:
            MissingKeyError: A key is not there, or it is encrypted and the passphrase is not known.
        """
        for name in ("devices", "claims"):
            self._key(name)

    def issue_device(self, device: DeviceId, key: PublicKey, now_ms: int, days: int) -> Issued:
        """A certificate for a device: a client that is called like it."""
        return self._issue("devices", device, key, now_ms, timedelta(days=days), _CLIENT)

    def issue_server(self, name: str, key: PublicKey, now_ms: int) -> Issued:
        """A certificate with which a server speaks to the broker."""
        return self._issue("devices", name, key, now_ms, timedelta(days=BROKER_DAYS), _CLIENT)

    def issue_broker(self, hosts: Iterable[str], key: PublicKey, now_ms: int) -> Issued:
        """A certificate for the broker, under the names and addresses by which it is called."""
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        return self._issue("devices", "broker", key, now_ms, timedelta(days=BROKER_DAYS), _SERVER, names)

    def new_claim(self) -> ClaimId:
        """A number for a claim that nobody can guess."""
        return ClaimId(secrets.token_hex(8))

    def issue_claim(self, claim: ClaimId, key: PublicKey, now_ms: int, expires_ms: int) -> Issued:
        """A certificate that opens the port for claims."""
        life = timedelta(milliseconds=expires_ms - now_ms) + CLAIM_GRACE
        return self._issue("claims", CLAIM_PREFIX + claim, key, now_ms, life, _CLIENT)

    def revocations(self, serials: Iterable[tuple[str, int]], now_ms: int) -> bytes:
        """The list of what must not be let in any more.

        It names no end before the authority's own: brokers let nobody in with a list that has expired.

        Args:
            serials: Serial numbers in hexadecimal, and the instants at which they were revoked.
            now_ms: The instant.
        """
        authority = self._certificate("devices")
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(authority.subject)
            .last_update(_instant(now_ms))
            .next_update(authority.not_valid_after_utc)
            .add_extension(x509.CRLNumber(now_ms), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key("devices").public_key()), False
            )
        )
        for serial, revoked_ms in sorted(serials):
            revoked = (
                x509.RevokedCertificateBuilder()
                .serial_number(int(serial, 16))
                .revocation_date(_instant(revoked_ms))
            )
            builder = builder.add_revoked_certificate(revoked.build())
        return builder.sign(self._key("devices"), hashes.SHA256()).public_bytes(Encoding.PEM)

    def _issue(
        self,
        name: _Name,
        subject: str,
        key: PublicKey,
        now_ms: int,
        life: timedelta,
        usage: x509.ExtendedKeyUsage,
        hosts: x509.SubjectAlternativeName | None = None,
    ) -> Issued:
        authority, signer = self._certificate(name), self._key(name)
        serial = x509.random_serial_number()
        end = min(_instant(now_ms) + life, authority.not_valid_after_utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_subject(subject))
            .issuer_name(authority.subject)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(_instant(now_ms) - CLOCK_SKEW)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_authority=False), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
            )
        )
        if hosts is not None:
            builder = builder.add_extension(hosts, critical=False)
        certificate = builder.sign(signer, hashes.SHA256())
        return Issued(
            f"{serial:x}",
            certificate.public_bytes(Encoding.DER),
            key_digest(key),
            int(end.timestamp()) * 1000,
        )

    def _certificate(self, name: _Name) -> x509.Certificate:
        path = self.folder / f"{name}.pem"
        try:
            return x509.load_pem_x509_certificate(path.read_bytes())
        except FileNotFoundError as error:
            raise RequestError(
                f"{self.folder}: there is no certificate authority",
                hint="`whimbrel broker config` makes one",
            ) from error
        except (OSError, ValueError) as error:
            raise RequestError(f"{path}: {error}", hint="bring it back from your copy") from error

    def _key(self, name: _Name) -> PrivateKey:
        if name not in self._keys:
            self._keys[name] = self._read_key(self.folder / f"{name}.key", self._certificate(name))
        return self._keys[name]

    def _read_key(self, path: Path, certificate: x509.Certificate) -> PrivateKey:
        try:
            pem = path.read_bytes()
        except OSError as error:
            raise MissingKeyError(f"{path}: {error.strerror}", hint="certificates need it") from error
        is_encrypted = b"ENCRYPTED" in pem.split(b"\n", 1)[0]
        passphrase = self._passphrase() if is_encrypted else None
        if is_encrypted and not passphrase:
            raise MissingKeyError(
                f"{path} is encrypted", hint=f"let ${PASSPHRASE_VARIABLE} name a file with its passphrase"
            )
        try:
            key = load_pem_private_key(pem, passphrase)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            hint = "is the passphrase right?" if is_encrypted else "bring it back from your copy"
            raise MissingKeyError(f"{path} cannot be read", hint=hint) from error
        if not isinstance(key, PrivateKey) or public_der(key.public_key()) != _public(certificate):
            raise MissingKeyError(
                f"{path} is not the key of the certificate beside it", hint="bring both back from your copy"
            )
        return key


def passphrase_of_file() -> bytes | None:
    """The first line of the file that `PASSPHRASE_VARIABLE` names; nothing where it names none.

    Raises:
        RequestError: The file cannot be read, or is empty.
    """
    named = os.environ.get(PASSPHRASE_VARIABLE)
    if not named:
        return None
    try:
        with Path(named).open("rb") as file:
            passphrase = file.readline(PASSPHRASE_BYTES_MAX).rstrip(b"\r\n")
    except OSError as error:
        raise RequestError(f"{named}: {error.strerror}", hint=f"${PASSPHRASE_VARIABLE} names it") from error
    if not passphrase:
        raise RequestError(f"{named} has an empty first line", hint="it should be the passphrase")
    return passphrase


_CLIENT: Final = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
_SERVER: Final = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])


def _write_authority(
    folder: Path, name: _Name, fleet: FleetId, now_ms: int, encryption: KeySerializationEncryption
) -> None:
    key = make_key()
    subject = _subject(f"Whimbrel {name} of {fleet}"[:64])
    start = _instant(now_ms)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SKEW)
        .not_valid_after(start + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    write_secret(folder / f"{name}.key", private)
    write_secret(folder / f"{name}.pem", certificate.public_bytes(Encoding.PEM), mode=0o644)


def write_secret(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file that nobody else may read, in place of an old one; durable on return.

    Raises:
        StorageError: The folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.new")
    with storage_errors(path):
        partial.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(partial, flags, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if _HOST_NAME.fullmatch(text):
            return x509.DNSName(text)
    raise RequestError(
        f"{text[:80]!r} is neither the name of a host nor an address", hint="it has no port and no wildcard"
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _public(certificate: x509.Certificate) -> bytes:
    key = certificate.public_key()
    return public_der(key) if isinstance(key, PublicKey) else b""


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _instant(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms // 1000, UTC)
