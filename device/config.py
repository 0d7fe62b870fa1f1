"""Settings of a device: what the pure agent must know, and what the driver around it must know beside."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from protocol.delta_graph import LINK_BYTES_PER_S, LINKS_MAX
from protocol.errors import RequestError, TopicError
from protocol.ids import DeviceId, Family, FleetId, parse_device_id, parse_family, parse_fleet_id
from protocol.messages import Capacity

_Megabytes = Annotated[int, Meta(ge=1, le=1 << 20)]
_MB = 1 << 20
_KB = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What the agent decides by.

    Attributes:
        device: Identity on the broker and in reports.
        fleet: Fleet that the device belongs to.
        family: The model family that this device runs.
        tier: Hardware tier, as releases name them.
        memory_bytes_max: What a model may take on this device while it runs.
        delta_memory_bytes_max: What applying a delta may take.
        disk_reserve_bytes: Space that an update must leave free.
        groups_outstanding: Chunk groups subscribed to at a time; two keep a link busy without flooding it.
        link_bytes_per_s: What the link carries, for the choice among deltas; a metered one is described by a low rate.
        processor_percent: Speed of one core, with a server's as 100, for the same choice.
        is_in_place: Rewrite the files of the active slot where there is a delta for that, and serve nothing meanwhile: for a disk
            without room for two versions.
    """

    device: DeviceId
    fleet: FleetId
    family: Family
    tier: str = ""
    memory_bytes_max: int = 1 << 30
    delta_memory_bytes_max: int = 128 << 20
    disk_reserve_bytes: int = 16 << 20
    groups_outstanding: int = 2
    link_bytes_per_s: int = LINK_BYTES_PER_S
    processor_percent: int = 100
    is_in_place: bool = False

    @property
    def capacity(self) -> Capacity:
        """What the device can spend on an update."""
        return Capacity(
            link_bytes_per_s=self.link_bytes_per_s,
            processor_percent=self.processor_percent,
            delta_memory_bytes=self.delta_memory_bytes_max,
            links_max=1 if self.is_in_place else LINKS_MAX,
            in_place=self.is_in_place,
        )


class SlotSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[slots]`."""

    in_place: bool = False


class DeviceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A configuration file, `device.toml`."""

    device: str
    fleet: str
    family: str
    state_folder: str
    broker: str = "127.0.0.1:1883"
    tier: Annotated[str, Meta(max_length=64)] = ""
    memory_mb_max: _Megabytes = 1024
    delta_memory_mb_max: _Megabytes = 128
    disk_reserve_mb: _Megabytes = 16
    link_kb_per_s: Annotated[int, Meta(ge=1, le=1_000_000_000)] = LINK_BYTES_PER_S // _KB
    processor_percent: Annotated[int, Meta(ge=1, le=10_000)] = 100
    slots: SlotSettings = SlotSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Everything that a running device needs to know.

    Attributes:
        agent: What the agent decides by.
        folder: Where the device keeps its state.
        broker_host: Name or address of the broker.
        broker_port: Its port.
    """

    agent: AgentConfig
    folder: Path
    broker_host: str
    broker_port: int


def load_config(path: Path) -> DeviceConfig:
    """Read a configuration file; a relative state folder is meant from the file's own folder.

    Raises:
        RequestError: It cannot be read, or a field is missing, unknown or impossible; the field is named.
    """
    try:
        fields: dict[str, Any] = tomllib.loads(path.read_text())
        settings = msgspec.convert(fields, DeviceSettings)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="see device/README.md for its fields") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {error}", hint="see device/README.md for its fields") from error
    try:
        agent = AgentConfig(
            device=parse_device_id(settings.device),
            fleet=parse_fleet_id(settings.fleet),
            family=parse_family(settings.family),
            tier=settings.tier,
            memory_bytes_max=settings.memory_mb_max * _MB,
            delta_memory_bytes_max=settings.delta_memory_mb_max * _MB,
            disk_reserve_bytes=settings.disk_reserve_mb * _MB,
            link_bytes_per_s=settings.link_kb_per_s * _KB,
            processor_percent=settings.processor_percent,
            is_in_place=settings.slots.in_place,
        )
        host, port = parse_address(settings.broker)
    except (TopicError, RequestError) as error:
        raise RequestError(f"{path}: {error}") from error
    folder = path.absolute().parent / settings.state_folder
    return DeviceConfig(agent=agent, folder=folder, broker_host=host, broker_port=port)


def parse_address(text: str) -> tuple[str, int]:
    """Split `host:port`.

    Raises:
        RequestError: It is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise RequestError(f"broker {text!r} is not of the form host:port")
    return host, int(port)
