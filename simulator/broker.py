"""The server's own broker core in virtual time: connections are objects, packets travel as values.

The counterpart of `server.broker.tcp`; every decision about MQTT is taken by the same `BrokerCore`.
"""

from collections import deque
from typing import Protocol

from server.broker.core import BrokerCore, Output, Send
from server.broker.limits import BrokerLimits
from server.broker.packets import Packet
from simulator.loop import US_PER_MS, Loop
from simulator.network import Line


class Endpoint(Protocol):
    """The other end of a connection, as the broker's network sees it."""

    def transmit(self, connection_id: int, packet: Packet, byte_count: int) -> None:
        """Carry a packet; `VirtualBroker.sent` is to be called once the network has taken it."""

    def closed(self, connection_id: int) -> None:
        """The broker closed the connection, or died."""


class VirtualBroker:
    """One broker process that can be killed.

    Args:
        loop: Virtual time.
        limits: Of the core.
        bytes_per_s: Of its own line, which all connections share.
    """

    def __init__(self, loop: Loop, limits: BrokerLimits, bytes_per_s: int) -> None:
        self.is_up = True
        self.core = BrokerCore(limits)
        self.line = Line(bytes_per_s)
        self.bytes_out = 0
        self._loop = loop
        self._limits = limits
        self._endpoints: dict[int, Endpoint] = {}
        self._connection_id = 0
        self._queue: deque[Output] = deque()
        self._is_carrying = False
        self._armed_us: int | None = None

    def accept(self, endpoint: Endpoint) -> int:
        """Open a connection; 0 while the broker is down."""
        if not self.is_up:
            return 0
        self._connection_id += 1
        self._endpoints[self._connection_id] = endpoint
        self._carry_out(self.core.connected(self._connection_id, self._now_ms()))
        self._arm()
        return self._connection_id

    def received(self, connection_id: int, packet: Packet) -> None:
        """A packet arrived over a connection."""
        if connection_id in self._endpoints:
            self._carry_out(self.core.received(connection_id, packet, self._now_ms()))
            self._arm()

    def sent(self, connection_id: int, byte_count: int) -> None:
        """The network took bytes of earlier packets."""
        if connection_id in self._endpoints:
            self._carry_out(self.core.sent(connection_id, byte_count, self._now_ms()))

    def lost(self, connection_id: int) -> None:
        """The network says that a connection is gone."""
        if self._endpoints.pop(connection_id, None) is not None:
            self._carry_out(self.core.disconnected(connection_id, self._now_ms()))

    def crash(self) -> None:
        """Lose everything: sessions, queues, retained messages, and all connections."""
        self.is_up = False
        self.core = BrokerCore(self._limits)
        self._queue.clear()
        endpoints, self._endpoints = self._endpoints, {}
        self._armed_us = None
        for connection_id, endpoint in endpoints.items():
            endpoint.closed(connection_id)

    def restart(self) -> None:
        """Answer again."""
        self.is_up = True

    def forget_retained(self) -> None:
        """Lose the retained messages only."""
        self.core.forget_retained()

    def _now_ms(self) -> int:
        return self._loop.now_us // US_PER_MS

    def _carry_out(self, outputs: list[Output]) -> None:
        """Outputs in order; what endpoints answer at once is carried out behind them."""
        self._queue.extend(outputs)
        if self._is_carrying:
            return
        self._is_carrying = True
        queue, endpoints = self._queue, self._endpoints
        while queue:
            output = queue.popleft()
            endpoint = endpoints.get(output[0])
            if endpoint is None:
                continue
            if type(output) is Send:
                self.bytes_out += output.byte_count
                endpoint.transmit(output.connection_id, output.packet, output.byte_count)
            else:
                del endpoints[output[0]]
                endpoint.closed(output.connection_id)
            endpoints = self._endpoints  # a crash may come in between
        self._is_carrying = False

    def _arm(self) -> None:
        deadline_ms = self.core.deadline()
        if deadline_ms is None:
            return
        deadline_us = (deadline_ms + 1) * US_PER_MS
        if self._armed_us is None or deadline_us < self._armed_us:
            self._armed_us = deadline_us
            self._loop.at(deadline_us, self._expire, deadline_us)

    def _expire(self, armed_us: int) -> None:
        if armed_us != self._armed_us:
            return
        self._armed_us = None
        self._carry_out(self.core.expire(self._now_ms()))
        self._arm()
