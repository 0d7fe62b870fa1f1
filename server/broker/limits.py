"""What the broker core accepts, and what it counts. Every bound has its unit and its reason."""

from dataclasses import dataclass

from protocol.errors import RequestError


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """Bounds on what clients can make the broker hold or do; defaults follow mosquitto where it has one.

    Raises:
        RequestError: A bound is below one or beyond what MQTT can express.
    """

    packet_bytes_max: int = 8 << 20
    """A packet, fixed header included. Chunks are 64 KiB; the largest metadata is 1 MiB."""

    connections_max: int = 10_000
    """Sockets, also those that have not sent CONNECT yet."""

    connect_timeout_ms: int = 10_000
    """How long a connection may stay silent before its CONNECT (standard, section 3.1.4)."""

    sessions_max: int = 200_000
    """Sessions, connected or not. When it is reached, the one that has been offline longest goes."""

    client_id_bytes_max: int = 256
    """The standard asks for 23; device ids and certificate names are longer."""

    topic_bytes_max: int = 1_024
    """A topic or a filter. Ours are below 200."""

    topic_levels_max: int = 32
    """Levels of a topic or a filter; bounds the depth of both trees."""

    subscriptions_per_session_max: int = 1_000
    """Filters that one session holds. A device needs a handful, a server a dozen."""

    filters_per_packet_max: int = 1_000
    """Filters in one SUBSCRIBE or UNSUBSCRIBE; bounds the retained look-ups that one packet causes."""

    inflight_max: int = 20
    """QoS 1 and 2 messages sent to a session and not yet acknowledged (mosquitto `max_inflight_messages`)."""

    inbound_unreleased_max: int = 1_000
    """QoS 2 identifiers of a publisher that wait for PUBREL."""

    queue_messages_max: int = 1_000
    """QoS 1 and 2 messages waiting for a session (mosquitto `max_queued_messages`); the newest is dropped."""

    queue_bytes_max: int = 256 << 20
    """Payload bytes in that queue: 1,000 chunks of 64 KiB and some."""

    retained_messages_max: int = 200_000
    """Retained messages; a new topic beyond it is delivered and not kept."""

    retained_bytes_max: int = 1 << 30
    """Payload bytes of retained messages; likewise."""

    unsent_bytes_max: int = 16 << 20
    """Bytes handed to a connection's edge and not yet taken by its network. Two groups of chunks are 1 MiB; beyond
    this bound QoS 0 is dropped and counted, QoS 1 and 2 wait in the queue."""

    unsent_control_bytes: int = 64 << 10
    """Room above that bound for acknowledgements; a client that fills it too does not read and is closed."""

    match_cache_topics: int = 4_096
    """Topics whose subscribers are remembered between changes of subscriptions."""

    def __post_init__(self) -> None:
        """Check the ranges, so that no limit can be configured away by mistake."""
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise RequestError(f"broker limit {name} is below 1")
        if self.inflight_max > 65_535:
            raise RequestError("broker limit inflight_max is above 65535, the number of packet identifiers")
        if self.packet_bytes_max > 268_435_460:
            raise RequestError("broker limit packet_bytes_max is above what MQTT can express (268435460)")


@dataclass(slots=True)
class BrokerStatistics:
    """What happened since the core was made. Bytes are those on the wire unless the name says payload."""

    connections_now: int = 0
    connections_peak: int = 0
    connections_total: int = 0
    sessions_now: int = 0
    subscriptions_now: int = 0

    packets_in: int = 0
    bytes_in: int = 0
    messages_in: int = 0
    """PUBLISH packets received, repetitions included."""
    packets_out: int = 0
    bytes_out: int = 0
    messages_out: int = 0
    """PUBLISH packets sent, repetitions included."""

    queued_messages_now: int = 0
    queued_messages_peak: int = 0
    unsent_bytes_peak: int = 0
    """Most that any single connection had outstanding."""

    dropped_queue_full: int = 0
    """QoS 1 and 2 messages that found a full queue."""
    dropped_slow_consumer: int = 0
    """QoS 0 messages to a connection beyond `unsent_bytes_max`."""
    discarded_with_session: int = 0
    """Queued or unacknowledged messages that went with a session which was wiped or displaced."""

    retained_messages: int = 0
    retained_payload_bytes: int = 0
    retained_payload_bytes_peak: int = 0
    retained_refused: int = 0
    """Retained messages that were delivered and not kept, because the store was full."""

    wills_published: int = 0
    takeovers: int = 0
    keep_alive_expired: int = 0
    protocol_errors: int = 0
    """Connections closed because of what they sent."""
    refused_connects: int = 0
    """CONNECT packets answered with a refusal, and connections beyond `connections_max`."""
    sessions_displaced: int = 0

    @property
    def dropped(self) -> int:
        """Messages that a subscriber should have had and did not get, for whatever reason."""
        return self.dropped_queue_full + self.dropped_slow_consumer + self.discarded_with_session
