"""The server's side of MQTT, over paho. The only importer of `paho` in this package.

One thread of ours connects, sends and reconnects; one thread of paho reads and writes the socket. There are two lanes:

- the *ordered* lane, QoS 1: metadata, cached chunks, desired states, in the order of the calls;
- the *answer* lane, QoS 0: chunks and metadata for single devices, which overtake the ordered lane one by one.

Chunks wait as names and numbers and are read from the blob store when they are sent, so what is in memory is the
window: at most `WINDOW_MESSAGES` messages in each lane, however large the blob and however many ask.

Every connection is a new paho client: nothing of the last one is repeated by paho behind our back. While there is no
connection, what is handed over is dropped, see `server.ports.Transport`.
"""

import logging
import random
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from paho.mqtt.client import MQTT_ERR_SUCCESS, Client, MQTTMessage, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from protocol.chunks import encode_chunk
from protocol.errors import ForgedReportError, StorageError, TransportError, WhimbrelError
from protocol.ids import ClaimId, DeviceId, Digest, FleetId
from protocol.messages import (
    CertificateAnswer,
    CertificateRequest,
    KeyAnswer,
    Link,
    Report,
    decode_message,
    decode_report,
    decode_request,
    encode_message,
)
from protocol.topics import ClaimRequestTopic, LinkTopic, RenewalTopic, ReportTopic, RequestTopic, Topics
from server.events import (
    BlobUncached,
    BrokerConnected,
    ClaimUsed,
    Event,
    IdentityEvent,
    LinkReceived,
    RenewalRequested,
    ReportReceived,
    RequestReceived,
)
from server.ports import Repository

_LOG: Final = logging.getLogger(__name__)

WINDOW_MESSAGES: Final = 64
"""Messages of one lane that the broker has not confirmed (QoS 1) or the socket has not taken (QoS 0): 4 MiB."""

ANSWERS_MAX: Final = 16_384
"""Chunks that wait to be sent to single devices. Beyond it requests are dropped: devices ask again."""

FILTERS_PER_SUBSCRIBE: Final = 8
"""The most that the cloud brokers take in one SUBSCRIBE."""

KEEP_ALIVE_S: Final = 30
CONNECT_TIMEOUT_S: Final = 10.0
SUBSCRIBE_TIMEOUT_S: Final = 10.0
BACKOFF_MS: Final = 200
BACKOFF_MS_MAX: Final = 10_000
"""Full jitter: a wait between 0 and twice the last bound, up to this."""

DOUBTED_MAX: Final = 1_000
"""Devices of which is remembered that somebody else spoke for them; of more nothing is logged."""

DRAIN_TIMEOUT_S: Final = 5.0
"""How long `stop` waits for the broker to confirm what was sent."""


@dataclass(slots=True)
class TransportCounters:
    """What was sent and received since the start. Bytes are payloads."""

    messages_published: int = 0
    bytes_published: int = 0
    chunks_cached: int = 0
    chunks_answered: int = 0
    metadata_answered: int = 0
    keys_answered: int = 0
    answers_dropped: int = 0
    messages_received: int = 0
    messages_invalid: int = 0
    reports_forged: int = 0
    connections: int = 0


@dataclass(frozen=True, slots=True)
class _Message:
    topic: str
    payload: bytes
    is_chunk: bool = False
    is_retained: bool = True  # in the ordered lane


@dataclass(slots=True)
class _Ordered:
    """One call: messages made one by one while they are sent, and what to tell when all are confirmed."""

    messages: Iterator[_Message]
    confirmation: Event | None = None
    unconfirmed: int = 0
    is_sent: bool = False


@dataclass(slots=True)
class _Connection:
    """State of one connection; goes with it."""

    client: Client
    is_accepted: bool = False
    is_lost: bool = False
    reason: str = ""
    granted: set[int] = field(default_factory=set)
    ordered: deque[_Ordered] = field(default_factory=deque)
    answers: deque[tuple[DeviceId, Digest, int]] = field(default_factory=deque)
    waiting: set[tuple[DeviceId, Digest, int]] = field(default_factory=set)
    replies: dict[str, bytes] = field(default_factory=dict)  # metadata and keys, by topic
    in_flight: dict[int, _Ordered | None] = field(default_factory=dict)  # by message id; None for answers
    early: set[int] = field(default_factory=set)  # confirmed before `publish` returned the id
    ordered_window: int = 0
    answer_window: int = 0


