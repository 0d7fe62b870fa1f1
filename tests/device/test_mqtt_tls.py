"""The loop over TLS, where bytes that are decrypted already do not make the socket readable."""

import asyncio
import contextlib
import gc
import ipaddress
import random
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from device.adapters.mqtt import BrokerAddress, MqttLoop, MqttTransport
from tests.server.brokers import embedded_broker

MESSAGES = 200
WAIT_S = 20.0


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A key and a certificate that it signed itself, for loopback, valid for the next hour."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "broker")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    key_path, certificate_path = folder / "key.pem", folder / "certificate.pem"
    key_path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    certificate_path.write_bytes(certificate.public_bytes(Encoding.PEM))
    return key_path, certificate_path


class Terminator:
    """Takes TLS connections and carries their content to a broker that speaks plainly, in a thread of its own."""

    def __init__(self, broker_port: int, context: ssl.SSLContext) -> None:
        self.port = 0
        self._broker_port = broker_port
        self._context = context
        self._loop = asyncio.new_event_loop()
        self._is_up = threading.Event()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self._thread.start()
        assert self._is_up.wait(WAIT_S)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        self._is_up.set()
        async with server:
            await self._end.wait()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", self._broker_port)
        await asyncio.gather(_copy(reader, broker_writer), _copy(broker_reader, writer))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            target.write(data)
            await target.drain()
    target.close()
    with contextlib.suppress(OSError):
        await target.wait_closed()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[BrokerAddress]:
    key, certificate = write_certificate(tmp_path)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key)
    with embedded_broker() as broker:
        terminator = Terminator(broker.port, server_side)
        client_side = partial(ssl.create_default_context, cafile=certificate)
        yield BrokerAddress("127.0.0.1", terminator.port, client_side)
        terminator.close()


def test_every_message_of_a_burst_arrives_over_tls(address: BrokerAddress) -> None:
    loop = MqttLoop()
    heard: list[bytes] = []
    transport = MqttTransport(
        loop,
        address,
        "client",
        random.Random(1),
        will=None,
        on_connected=lambda: transport.subscribe(("burst",), 0),
        on_disconnected=lambda: None,
        on_message=lambda _topic, payload: heard.append(payload),
    )
    transport.start()
    assert loop.run_until(lambda: transport.is_connected, WAIT_S), transport.error
    for number in range(MESSAGES):
        transport.publish("burst", b"%d" % number, 0, retain=False)
    assert loop.run_until(lambda: len(heard) == MESSAGES, WAIT_S), f"{len(heard)} of {MESSAGES} arrived"
    assert heard == [b"%d" % number for number in range(MESSAGES)]
    transport.close()
    loop.close()


# paho leaves the socket of a handshake that failed to the collector, which closes it, and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_that_nobody_vouches_for_is_not_talked_to(address: BrokerAddress) -> None:
    loop = MqttLoop()
    stranger = BrokerAddress(address.host, address.port, ssl.create_default_context)
    connects: list[int] = []
    transport = MqttTransport(
        loop,
        stranger,
        "client",
        random.Random(1),
        will=None,
        on_connected=lambda: connects.append(1),
        on_disconnected=lambda: None,
        on_message=lambda _topic, _payload: None,
    )
    transport.start()
    assert loop.run_until(lambda: "certificate" in transport.error, WAIT_S)
    assert not connects
    transport.close()
    loop.close()
    gc.collect()
