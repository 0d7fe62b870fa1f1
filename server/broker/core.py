"""The MQTT 3.1.1 broker as a pure state machine: packets and instants in, ordered outputs out.

No socket, thread, clock or entropy: `tcp.py` drives it on loopback, the simulator drives it in virtual time. One core
is one broker process; throwing it away and making another is a restart without persistence.

Flow control is part of the core, because it decides what is dropped: each `Send` counts as unsent until the edge
says with `sent()` that the network took its bytes. README.md lists what is done differently from mosquitto.
"""

import heapq
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from server.broker import matching
from server.broker.limits import BrokerLimits, BrokerStatistics
from server.broker.packets import (
    SUBACK_FAILURE,
    Connack,
    Connect,
    Disconnect,
    Malformed,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Received,
    Suback,
    Subscribe,
    Unsuback,
    Unsubscribe,
    wire_bytes,
)
from server.broker.sessions import ACCEPTED, REFUSED_UNAVAILABLE, Connection, Session, refusal_of

if TYPE_CHECKING:
    from collections.abc import Callable


class Send(NamedTuple):
    """Put a packet on a connection; its `byte_count` is to be reported by `sent()` once the network took it.

    The same `Publish` object goes to every QoS 0 subscriber of a message: encode it once.
    """

    connection_id: int
    packet: Packet
    byte_count: int


class Close(NamedTuple):
    """End a connection after what was sent to it before; the core has already forgotten it."""

    connection_id: int
    reason: str


Output: TypeAlias = Send | Close


