"""How this server proves to the broker who it is."""

import ssl
from pathlib import Path

from cryptography import x509

from protocol.errors import RequestError
from server.config import TlsSettings


def client_context(folder: Path, tls: TlsSettings) -> ssl.SSLContext:
    """What a connection to the broker is made with.

    Args:
        folder: The server's; relative paths count from there.
        tls: Certificates and key.

    Raises:
        RequestError: A file is missing, malformed, or does not fit the others.
    """
    ca, certificate, key = (folder / name for name in (tls.ca, tls.certificate, tls.key))
    for path in (ca, certificate, key):
        try:
            path.open("rb").close()
        except OSError as error:
            raise RequestError(
                f"{path}: {error.strerror}", hint="[tls] names it; `whimbrel broker config` makes it"
            ) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise RequestError(f"{ca} holds no certificate", hint="[tls] ca in the settings names it") from error
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise RequestError(
            f"{certificate} and {key} do not belong together, or one is damaged",
            hint="`whimbrel broker config` makes both",
        ) from error
    return context


def expires_ms(path: Path) -> int:
    """End of the life of a certificate in PEM.

    Raises:
        RequestError: It cannot be read.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: {error}") from error
    return int(certificate.not_valid_after_utc.timestamp()) * 1000
