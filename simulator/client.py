"""A device's connection to the broker over its link: the twin of `device.adapters.mqtt.MqttTransport`.

It waits between attempts as that one does (`device.reconnect`), and a connection that is lost repeats nothing by itself.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from device.adapters.mqtt import CONNECT_TIMEOUT_S
from device.reconnect import Backoff
from protocol.messages import Link, encode_message
from server.broker.packets import (
    Connack,
    Connect,
    Packet,
    Pingreq,
    Puback,
    Publish,
    Subscribe,
    Unsubscribe,
    Will,
    wire_bytes,
)
from simulator.loop import US_PER_S

if TYPE_CHECKING:
    from simulator.device import SimulatedDevice

HANDSHAKE_BYTES: Final = 20
"""Options of the packets that open a TCP connection; headers are counted by the link."""

NOTICE_S: Final = (1.0, 20.0)
"""Until a client notices that its connection carries nothing any more: retransmissions run out, or a ping is missed."""

_OFFLINE: Final = encode_message(Link(online=False))
_ONLINE: Final = encode_message(Link(online=True))
_puback = lru_cache(maxsize=None)(Puback)
_PACKET_ID_MAX: Final = 65_535


class Client:
    """The port `device.ports.Transport`, and an `Endpoint` of the broker.

    Args:
        device: Whose connection it is.
    """

    __slots__ = (
        "_backoff",
        "_connected_us",
        "_connection_id",
        "_device",
        "_generation",
        "_is_enabled",
        "_packet_id",
        "_sent_us",
        "is_connected",
        "is_link_up",
    )

    def __init__(self, device: "SimulatedDevice") -> None:
        self.is_connected = False  # the broker accepted us
        self.is_link_up = True
        self._device = device
        self._backoff = Backoff(device.rng)
        self._is_enabled = False
        self._generation = 0  # of the connection or attempt; whatever belongs to an earlier one is void
        self._connection_id = 0
        self._connected_us = 0
        self._sent_us = 0
        self._packet_id = 0

    # The port

    def subscribe(self, filters: tuple[str, ...], qos: int) -> None:
        """As `Transport.subscribe`."""
        if self.is_connected:
            self._send(Subscribe(self._next_id(), tuple((pattern, qos) for pattern in filters)))

    def unsubscribe(self, filters: tuple[str, ...]) -> None:
        """As `Transport.unsubscribe`."""
        if self.is_connected:
            self._send(Unsubscribe(self._next_id(), filters))

    def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        """As `Transport.publish`."""
        if self.is_connected:
            self._send(Publish(topic, payload, qos, retain, packet_id=self._next_id() if qos else 0))

    def progressed(self) -> None:
        """As `Transport.progressed`."""
        self._backoff.progressed()

    # Life

    def start(self) -> None:
        """Connect, and go on connecting after every loss."""
        self._is_enabled = True
        self._backoff.reset()
        self._connect()

    def vanish(self) -> None:
        """The power is gone: nobody hears of it."""
        self._is_enabled = False
        self.is_connected = False
        self._connection_id = 0
        self._generation += 1
        self._device.path.cut(self._device.world.loop.now_us)

    def link_changed(self, *, is_up: bool) -> None:
        """The network interface came or went; what is on its way is lost, and the broker is not told."""
        if is_up == self.is_link_up:
            return
        self.is_link_up = is_up
        if not is_up and self._is_enabled:
            self._lost(self._generation)

    def break_off(self) -> None:
        """From now on the connection carries nothing, and neither side knows."""
        self._generation += 1
        self._connection_id = 0
        self._device.path.cut(self._device.world.loop.now_us)
        delay_s = self._device.world.fault_stream.uniform(*NOTICE_S)
        self._device.world.loop.after(int(delay_s * US_PER_S), self._lost, self._generation)

    # The broker's side

    def transmit(self, connection_id: int, packet: Packet, byte_count: int) -> None:
        """As `Endpoint.transmit`; over a connection that we have given up nothing comes, and the broker's bytes wait."""
        if connection_id != self._connection_id:
            return
        world = self._device.world
        left_us = world.broker.line.carry(world.loop.now_us, byte_count)
        arrival_us = self._device.path.down(left_us, byte_count)
        if type(packet) is Publish and world.message_faults:
            world.faults.to_device(self._device, packet, byte_count, arrival_us, self._generation)
            return
        world.loop.at(arrival_us, self.arrive, self._generation, packet, byte_count)

    def closed(self, connection_id: int) -> None:
        """As `Endpoint.closed`: the reset takes a while to arrive; a broker that died has sent nothing more."""
        if connection_id != self._connection_id:
            return
        world = self._device.world
        self._connection_id = 0
        if not world.broker.is_up:
            self._device.path.cut(world.loop.now_us)
        world.loop.at(self._device.path.down(world.loop.now_us, 0), self._lost, self._generation)

    def arrive(self, generation: int, packet: Packet, byte_count: int) -> None:
        """A packet is here."""
        if generation != self._generation:
            return
        if byte_count:
            self._device.world.broker.sent(self._connection_id, byte_count)
        kind = type(packet)
        if kind is Publish:
            assert isinstance(packet, Publish)
            if packet.qos:
                self._send(_puback(packet.packet_id))
            self._device.message(packet.topic, packet.payload)
        elif kind is Connack:
            assert isinstance(packet, Connack)
            if packet.code == 0:
                self._accepted()

    def swallow(self, generation: int, byte_count: int) -> None:
        """A packet is lost on the way; the broker's network has sent it."""
        if generation == self._generation:
            self._device.world.broker.sent(self._connection_id, byte_count)

    # Connecting

    def _connect(self) -> None:
        device = self._device
        world = device.world
        self._generation += 1
        if not self.is_link_up:
            self._reconnect_later()
            return
        there_us = device.path.up(world.loop.now_us, HANDSHAKE_BYTES)
        world.loop.at(there_us, self._handshake, self._generation)
        world.loop.after(int(CONNECT_TIMEOUT_S * US_PER_S), self._timed_out, self._generation)

    def _handshake(self, generation: int) -> None:
        """The broker's machine answers; the connection is open one more way later, when CONNECT comes."""
        device = self._device
        world = device.world
        if generation != self._generation:
            return
        back_us = device.path.down(world.loop.now_us, HANDSHAKE_BYTES)
        if not world.broker.is_up:
            world.loop.at(back_us, self._lost, generation)
            return
        connect = Connect(
            device.config.device,
            keep_alive_s=world.scenario.keep_alive_s,
            will=Will(device.link_topic, _OFFLINE, 1, retain=True),
        )
        world.loop.at(
            device.path.up(back_us, wire_bytes(connect)), self._connect_arrived, generation, connect
        )

    def _connect_arrived(self, generation: int, connect: Connect) -> None:
        broker = self._device.world.broker
        if generation != self._generation:
            return
        self._connection_id = broker.accept(self)
        if self._connection_id:
            broker.received(self._connection_id, connect)
        else:
            self.closed(0)

    def _accepted(self) -> None:
        world = self._device.world
        self.is_connected = True
        self._connected_us = world.loop.now_us
        world.loop.after(world.scenario.keep_alive_s * US_PER_S, self._ping, self._generation)
        self.publish(self._device.link_topic, _ONLINE, 1, retain=True)
        self._device.connected()

    def _timed_out(self, generation: int) -> None:
        if generation == self._generation and not self.is_connected:
            self._lost(generation)

    def _lost(self, generation: int) -> None:
        if generation != self._generation or not self._is_enabled:
            return
        self._generation += 1
        self._connection_id = 0
        self._device.path.cut(self._device.world.loop.now_us)
        was_connected, self.is_connected = self.is_connected, False
        if was_connected:
            self._backoff.ended((self._device.world.loop.now_us - self._connected_us) / US_PER_S)
            self._device.disconnected()
        if self._is_enabled:  # the agent's own effects may have met a power cut
            self._reconnect_later()

    def _reconnect_later(self) -> None:
        delay_us = int(self._backoff.wait_s() * US_PER_S)
        self._device.world.loop.after(delay_us, self._reconnect, self._generation)

    def _reconnect(self, generation: int) -> None:
        if generation == self._generation and self._is_enabled:
            self._device.world.checks.reconnecting(self._device)
            self._connect()

    # Sending

    def _send(self, packet: Packet) -> None:
        device = self._device
        world = device.world
        self._sent_us = world.loop.now_us
        arrival_us = device.path.up(self._sent_us, wire_bytes(packet))
        if world.message_faults and type(packet) is Publish and world.faults.from_device(device):
            return
        world.loop.at(arrival_us, self._arrive_at_broker, self._generation, packet)

    def _arrive_at_broker(self, generation: int, packet: Packet) -> None:
        if generation == self._generation:
            self._device.world.broker.received(self._connection_id, packet)

    def _ping(self, generation: int) -> None:
        if generation != self._generation or not self.is_connected:
            return
        loop = self._device.world.loop
        period_us = self._device.world.scenario.keep_alive_s * US_PER_S
        due_us = self._sent_us + period_us
        if due_us <= loop.now_us:
            self._send(Pingreq())
            due_us = loop.now_us + period_us
        loop.at(due_us, self._ping, generation)

    def _next_id(self) -> int:
        self._packet_id = self._packet_id % _PACKET_ID_MAX + 1
        return self._packet_id
