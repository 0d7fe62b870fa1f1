"""Somebody who may publish anything: says again what was signed or asked for before, and spoils the cache."""

from typing import TYPE_CHECKING, Final

from protocol.chunks import encode_chunk
from protocol.messages import Desired, encode_message
from server.broker.packets import Connack, Connect, Packet, Publish
from simulator.models import FACTORY, FAMILY
from simulator.streams import Stream

if TYPE_CHECKING:
    from simulator.world import World

RECENT: Final = 3
RECENT_SHARE: Final = 0.7
REPLAY_SHARE: Final = 0.5
FORGED_SEQUENCE: Final = (1 << 53) - 1
"""Whoever believed it would never take a request again."""


class Attacker:
    """A client of the broker.

    Args:
        world: With the broker that is attacked.
    """

    def __init__(self, world: "World") -> None:
        self._world = world
        self._connection_id = 0
        self._is_accepted = False

    def strike(self, stream: Stream) -> None:
        """Do one thing of a few."""
        if not self._is_accepted:
            self._connection_id = self._world.broker.accept(self)
            self._world.broker.received(self._connection_id, Connect("attacker"))
        (self._replay_metadata, self._replay_request, self._spoil_chunk)[stream.randrange(3)](stream)

    def transmit(self, connection_id: int, packet: Packet, byte_count: int) -> None:
        """As `Endpoint.transmit`."""
        self._world.broker.sent(connection_id, byte_count)
        self._is_accepted = self._is_accepted or isinstance(packet, Connack)

    def closed(self, connection_id: int) -> None:
        """As `Endpoint.closed`."""
        if connection_id == self._connection_id:
            self._is_accepted = False

    def _replay_metadata(self, stream: Stream) -> None:
        """Something old, most often something that is nearly new: it names what devices are asked for."""
        history = self._world.server.history
        recent = history[-RECENT:] if stream.chance(RECENT_SHARE) else history
        documents = stream.choice(recent).documents
        topics = self._world.topics
        for role, data in documents.delegated:
            self._publish(topics.metadata(role), data)
        self._publish(topics.metadata("targets"), documents.targets)
        self._publish(topics.metadata("snapshot"), documents.snapshot)
        self._publish(topics.metadata("timestamp"), documents.timestamp)

    def _replay_request(self, stream: Stream) -> None:
        """An old request as the director signed it, to whom it was for or to another device, or one with the highest number."""
        device = stream.choice(self._world.devices).config.device
        topic = self._world.topics.desired(device)
        overheard = self._world.server.wishes.get(device)
        if overheard and stream.chance(REPLAY_SHARE):
            self._publish(topic, stream.choice(overheard))
        elif self._world.server.wishes and stream.chance(REPLAY_SHARE):
            self._publish(topic, stream.choice(list(self._world.server.wishes.values()))[-1])
        else:
            forged = Desired(sequence=FORGED_SEQUENCE, rollout="r0", family=FAMILY, version=FACTORY)
            self._publish(topic, encode_message(forged))

    def _spoil_chunk(self, stream: Stream) -> None:
        cached = list(self._world.server.coordinator.cached)
        if cached:
            name = stream.choice(cached)
            self._publish(self._world.topics.chunk(name, 0), encode_chunk(name, 0, b"spoiled"))

    def _publish(self, topic: str, payload: bytes) -> None:
        if self._is_accepted:
            self._world.broker.received(self._connection_id, Publish(topic, payload, retain=True))