class MqttTransport:
    """`Transport` over one broker.

    Args:
        host: Of the broker.
        port: Of the broker.
        fleet: Whose topics are used.
        read_chunk: Payload of a chunk, from the blob store.
        post: Takes events; may block for a while, which slows the broker down. Called from threads of this class.
        rng: For the client id and the waits between attempts.
        tls: Gives what a connection is made with, each time anew; plain connections where there is none.
        open_report: Checks who a report comes from; by default every report is believed.
        certify: Takes requests for certificates, as `post` takes events; a server without it hears of none.
    """

    def __init__(
        self,
        host: str,
        port: int,
        fleet: FleetId,
        read_chunk: Callable[[Digest, int], bytes],
        post: Callable[[Event], None],
        rng: random.Random,
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        open_report: Callable[[DeviceId, str, bytes], Report] | None = None,
        certify: Callable[[IdentityEvent], None] | None = None,
    ) -> None:
        self.counters = TransportCounters()
        self._host, self._port = host, port
        self._topics = Topics(fleet)
        self._read_chunk = read_chunk
        self._post = post
        self._tls = tls
        self._open_report = open_report or (lambda _device, _topic, payload: decode_report(payload).report)
        self._certify = certify
        self._doubted: set[DeviceId] = set()  # whose last report was forged
        self._rng = rng
        self._client_id = f"whimbrel-server-{rng.getrandbits(48):012x}"
        self._condition = threading.Condition()
        self._connection: _Connection | None = None
        self._is_stopping = False
        self._last_error = ""
        self._thread = threading.Thread(target=self._run, name="whimbrel-mqtt", daemon=True)

    def start(self) -> None:
        """Connect, and keep connecting until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Send what is waiting in the ordered lane for a bounded time, and disconnect."""
        with self._condition:
            self._condition.wait_for(self._is_idle, DRAIN_TIMEOUT_S)
            self._is_stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join(CONNECT_TIMEOUT_S + SUBSCRIBE_TIMEOUT_S)

    @property
    def is_connected(self) -> bool:
        """Whether the broker accepted us and our subscriptions."""
        connection = self._connection
        return connection is not None and not connection.is_lost

    @property
    def last_error(self) -> str:
        """Why there is no connection; empty while there is one."""
        return self._last_error

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for a connection; false when the time ran out."""
        with self._condition:
            return self._condition.wait_for(lambda: self.is_connected, timeout_s)

    # Port

    def publish_desired(self, device: DeviceId, payload: bytes) -> None:
        """Retain what a device should run, signed or not; nothing takes the message away."""
        self._send(iter([_Message(self._topics.desired(device), payload)]))

    def publish_documents(self, repository: Repository) -> None:
        """Retain all signed documents: the timestamp, which tells readers to look, last."""
        documents = repository.documents
        messages = [
            _Message(self._topics.root(version), root)
            for version, root in enumerate(repository.roots, start=1)
        ]
        messages += [_Message(self._topics.metadata(role), data) for role, data in documents.delegated]
        messages.append(_Message(self._topics.metadata("targets"), documents.targets))
        messages.append(_Message(self._topics.metadata("snapshot"), documents.snapshot))
        messages.append(_Message(self._topics.metadata("timestamp"), documents.timestamp))
        self._send(iter(messages))

    def cache_blob(self, name: Digest, chunk_count: int) -> None:
        """Retain all chunks of a blob."""
        self._send(
            _Message(self._topics.chunk(name, index), self._encoded(name, index), is_chunk=True)
            for index in range(chunk_count)
        )

    def uncache_blob(self, name: Digest, chunk_count: int) -> None:
        """Take the chunks of a blob away: an empty retained message deletes."""
        messages = (_Message(self._topics.chunk(name, index), b"") for index in range(chunk_count))
        self._send(messages, BlobUncached(name))

    def answer_chunks(self, device: DeviceId, name: Digest, chunks: Iterable[int]) -> None:
        """Send chunks to one device."""
        with self._condition:
            connection = self._connection
            if connection is None or connection.is_lost:
                return
            for index in chunks:
                answer = (device, name, index)
                if answer in connection.waiting:
                    continue
                if len(connection.answers) >= ANSWERS_MAX:
                    self.counters.answers_dropped += 1
                    continue
                connection.waiting.add(answer)
                connection.answers.append(answer)
            self._condition.notify_all()

    def answer_metadata(self, device: DeviceId, bundle: bytes) -> None:
        """Send the signed documents to one device; of several answers that wait for it the last one counts."""
        if self._reply(self._topics.metadata_answer(device), bundle):
            self.counters.metadata_answered += 1

    def answer_keys(self, device: DeviceId, answer: KeyAnswer) -> None:
        """Send wrapped content keys to one device, or why there are none."""
        if self._reply(self._topics.keys(device), encode_message(answer)):
            self.counters.keys_answered += 1

    def answer_claim(self, claim: ClaimId, answer: CertificateAnswer | None, *, is_retained: bool) -> None:
        """Tell a device what came of its claim; None takes the answer away."""
        payload = encode_message(answer) if answer is not None else b""
        message = _Message(self._topics.claim_answer(claim), payload, is_retained=is_retained)
        self._send(iter([message]))

    def answer_renewal(self, device: DeviceId, answer: CertificateAnswer) -> None:
        """Tell a device what came of its wish for the next certificate."""
        message = _Message(self._topics.certificate(device), encode_message(answer), is_retained=False)
        self._send(iter([message]))

    # Sending

    def _reply(self, topic: str, payload: bytes) -> bool:
        """Send something to one device that overtakes chunks; whether it will be."""
        with self._condition:
            connection = self._connection
            if connection is None or connection.is_lost:
                return False
            is_kept = topic in connection.replies or len(connection.replies) < WINDOW_MESSAGES
            if is_kept:
                connection.replies[topic] = payload
            else:
                self.counters.answers_dropped += 1
            self._condition.notify_all()
            return is_kept

    def _send(self, messages: Iterator[_Message], confirmation: Event | None = None) -> None:
        with self._condition:
            if self._connection is not None and not self._connection.is_lost:
                self._connection.ordered.append(_Ordered(messages, confirmation))
                self._condition.notify_all()

    def _encoded(self, name: Digest, index: int) -> bytes:
        return encode_chunk(name, index, self._read_chunk(name, index))

    def _is_idle(self) -> bool:
        connection = self._connection
        return connection is None or connection.is_lost or not (connection.ordered or connection.in_flight)

    def _run(self) -> None:
        attempt = 0
        while not self._is_stopping:
            connection = self._connect()
            if connection is not None:
                attempt = 0
                self._pump(connection)
                with self._condition:
                    self._connection = None
                _close(connection.client)
                if not self._is_stopping:
                    self._failed(f"connection lost: {connection.reason}")
            bound_ms = min(BACKOFF_MS_MAX, BACKOFF_MS << min(attempt, 10))
            attempt += 1
            with self._condition:
                self._condition.wait_for(lambda: self._is_stopping, self._rng.uniform(0, bound_ms) / 1000)

    def _connect(self) -> _Connection | None:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=MQTTv311,
            reconnect_on_failure=False,  # paho's own waits have no jitter
        )
        client.max_inflight_messages_set(WINDOW_MESSAGES)
        client.connect_timeout = CONNECT_TIMEOUT_S
        connection = _Connection(client)

        def on_connect(_c: Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
            if reason.is_failure:
                self._lose(connection, f"refused: {reason}")
            with self._condition:
                connection.is_accepted = True
                self._condition.notify_all()

        client.on_connect = on_connect
        client.on_disconnect = lambda _c, _u, _f, reason, _p: self._lose(connection, str(reason))
        client.on_publish = lambda _c, _u, mid, _r, _p: self._confirmed(connection, mid)
        client.on_message = lambda _c, _u, message: self._received(message)
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: self._granted(connection, mid, reasons)
        try:
            if self._tls is not None:
                client.tls_set_context(self._tls())
            client.connect(self._host, self._port, KEEP_ALIVE_S)
        except (OSError, WhimbrelError) as error:
            self._failed(getattr(error, "strerror", None) or str(error))
            return None
        client.loop_start()
        is_accepted = self._wait(connection, lambda: connection.is_accepted, CONNECT_TIMEOUT_S)
        if not (is_accepted and self._subscribe(connection)):
            if not self._is_stopping:
                self._failed(self._explained(connection))
            _close(client)
            return None
        with self._condition:
            self._connection = connection
            was_away, self._last_error = bool(self._last_error), ""
            self.counters.connections += 1
            self._condition.notify_all()
        if was_away:
            _LOG.info("broker %s:%d: connected", self._host, self._port)
        self._post(BrokerConnected())
        return connection

    def _explained(self, connection: _Connection) -> str:
        """Why there is no connection. TLS 1.3 lets a client in before its certificate was looked at, and hangs up then."""
        if self._tls is not None and not connection.is_accepted and connection.reason:
            return "it does not accept this server's certificate (expired, revoked, or of another authority)"
        return connection.reason or "no answer in time"

    def _subscribe(self, connection: _Connection) -> bool:
        names = self._topics.server_filters()
        if self._certify is not None:
            names += self._topics.identity_filters()
        filters = [(name, 1) for name in names]
        wanted = set()
        for at in range(0, len(filters), FILTERS_PER_SUBSCRIBE):
            code, mid = connection.client.subscribe(filters[at : at + FILTERS_PER_SUBSCRIBE])
            if code != MQTT_ERR_SUCCESS or mid is None:
                return False
            wanted.add(mid)
        return self._wait(connection, lambda: wanted <= connection.granted, SUBSCRIBE_TIMEOUT_S)

    def _wait(self, connection: _Connection, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for the broker; false when it did not answer in time, refused, or we have to stop."""
        with self._condition:
            self._condition.wait_for(
                lambda: condition() or connection.is_lost or self._is_stopping, timeout_s
            )
            return condition() and not connection.is_lost and not self._is_stopping

    def _pump(self, connection: _Connection) -> None:
        """Send until the connection is lost: one of each lane in turn, as far as the windows allow."""
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: connection.is_lost or self._is_stopping or _can_send(connection)
                )
                if connection.is_lost or self._is_stopping:
                    return
            try:
                self._send_answer(connection)
                self._send_ordered(connection)
            except StorageError as error:  # a chunk cannot be read: that blob is left to other servers
                _LOG.error("%s", error)

    def _send_ordered(self, connection: _Connection) -> None:
        with self._condition:
            if not connection.ordered or connection.ordered_window >= WINDOW_MESSAGES:
                return
            item = connection.ordered[0]
        try:
            message = next(item.messages, None)
        except StorageError:
            with self._condition:
                connection.ordered.popleft()
            raise
        if message is None:
            with self._condition:
                connection.ordered.popleft()
                item.is_sent = True
                self._condition.notify_all()
            self._confirm(item)
            return
        with self._condition:
            item.unconfirmed += 1
            connection.ordered_window += 1
        self._publish(connection, message, item)
        if message.is_chunk:
            self.counters.chunks_cached += 1

    def _send_answer(self, connection: _Connection) -> None:
        with self._condition:
            if connection.answer_window >= WINDOW_MESSAGES:
                return
            if connection.replies:
                topic = next(iter(connection.replies))
                message = _Message(topic, connection.replies.pop(topic))
            elif connection.answers:
                answer = connection.answers.popleft()
                connection.waiting.discard(answer)
                message = None
            else:
                return
            connection.answer_window += 1
        if message is None:
            device, name, index = answer
            try:
                message = _Message(self._topics.chunk_answer(device), self._encoded(name, index))
            except StorageError:
                with self._condition:
                    connection.answer_window -= 1
                raise
            self.counters.chunks_answered += 1
        self._publish(connection, message, None)

    def _publish(self, connection: _Connection, message: _Message, item: _Ordered | None) -> None:
        is_ordered = item is not None
        info = connection.client.publish(
            message.topic,
            message.payload,
            qos=1 if is_ordered else 0,
            retain=is_ordered and message.is_retained,
        )
        self.counters.messages_published += 1
        self.counters.bytes_published += len(message.payload)
        with self._condition:
            if info.rc != MQTT_ERR_SUCCESS:
                self._lose(connection, f"publish failed with code {info.rc}")
                return
            connection.in_flight[info.mid] = item
            is_early = info.mid in connection.early
            connection.early.discard(info.mid)
        if is_early:
            self._confirmed(connection, info.mid)

    # Callbacks, in paho's thread

    def _confirmed(self, connection: _Connection, mid: int) -> None:
        with self._condition:
            if mid not in connection.in_flight:
                connection.early.add(mid)
                return
            item = connection.in_flight.pop(mid)
            if item is None:
                connection.answer_window -= 1
            else:
                connection.ordered_window -= 1
                item.unconfirmed -= 1
            self._condition.notify_all()
        if item is not None:
            self._confirm(item)

    def _confirm(self, item: _Ordered) -> None:
        with self._condition:
            confirmation = item.confirmation if item.is_sent and not item.unconfirmed else None
            if confirmation is not None:
                item.confirmation = None
        if confirmation is not None:
            self._post(confirmation)

    def _granted(self, connection: _Connection, mid: int, reasons: list[ReasonCode]) -> None:
        if any(reason.is_failure for reason in reasons):
            self._lose(connection, "the broker refused a subscription")
        with self._condition:
            connection.granted.add(mid)
            self._condition.notify_all()

    def _received(self, message: MQTTMessage) -> None:
        self.counters.messages_received += 1
        try:
            event = self._decoded(message)
            asked = self._asked(message) if event is None and self._certify is not None else None
        except ForgedReportError as error:
            self.counters.reports_forged += 1
            self._doubt(message.topic, error)
            return
        except WhimbrelError as error:
            self.counters.messages_invalid += 1
            _LOG.debug("%s: %s", message.topic[:200], error)
            return
        if event is not None:
            self._post(event)
        if asked is not None and self._certify is not None:
            self._certify(asked)

    def _doubt(self, topic: str, error: ForgedReportError) -> None:
        """Say once that somebody speaks for a device, until it speaks for itself again."""
        parsed = self._topics.parse(topic)
        assert isinstance(parsed, ReportTopic)
        if parsed.device not in self._doubted and len(self._doubted) < DOUBTED_MAX:
            self._doubted.add(parsed.device)
            _LOG.warning("%s; ignored", error)

    def _decoded(self, message: MQTTMessage) -> Event | None:
        payload = bytes(message.payload)
        if not payload:
            return None  # a retained message was deleted: unknown is not the same as gone
        match self._topics.parse(message.topic):
            case ReportTopic(device):
                report = self._open_report(device, message.topic, payload)
                self._doubted.discard(device)
                return ReportReceived(device, report)
            case LinkTopic(device):
                return LinkReceived(device, decode_message(Link, payload).online)
            case RequestTopic(device):
                return RequestReceived(device, decode_request(payload))
        return None

    def _asked(self, message: MQTTMessage) -> IdentityEvent | None:
        match self._topics.parse(message.topic):
            case RenewalTopic(device):
                request = decode_message(CertificateRequest, bytes(message.payload))
                return RenewalRequested(device, message.topic, request)
            case ClaimRequestTopic(claim):
                request = decode_message(CertificateRequest, bytes(message.payload))
                return ClaimUsed(claim, message.topic, request)
        return None

    def _lose(self, connection: _Connection, reason: str) -> None:
        with self._condition:
            connection.reason = connection.reason or reason
            connection.is_lost = True
            self._condition.notify_all()

    def _failed(self, reason: str) -> None:
        error = TransportError(
            f"broker {self._host}:{self._port}: {reason}", hint="is it running? trying again"
        )
        if not self._last_error:
            _LOG.warning("%s", error)
        self._last_error = str(error)


def _can_send(connection: _Connection) -> bool:
    has_answers = connection.answers or connection.replies
    return bool(
        (connection.ordered and connection.ordered_window < WINDOW_MESSAGES)
        or (has_answers and connection.answer_window < WINDOW_MESSAGES)
    )


def _close(client: Client) -> None:
    client.disconnect()
    client.loop_stop()