class BrokerCore:
    """Sessions, subscriptions, queues, retained messages and Wills of one broker.

    Every method that takes `now_ms` returns outputs to be carried out in their order. Instants are milliseconds of
    any clock that does not go back. A `connection_id` is chosen by the caller and never used again.

    Args:
        limits: What clients may make the broker hold.
    """

    def __init__(self, limits: BrokerLimits | None = None) -> None:
        self.limits = limits or BrokerLimits()
        self.statistics = BrokerStatistics()
        self._connections: dict[int, Connection] = {}
        self._sessions: dict[str, Session] = {}
        self._offline: dict[str, None] = {}  # persistent sessions without a connection, longest first
        self._subscriptions: matching.SubscriptionTree[Session] = matching.SubscriptionTree(
            self.limits.match_cache_topics
        )
        self._retained = self._empty_retained()
        self._deadlines: list[tuple[int, int]] = []
        self._named_count = 0
        self._outputs: list[Output] = []
        self._handlers: dict[type, Callable[..., None]] = {
            Publish: self._on_publish,
            Puback: self._on_acknowledgement,
            Pubrec: self._on_acknowledgement,
            Pubcomp: self._on_acknowledgement,
            Pubrel: self._on_pubrel,
            Subscribe: self._on_subscribe,
            Unsubscribe: self._on_unsubscribe,
            Pingreq: self._on_pingreq,
            Disconnect: self._on_disconnect,
        }

    # --- What the edge calls --------------------------------------------------------------------------------

    def connected(self, connection_id: int, now_ms: int) -> list[Output]:
        """A network connection was accepted; it has `connect_timeout_ms` to send CONNECT."""
        assert connection_id not in self._connections, "connection ids are never used twice"
        if len(self._connections) >= self.limits.connections_max:
            self.statistics.refused_connects += 1
            return [Close(connection_id, "the broker has as many connections as it accepts")]
        connection = Connection(connection_id, now_ms, self.limits.connect_timeout_ms)
        self._connections[connection_id] = connection
        self._schedule(connection)
        counts = self.statistics
        counts.connections_total += 1
        counts.connections_now += 1
        counts.connections_peak = max(counts.connections_peak, counts.connections_now)
        return []

    def received(self, connection_id: int, packet: Received, now_ms: int) -> list[Output]:
        """A client sent a packet; one on a connection that the core has closed is ignored."""
        connection = self._connections.get(connection_id)
        if connection is None:
            return []
        connection.heard_ms = now_ms
        if isinstance(packet, Malformed):
            self._fail(connection, packet.reason)
            return self._take()
        counts = self.statistics
        counts.packets_in += 1
        byte_count = wire_bytes(packet)
        counts.bytes_in += byte_count
        session = connection.session
        if byte_count > self.limits.packet_bytes_max:
            self._fail(connection, f"a packet is longer than {self.limits.packet_bytes_max} bytes")
        elif isinstance(packet, Connect):
            self._on_connect(connection, packet)
        elif session is None:
            self._fail(connection, "the first packet is not CONNECT")
        else:
            handler = self._handlers.get(type(packet))
            if handler is None:
                self._fail(connection, f"a client does not send {type(packet).__name__.upper()}")
            else:
                handler(connection, session, packet)
        return self._take()

    def sent(self, connection_id: int, byte_count: int, now_ms: int) -> list[Output]:  # noqa: ARG002 - every entry point takes the instant, so that callers and traces are uniform
        """The network took bytes of earlier `Send` outputs; what waited for room may follow."""
        connection = self._connections.get(connection_id)
        if connection is None:
            return []
        connection.unsent_bytes -= byte_count
        if connection.session is None or not connection.session.queue:
            return []
        self._pump(connection.session, connection)
        return self._take()

    def disconnected(self, connection_id: int, now_ms: int) -> list[Output]:  # noqa: ARG002 - see `sent`
        """The network connection is gone without the core's doing: the Will is published."""
        connection = self._connections.get(connection_id)
        if connection is not None:
            self._end(connection)
        return self._take()

    def deadline(self) -> int | None:
        """Return an instant at which `expire` should be called, or None. It may turn out to be early."""
        deadlines = self._deadlines
        while deadlines:
            instant_ms, connection_id = deadlines[0]
            connection = self._connections.get(connection_id)
            if connection is not None and connection.scheduled_ms == instant_ms:
                return instant_ms
            heapq.heappop(deadlines)
        return None

    def expire(self, now_ms: int) -> list[Output]:
        """Close connections that were silent for one and a half keep-alive periods (section 3.1.2.10)."""
        while (instant_ms := self.deadline()) is not None and instant_ms <= now_ms:
            _, connection_id = heapq.heappop(self._deadlines)
            connection = self._connections[connection_id]
            if connection.heard_ms + connection.silence_ms_max > now_ms:
                self._schedule(connection)
            elif connection.session is None:
                self._fail(connection, "no CONNECT came in time")
            else:
                self.statistics.keep_alive_expired += 1
                self._end(connection, "nothing was heard for one and a half keep-alive periods")
        return self._take()

    def forget_retained(self) -> None:
        """Lose the retained messages, as a broker may at any time; subscriptions and sessions stay."""
        self._retained = self._empty_retained()
        self._count_retained()

    # --- Connecting and leaving -----------------------------------------------------------------------------

    def _on_connect(self, connection: Connection, packet: Connect) -> None:
        if connection.session is not None:
            self._fail(connection, "a second CONNECT on one connection")
            return
        refusal = refusal_of(packet, self.limits)
        if refusal != ACCEPTED:
            self.statistics.refused_connects += 1
            self._control(connection, Connack(session_present=False, code=refusal))
            self._end(connection, f"CONNECT was refused with code {refusal}")
            return
        if packet.will is not None and not matching.is_topic(packet.will.topic, self.limits):
            self._fail(connection, "the topic of the Will is not one")
            return
        client_id = packet.client_id or self._new_client_id()
        self._take_over(client_id)
        session = self._sessions.get(client_id)
        if session is not None and packet.clean_session:
            self._discard(session)
            session = None
        is_present = session is not None
        if session is None:
            if not self._make_room():
                self.statistics.refused_connects += 1
                self._control(connection, Connack(session_present=False, code=REFUSED_UNAVAILABLE))
                self._end(connection, "the broker has as many sessions as it accepts")
                return
            session = self._sessions[client_id] = Session(client_id, is_clean=packet.clean_session)
            self.statistics.sessions_now += 1
        self._offline.pop(client_id, None)
        session.connection, connection.session = connection, session
        connection.will = packet.will
        connection.silence_ms_max = packet.keep_alive_s * 1_500
        self._schedule(connection)
        self._control(connection, Connack(session_present=is_present, code=ACCEPTED))
        for repeated in session.repetitions():
            self._send(connection, repeated, wire_bytes(repeated))
        self._pump(session, connection)

    def _new_client_id(self) -> str:
        while True:
            self._named_count += 1
            client_id = f"unnamed-{self._named_count}"
            if client_id not in self._sessions:
                return client_id

    def _take_over(self, client_id: str) -> None:
        """Close the connection that a client id has already (section 3.1.4); its Will is published."""
        session = self._sessions.get(client_id)
        if session is not None and session.connection is not None:
            self.statistics.takeovers += 1
            self._end(session.connection, "another connection took over the client id")

    def _make_room(self) -> bool:
        """Ensure that one more session fits, at the cost of the one that was away longest."""
        if len(self._sessions) < self.limits.sessions_max:
            return True
        for client_id in self._offline:
            self._discard(self._sessions[client_id])
            self.statistics.sessions_displaced += 1
            return True
        return False

    def _on_disconnect(self, connection: Connection, _session: Session, _packet: Disconnect) -> None:
        connection.will = None  # section 3.14.4
        self._end(connection, "the client disconnected")

    def _fail(self, connection: Connection, reason: str) -> None:
        """Close a connection because of what came over it (section 4.8)."""
        self.statistics.protocol_errors += 1
        self._end(connection, reason)

    def _end(self, connection: Connection, close_reason: str = "") -> None:
        """Forget a connection, and tell the edge to close it when a reason is given."""
        del self._connections[connection.connection_id]
        self.statistics.connections_now -= 1
        if close_reason:
            self._outputs.append(Close(connection.connection_id, close_reason))
        session = connection.session
        if session is not None:
            session.connection = None
            connection.session = None
            if session.is_clean:
                self._discard(session)
            else:
                self._offline[session.client_id] = None
        will = connection.will
        if will is not None:
            self.statistics.wills_published += 1
            self._publish(will.topic, will.payload, will.qos, retain=will.retain)

    def _discard(self, session: Session) -> None:
        counts = self.statistics
        for topic_filter in session.subscriptions:
            self._subscriptions.remove(session, topic_filter)
        del self._sessions[session.client_id]
        self._offline.pop(session.client_id, None)
        counts.subscriptions_now -= len(session.subscriptions)
        counts.queued_messages_now -= len(session.queue)
        counts.discarded_with_session += len(session.queue) + len(session.inflight)
        counts.sessions_now -= 1

    def _schedule(self, connection: Connection) -> None:
        """Note when a connection has been silent for too long; whatever was noted before is stale."""
        if not connection.silence_ms_max:
            connection.scheduled_ms = -1
            return
        connection.scheduled_ms = connection.heard_ms + connection.silence_ms_max
        if len(self._deadlines) > 4 * len(self._connections) + 1_024:
            # Entries of connections that left would otherwise stay until their instant.
            self._deadlines = [
                (other.scheduled_ms, other.connection_id)
                for other in self._connections.values()
                if other.scheduled_ms >= 0 and other is not connection
            ]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (connection.scheduled_ms, connection.connection_id))

    # --- Publishing -----------------------------------------------------------------------------------------

    def _on_publish(self, connection: Connection, session: Session, packet: Publish) -> None:
        self.statistics.messages_in += 1
        if not matching.is_topic(packet.topic, self.limits):
            self._fail(connection, "a PUBLISH names something that is no topic, or one that is too long")
            return
        if packet.qos == 2:
            if packet.packet_id not in session.unreleased:
                if len(session.unreleased) >= self.limits.inbound_unreleased_max:
                    self._fail(connection, "too many QoS 2 messages wait for PUBREL")
                    return
                session.unreleased.add(packet.packet_id)
                self._publish(packet.topic, packet.payload, 2, retain=packet.retain)
            self._control(connection, Pubrec(packet.packet_id))
            return
        self._publish(packet.topic, packet.payload, packet.qos, retain=packet.retain)
        if packet.qos:
            self._control(connection, Puback(packet.packet_id))

    def _on_pubrel(self, connection: Connection, session: Session, packet: Pubrel) -> None:
        session.unreleased.discard(packet.packet_id)
        self._control(connection, Pubcomp(packet.packet_id))

    def _publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        """Keep a message if it is to be kept, and pass it to everyone who subscribed."""
        if retain:
            if payload:
                if not self._retained.keep(topic, payload, qos):
                    self.statistics.retained_refused += 1
            else:
                self._retained.clear(topic)
            self._count_retained()
        matched = self._subscriptions.match(topic)
        if not matched:
            return
        messages = [Publish(topic, payload, each) for each in range(qos + 1)]
        plain_bytes = wire_bytes(messages[0])
        for session, granted in matched:
            if qos and granted:
                self._deliver(session, messages[min(qos, granted)])
            elif session.connection is not None:
                self._send_once(session.connection, messages[0], plain_bytes)

    def _deliver(self, session: Session, message: Publish) -> None:
        """Send a QoS 1 or 2 message now if the window and the connection have room, else let it wait."""
        connection = session.connection
        if (
            connection is not None
            and not session.queue
            and len(session.inflight) < self.limits.inflight_max
            and connection.unsent_bytes < self.limits.unsent_bytes_max
        ):
            numbered = session.begin(message)
            self._send(connection, numbered, wire_bytes(numbered))
            return
        counts = self.statistics
        if session.enqueue(message, self.limits):
            counts.queued_messages_now += 1
            counts.queued_messages_peak = max(counts.queued_messages_peak, counts.queued_messages_now)
        else:
            counts.dropped_queue_full += 1

    def _pump(self, session: Session, connection: Connection) -> None:
        """Send what waited, as far as the window and the connection have room."""
        while (
            session.queue
            and len(session.inflight) < self.limits.inflight_max
            and connection.unsent_bytes < self.limits.unsent_bytes_max
        ):
            self.statistics.queued_messages_now -= 1
            numbered = session.begin(session.dequeue())
            self._send(connection, numbered, wire_bytes(numbered))

    def _on_acknowledgement(
        self, connection: Connection, session: Session, packet: Puback | Pubrec | Pubcomp
    ) -> None:
        release = session.acknowledge(packet)
        if release is not None:
            self._control(connection, release)
        # The connection may just have been closed for not reading.
        if session.queue and session.connection is not None:
            self._pump(session, session.connection)

    # --- Subscribing ----------------------------------------------------------------------------------------

    def _on_subscribe(self, connection: Connection, session: Session, packet: Subscribe) -> None:
        if not self._accepts_filters(connection, [topic_filter for topic_filter, _ in packet.filters]):
            return
        codes = [self._subscribe(session, topic_filter, qos) for topic_filter, qos in packet.filters]
        self._control(connection, Suback(packet.packet_id, tuple(codes)))
        for (topic_filter, _), granted in zip(packet.filters, codes, strict=True):
            if granted != SUBACK_FAILURE and session.connection is not None:
                self._send_retained(session, connection, topic_filter, granted)

    def _accepts_filters(self, connection: Connection, filters: list[str]) -> bool:
        if len(filters) > self.limits.filters_per_packet_max:
            self._fail(connection, f"more than {self.limits.filters_per_packet_max} filters in one packet")
        elif not all(map(matching.is_filter, filters)):
            self._fail(connection, "a topic filter has wildcards where none may be, or is empty")
        else:
            return True
        return False

    def _subscribe(self, session: Session, topic_filter: str, qos: int) -> int:
        """Return the granted QoS, or that the subscription was refused."""
        is_new = topic_filter not in session.subscriptions
        if (
            matching.is_shared(topic_filter)
            or not matching.is_within_limits(topic_filter, self.limits)
            or (is_new and len(session.subscriptions) >= self.limits.subscriptions_per_session_max)
        ):
            return SUBACK_FAILURE
        session.subscriptions[topic_filter] = qos
        self._subscriptions.add(session, topic_filter, qos)
        self.statistics.subscriptions_now += is_new
        return qos

    def _send_retained(
        self, session: Session, connection: Connection, topic_filter: str, granted: int
    ) -> None:
        """Send what is retained, at every SUBSCRIBE, repeated ones too (section 3.8.4)."""
        for message in self._retained.find(topic_filter):
            qos = min(granted, self._retained.qos_of(message.topic))
            if qos:
                self._deliver(session, Publish(message.topic, message.payload, qos, retain=True))
            else:
                self._send_once(connection, message, wire_bytes(message))

    def _on_unsubscribe(self, connection: Connection, session: Session, packet: Unsubscribe) -> None:
        if not self._accepts_filters(connection, list(packet.filters)):
            return
        for topic_filter in packet.filters:
            if session.subscriptions.pop(topic_filter, None) is not None:
                self._subscriptions.remove(session, topic_filter)
                self.statistics.subscriptions_now -= 1
        self._control(connection, Unsuback(packet.packet_id))

    def _on_pingreq(self, connection: Connection, _session: Session, _packet: Pingreq) -> None:
        self._control(connection, Pingresp())

    # --- Sending --------------------------------------------------------------------------------------------

    def _send_once(self, connection: Connection, message: Publish, byte_count: int) -> None:
        """Send at QoS 0, or drop it when the connection has far too much outstanding."""
        if connection.unsent_bytes + byte_count > self.limits.unsent_bytes_max and connection.unsent_bytes:
            self.statistics.dropped_slow_consumer += 1
            return
        self._send(connection, message, byte_count)

    def _control(self, connection: Connection, packet: Packet) -> None:
        """Send an answer; a client that makes us answer without ever reading is closed."""
        if connection.connection_id not in self._connections:
            return
        byte_count = wire_bytes(packet)
        limits = self.limits
        if connection.unsent_bytes + byte_count > (
            limits.unsent_bytes_max + limits.packet_bytes_max + limits.unsent_control_bytes
        ):
            self._fail(connection, "the client does not read what it is sent")
            return
        self._send(connection, packet, byte_count)

    def _send(self, connection: Connection, packet: Packet, byte_count: int) -> None:
        counts = self.statistics
        connection.unsent_bytes += byte_count
        counts.unsent_bytes_peak = max(counts.unsent_bytes_peak, connection.unsent_bytes)
        counts.packets_out += 1
        counts.bytes_out += byte_count
        if type(packet) is Publish:
            counts.messages_out += 1
        self._outputs.append(Send(connection.connection_id, packet, byte_count))

    def _take(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _empty_retained(self) -> matching.RetainedStore:
        return matching.RetainedStore(self.limits.retained_messages_max, self.limits.retained_bytes_max)

    def _count_retained(self) -> None:
        counts, store = self.statistics, self._retained
        counts.retained_messages = len(store)
        counts.retained_payload_bytes = store.payload_bytes
        counts.retained_payload_bytes_peak = max(counts.retained_payload_bytes_peak, store.payload_bytes)
