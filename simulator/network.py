"""Links between devices and the broker: when a packet arrives, and what it cost on the air.

A link is two queues, one per direction, over TCP: packets arrive in order or not at all, a lost one costs time and its
bytes again. Several devices of a site share one line; all of them share the broker's.
"""

from typing import Final

from simulator.loop import US_PER_MS, US_PER_S
from simulator.scenario import Link
from simulator.streams import Stream

SEGMENT_BYTES: Final = 1_460
"""Payload of a TCP segment on Ethernet."""

HEADER_BYTES: Final = 40
"""IPv4 and TCP headers of a segment."""

TIMEOUT_US: Final = 200_000
"""First retransmission timeout of TCP in Linux; doubled for every further loss."""

TIMEOUTS_MAX: Final = 6
_NIGHT_HOURS: Final = (22, 6)
_HOUR_US: Final = 3_600 * US_PER_S
_METERED_SHARE: Final = 10


class Line:
    """A line that several share: one packet after the other.

    Args:
        bytes_per_s: Its rate.
    """

    __slots__ = ("_bytes_per_s", "_free_us")

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_us = 0

    def carry(self, now_us: int, byte_count: int) -> int:
        """When the last byte has left."""
        begin_us = max(now_us, self._free_us)
        self._free_us = begin_us + byte_count * US_PER_S // self._bytes_per_s
        return self._free_us


class Path:
    """The link of one device.

    Args:
        link: Its kind.
        stream: Chance of this link.
        site: The line that it shares with others, if it does.
        day_us: Time of the day at the start.

    Attributes:
        down_bytes: On the air towards the device so far, with headers and repetitions.
        up_bytes: Likewise from the device.
        rate_factor: Its rates, in units of its kind's.
    """

    __slots__ = (
        "_day_us",
        "_down_free_us",
        "_down_last_us",
        "_link",
        "_site",
        "_stream",
        "_up_free_us",
        "_up_last_us",
        "down_bytes",
        "rate_factor",
        "up_bytes",
    )

    def __init__(self, link: Link, stream: Stream, site: Line | None, day_us: int) -> None:
        self.down_bytes = 0
        self.up_bytes = 0
        self._link = link
        self._stream = stream
        self._site = site
        self._day_us = day_us
        self.rate_factor = stream.spread(1.0, link.spread) if link.spread > 1 else 1.0
        self._down_free_us = self._up_free_us = 0
        self._down_last_us = self._up_last_us = 0

    def planned_bytes_per_s(self) -> int:
        """What the device is configured to plan with: a low rate for a metered link, its share of a line of a site."""
        link = self._link
        rate = int((link.trace[0][1] if link.trace else link.down_bytes_per_s) * self.rate_factor)
        if link.site_devices:
            rate = min(rate, link.site_bytes_per_s // link.site_devices)
        return max(1, rate // (_METERED_SHARE if link.metered else 1))

    def down(self, now_us: int, byte_count: int) -> int:
        """A packet from the broker leaves at `now_us`; when it arrives."""
        on_air, late_us = self._lost(byte_count)
        self.down_bytes += on_air
        if self._site is not None:
            now_us = self._site.carry(now_us, on_air)
        begin_us = max(now_us, self._down_free_us)
        self._down_free_us = begin_us + int(on_air * US_PER_S / self._down_rate(begin_us))
        arrival_us = self._down_free_us + late_us + self._latency_us()
        self._down_last_us = max(arrival_us, self._down_last_us)
        return self._down_last_us

    def up(self, now_us: int, byte_count: int) -> int:
        """A packet leaves the device now; when the broker has it."""
        on_air, late_us = self._lost(byte_count)
        self.up_bytes += on_air
        begin_us = max(now_us, self._up_free_us)
        self._up_free_us = begin_us + int(on_air * US_PER_S / self._up_rate(begin_us))
        arrival_us = self._up_free_us + late_us + self._latency_us()
        self._up_last_us = max(arrival_us, self._up_last_us)
        return self._up_last_us

    def cut(self, now_us: int) -> None:
        """The connection is lost: what still waits for the air on either side never goes on it."""
        waiting_us = max(0, self._down_free_us - now_us)
        self.down_bytes -= int(waiting_us * self._down_rate(now_us) / US_PER_S)
        waiting_us = max(0, self._up_free_us - now_us)
        self.up_bytes -= int(waiting_us * self._up_rate(now_us) / US_PER_S)
        self._down_free_us = self._down_last_us = min(self._down_free_us, now_us)
        self._up_free_us = self._up_last_us = min(self._up_free_us, now_us)

    def hold(self, delay_us: int) -> int:
        """Something holds up the last packet from the broker, and those behind it; when it arrives now."""
        self._down_last_us += delay_us
        return self._down_last_us

    def _latency_us(self) -> int:
        jitter_ms = self._link.jitter_ms
        latency_ms = self._link.latency_ms
        return int((latency_ms + jitter_ms * self._stream.random() if jitter_ms else latency_ms) * US_PER_MS)

    def _lost(self, byte_count: int) -> tuple[int, int]:
        """Bytes on the air, headers and repetitions included, and the time that timeouts take."""
        segments = -(-byte_count // SEGMENT_BYTES)
        on_air = byte_count + segments * HEADER_BYTES
        loss = self._link.loss
        if not loss:
            return on_air, 0
        on_air = int(on_air / (1.0 - min(loss, 0.9)))
        late_us, timeout_us = 0, TIMEOUT_US
        for _ in range(TIMEOUTS_MAX):
            if self._stream.random() >= loss:
                break
            late_us += timeout_us
            timeout_us *= 2
        return on_air, late_us

    def _down_rate(self, instant_us: int) -> float:
        link = self._link
        if link.trace:
            length_s = link.trace[-1][0] or 1.0
            at_s = instant_us / US_PER_S % length_s
            rate = next((rate for until_s, rate in link.trace if at_s < until_s), link.trace[-1][1])
        else:
            rate = link.down_bytes_per_s
        return rate * self.rate_factor * self._night(instant_us)

    def _up_rate(self, instant_us: int) -> float:
        return self._link.up_bytes_per_s * self.rate_factor * self._night(instant_us)

    def _night(self, instant_us: int) -> float:
        if self._link.night_rate == 1.0:
            return 1.0
        hour = (self._day_us + instant_us) // _HOUR_US % 24
        return self._link.night_rate if hour >= _NIGHT_HOURS[0] or hour < _NIGHT_HOURS[1] else 1.0
