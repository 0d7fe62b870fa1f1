"""Live updates: what changed since the last look, to every page that listens, as server-sent events.

One look at the coordinator twice a second serves all pages; it costs what changed, not the fleet. A page gets everything when it comes, then
changes. One that is too slow for them gets everything again.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from server.coordinator import Coordinator
from server.fleet.registry import DeviceRecord
from server.ports import Clock
from server.runtime import Server
from server.web.pictures import fleet_picture

INTERVAL_S: Final = 0.5
FIGURES_EVERY: Final = 2
"""Looks between two counts of the whole fleet, which cost what the fleet does."""

LISTENERS_MAX: Final = 200
WAITING_MAX: Final = 20
"""Events that wait for one page: ten seconds; then it starts anew."""

DEVICES_MAX: Final = 20_000
"""Devices that are sent one by one, the first in the order of their names; of a larger fleet pages show counts and search."""

_encode: Final = msgspec.json.Encoder().encode


class Feed:
    """Looks, and tells those who listen.

    Args:
        server: What to look at.
        clock: Wall clock.
    """

    def __init__(self, server: Server, clock: Clock) -> None:
        self._server = server
        self._clock = clock
        self._revision = 0
        self._devices: dict[str, list[Any]] = {}
        self._figures = b"{}"
        self._listeners: set[asyncio.Queue[bytes | None]] = set()
        self._looks = 0
        self._looking = asyncio.Lock()

    @property
    def is_full(self) -> bool:
        """Whether nobody else can listen."""
        return len(self._listeners) >= LISTENERS_MAX

    async def run(self) -> None:
        """Look and tell until cancelled."""
        while True:
            if self._listeners:
                await self._look()
            await asyncio.sleep(INTERVAL_S)

    async def listen(self) -> AsyncIterator[bytes]:
        """Events for one page, as they stand in the answer."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(WAITING_MAX)
        await self._look()
        self._listeners.add(queue)
        try:
            yield b"retry: 2000\n\n"
            yield self._everything()
            while True:
                event = await queue.get()
                if event is None:  # it fell behind
                    yield self._everything()
                else:
                    yield event
        finally:
            self._listeners.discard(queue)

    async def _look(self) -> None:
        async with self._looking:  # what was read first is told first
            await self._tell_news()

    async def _tell_news(self) -> None:
        is_counting = self._looks % FIGURES_EVERY == 0
        self._looks += 1
        changed, figures = await asyncio.to_thread(
            self._server.look, lambda core: self._read(core, is_counting)
        )
        rows = {str(record.device): device_row(record) for record in changed}
        if len(self._devices) + len(rows) > DEVICES_MAX:
            rows = {name: row for name, row in rows.items() if name in self._devices}
        self._devices.update(rows)
        if rows:
            self._tell(_event("devices", _encode(list(rows.values()))))
        if figures and figures != self._figures:
            self._figures = figures
            self._tell(_event("fleet", figures))

    def _read(self, coordinator: Coordinator, is_counting: bool) -> tuple[list[DeviceRecord], bytes]:  # noqa: FBT001 - one caller
        changed = coordinator.registry.changed_since(self._revision)
        self._revision = coordinator.registry.revision
        if not is_counting:
            return changed, b""
        host, port = self._server.broker_address
        picture = fleet_picture(
            coordinator,
            self._server.config.fleet,
            f"{host}:{port}",
            self._clock.now_ms(),
            is_connected=self._server.is_connected,
        )
        return changed, picture.model_dump_json().encode()

    def _everything(self) -> bytes:
        return _event("all", _encode(list(self._devices.values()))) + _event("fleet", self._figures)

    def _tell(self, event: bytes) -> None:
        for queue in self._listeners:
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                while not queue.empty():
                    with contextlib.suppress(asyncio.QueueEmpty):
                        queue.get_nowait()
                queue.put_nowait(None)


def device_row(record: DeviceRecord) -> list[Any]:
    """A device in a few bytes: name, online, family, version, state, target, outcome, code, received, full."""
    report = record.report
    update = report.update if report else None
    return [
        record.device,
        int(record.is_online),
        record.family,
        record.version,
        report.state if report else "",
        update.version if update else "",
        update.outcome if update else "",
        update.code if update else "",
        update.received_bytes if update else 0,
        update.full_bytes_total if update else 0,
    ]


def _event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
