"""Settings of a device: what the pure agent must know, and what the driver around it must know beside."""

from dataclasses import dataclass

from protocol.ids import DeviceId, Family, FleetId


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
    """

    device: DeviceId
    fleet: FleetId
    family: Family
    tier: str = ""
    memory_bytes_max: int = 1 << 30
    delta_memory_bytes_max: int = 128 << 20
    disk_reserve_bytes: int = 16 << 20
    groups_outstanding: int = 2
