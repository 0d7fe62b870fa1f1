"""What the broker remembers about a client: subscriptions, messages under way, messages that wait.

Pure state, changed by `core.py`. Acknowledgements follow one rule: `inflight` holds, under its identifier, the very
packet that would have to be repeated if the connection were lost now (standard, section 4.4).

| held          | PUBACK | PUBREC          | PUBCOMP |
| ------------- | ------ | --------------- | ------- |
| Publish QoS 1 | done   | ignored         | ignored |
| Publish QoS 2 | ignored| becomes Pubrel  | ignored |
| Pubrel        | ignored| Pubrel again    | done    |
| nothing       | ignored| Pubrel anyway   | ignored |
"""

from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from server.broker.limits import BrokerLimits
from server.broker.packets import PROTOCOL_LEVEL, Connect, Puback, Pubcomp, Publish, Pubrec, Pubrel, Will

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKET_ID_MAX: Final = 65_535

# CONNACK return codes (section 3.2.2.3); nobody is refused for a user name or password.
ACCEPTED: Final = 0
REFUSED_VERSION: Final = 1
REFUSED_CLIENT_ID: Final = 2
REFUSED_UNAVAILABLE: Final = 3


def refusal_of(packet: Connect, limits: BrokerLimits) -> int:
    """Return the code with which a CONNECT has to be answered, as far as the packet itself decides it."""
    if packet.protocol_level != PROTOCOL_LEVEL:
        return REFUSED_VERSION
    if not packet.client_id:
        # Nobody could ever come back to a persistent session without a name (section 3.1.3.1).
        return ACCEPTED if packet.clean_session else REFUSED_CLIENT_ID
    if len(packet.client_id.encode()) > limits.client_id_bytes_max:
        return REFUSED_CLIENT_ID
    return ACCEPTED


class Connection:
    """One connection, with or without a session yet."""

    __slots__ = (
        "connection_id",
        "heard_ms",
        "scheduled_ms",
        "session",
        "silence_ms_max",
        "unsent_bytes",
        "will",
    )

    def __init__(self, connection_id: int, now_ms: int, silence_ms_max: int) -> None:
        self.connection_id = connection_id
        self.session: Session | None = None
        self.will: Will | None = None
        self.heard_ms = now_ms
        self.silence_ms_max = silence_ms_max  # 0: may stay silent for ever
        self.scheduled_ms = -1  # the entry in the core's heap that counts; others are stale
        self.unsent_bytes = 0


class Session:
    """What outlives a connection when the client asked for it (section 3.1.2.4)."""

    __slots__ = (
        "_last_packet_id",
        "client_id",
        "connection",
        "inflight",
        "is_clean",
        "queue",
        "queue_bytes",
        "subscriptions",
        "unreleased",
    )

    def __init__(self, client_id: str, *, is_clean: bool) -> None:
        self.client_id = client_id
        self.is_clean = is_clean
        self.connection: Connection | None = None
        self.subscriptions: dict[str, int] = {}
        self.inflight: dict[int, Publish | Pubrel] = {}
        self.queue: deque[Publish] = deque()
        self.queue_bytes = 0
        self.unreleased: set[int] = set()  # identifiers of QoS 2 messages already passed on (4.3.3, method B)
        self._last_packet_id = 0

    def enqueue(self, message: Publish, limits: BrokerLimits) -> bool:
        """Let a message wait; return False when the queue is full and it was not taken."""
        if len(self.queue) >= limits.queue_messages_max:
            return False
        if self.queue_bytes + len(message.payload) > limits.queue_bytes_max:
            return False
        self.queue.append(message)
        self.queue_bytes += len(message.payload)
        return True

    def dequeue(self) -> Publish:
        """Take the message that has waited longest."""
        message = self.queue.popleft()
        self.queue_bytes -= len(message.payload)
        return message

    def begin(self, message: Publish) -> Publish:
        """Give a message an identifier and hold it until it is acknowledged; there must be room in the window."""
        packet_id = self._last_packet_id
        while True:
            packet_id = packet_id % _PACKET_ID_MAX + 1
            if packet_id not in self.inflight:
                break
        self._last_packet_id = packet_id
        numbered = msgspec.structs.replace(message, packet_id=packet_id)
        self.inflight[packet_id] = numbered
        return numbered

    def acknowledge(self, packet: Puback | Pubrec | Pubcomp) -> Pubrel | None:
        """Apply the table above; return what must be answered."""
        packet_id = packet.packet_id
        held = self.inflight.get(packet_id)
        if isinstance(packet, Pubrec):
            if isinstance(held, Publish) and held.qos == 1:
                return None
            release = Pubrel(packet_id)
            if held is not None:
                # In place: the order of first sending is the order of repeating (section 4.6).
                self.inflight[packet_id] = release
            return release
        is_done = isinstance(held, Pubrel) if isinstance(packet, Pubcomp) else _is_at_least_once(held)
        if is_done:
            del self.inflight[packet_id]
        return None

    def repetitions(self) -> "Iterator[Publish | Pubrel]":
        """Yield what a new connection gets first: everything unacknowledged, in order, marked as repeated."""
        for held in self.inflight.values():
            yield msgspec.structs.replace(held, dup=True) if isinstance(held, Publish) else held


def _is_at_least_once(held: Publish | Pubrel | None) -> bool:
    return isinstance(held, Publish) and held.qos == 1
