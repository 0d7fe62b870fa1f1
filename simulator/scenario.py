"""What is simulated, as one value: every number that a run depends on. A run is a function of its scenario.

Plain structs with bounds, so that a file can be converted to them and every mistake names its field.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, le=10_000_000)]
Positive = Annotated[int, Meta(ge=1, le=1 << 50)]
Seconds = Annotated[float, Meta(ge=0, le=31_536_000)]
Milliseconds = Annotated[float, Meta(ge=0, le=3_600_000)]
Hour = Annotated[float, Meta(ge=0, lt=24)]

ReleaseKind = Literal["good", "wrong", "slow", "hungry", "crashes", "hangs", "unloadable", "kills"]
"""What a release is like on a device: `wrong` answers badly, `slow` and `hungry` pass their limits, `crashes` and `hangs`
end the trial, `unloadable` passes it and is then refused by the runtime, `kills` takes the device down with it."""


class Link(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A kind of link between a device and the broker."""

    down_bytes_per_s: Positive = 1_000_000
    up_bytes_per_s: Positive = 500_000
    latency_ms: Milliseconds = 30.0
    jitter_ms: Milliseconds = 10.0
    loss: Share = 0.0  # of packets; each costs a repetition and a timeout
    spread: Annotated[float, Meta(ge=1, le=100)] = 1.0  # rates of devices lie within this factor, log-uniform
    metered: bool = False  # bytes are counted apart; planned for at a tenth of the rate
    on_s: Seconds = 0.0  # duty cycle: time with a link, on average; 0 for always
    off_s: Seconds = 0.0  # and without
    online_hours: tuple[Hour, Hour] | None = (
        None  # the link is there from one hour of the day to the other, only
    )
    online_spread_h: Annotated[float, Meta(ge=0, le=12)] = 0.0  # of both, either way, anew every day
    night_rate: Annotated[float, Meta(gt=0, le=100)] = 1.0  # factor of the rate between 22 and 6 o'clock
    site_devices: Count = 0  # devices behind one shared line; 0 for a line each
    site_bytes_per_s: Positive = 10_000_000
    trace: tuple[
        tuple[Seconds, Positive], ...
    ] = ()  # instant and down rate, repeated for ever; replaces the rate

    @property
    def comes_and_goes(self) -> bool:
        """Whether it is down at times, without anything being wrong."""
        return bool(self.on_s and self.off_s) or self.online_hours is not None


class DeviceKind(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A kind of device, and how many of them there are."""

    name: Annotated[str, Meta(pattern="^[a-z0-9-]{1,32}$")] = "pi"
    weight: Annotated[float, Meta(gt=0, le=1_000_000)] = 1.0
    tier: Annotated[str, Meta(max_length=64)] = "pi"
    link: Link = Link()
    memory_bytes: Positive = 1 << 30
    disk_bytes: Positive = 1 << 30
    read_bytes_per_s: Positive = 80_000_000
    write_bytes_per_s: Positive = 20_000_000
    decode_bytes_per_s: Positive = 8_000_000  # result bytes of a delta
    sync_ms: Milliseconds = 4.0
    inference_ms: Milliseconds = 8.0
    processor_percent: Annotated[int, Meta(ge=1, le=10_000)] = 30
    runtime_version: Annotated[str, Meta(pattern=r"^\d{1,4}(\.\d{1,4}){0,3}$")] = "1.20.0"
    drift_ppm: Annotated[float, Meta(ge=0, le=100_000)] = 50.0  # of the clock, either way
    clock_off_s: Seconds = 2.0  # of the clock at the start, either way


class ReleasePlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A release and its rollout."""

    version: Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9.-]{0,31}$")] = "v2"
    kind: ReleaseKind = "good"
    at_s: Seconds = 120.0  # after the start, and after the rollout before has ended
    bad_tiers: tuple[str, ...] = ()  # where it is as `kind` says; empty for everywhere
    changed_share: Share = 0.05  # of the model's blocks, against the version before
    canary_count: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    wave_timeout_s: Annotated[float, Meta(ge=1, le=31_536_000)] = 3_600.0
    failures_max: Count = 0  # in a wave, where failures are counted
    judged_by: Literal["count", "tests"] = "count"  # failures, or the server's sequential tests
    waves: Annotated[str, Meta(max_length=1_024)] = (
        ""  # as `whimbrel rollout start --waves`; empty: canaries, then all
    )
    soak_s: Seconds = 0.0  # after each wave
    in_flight_max: Count = 0  # 0: any number
    pace_per_minute: Count = 0  # likewise
    from_version: Annotated[str, Meta(max_length=32)] = ""  # only devices that run this one


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The files of the releases. Bytes are real, and so are the deltas between them."""

    bytes: Annotated[int, Meta(ge=1_024, le=1 << 30)] = 256 << 10
    files: tuple[str, ...] = ()  # real files instead: of the factory's version, then of each release
    health: Annotated[str, Meta(max_length=4_096)] = ""  # of real files: their health plan
    prompts: Annotated[int, Meta(ge=1, le=256)] = 4  # of a made-up health plan


class Broker(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The broker: our own core, with the limits of a large installation."""

    bytes_per_s: Positive = 1_250_000_000
    retained_messages_max: Positive = 2_000_000
    connections_max: Positive = 1_000_000
    unsent_bytes_max: Positive = 16 << 20
    queue_messages_max: Positive = 1_000
    inflight_max: Annotated[int, Meta(ge=1, le=65_535)] = 20


class Server(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The server: what its work costs."""

    event_us: Annotated[float, Meta(ge=0, le=1_000_000)] = 60.0  # of one core, for each event
    transaction_ms: Milliseconds = 5.0  # for each batch that saves something
    bytes_per_s: Positive = 125_000_000  # of answers to single devices
    build_bytes_per_s: Positive = 4_000_000
    retained_bytes_max: Positive = 512 << 20


class Faults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What goes wrong, until `end_s`: probabilities per occasion, and times between events of the whole fleet or one device."""

    end_s: Seconds = 0.0  # none after this; then everything is healed and has to converge
    drop: Share = 0.0  # of QoS 0 messages to devices, silently
    cut: Share = 0.0  # of messages in both directions: the connection breaks, and they are lost
    duplicate: Share = 0.0  # of messages to devices
    delay: Share = 0.0  # of messages to devices: a second or so, those behind them too
    poison: Share = 0.0  # of chunks to devices: a wrong byte
    storage: Share = 0.0  # of disk operations: an error
    crash_effect: Share = 0.0  # before an effect of a device is carried out: its power goes
    crash_disk: Share = 0.0  # in a disk operation, likewise
    power_s: Seconds = 0.0  # mean time between power cuts of a device
    down_s: Seconds = 20.0  # mean time without power
    partition_s: Seconds = 0.0  # mean time between partitions of the fleet
    partition_share: Share = 0.3  # of the devices; they lose and find their links one by one
    partition_length_s: Seconds = 60.0
    clock_s: Seconds = 0.0  # mean time between steps of a device's clock
    clock_step_s: Seconds = 86_400.0  # their mean size, either way
    clock_unset: Share = 0.0  # of devices: start in 1970
    broker_s: Seconds = 0.0  # mean time between crashes of the broker, which keep nothing
    broker_down_s: Seconds = 5.0
    broker_at: tuple[Seconds, ...] = ()  # crashes at set times
    broker_progress: Share = 0.0  # one crash once this share of the fleet runs the first good release
    forget_s: Seconds = 0.0  # mean time between losses of the broker's retained messages
    server_s: Seconds = 0.0  # mean time between crashes of the server
    server_down_s: Seconds = 5.0
    replay_s: Seconds = (
        0.0  # mean time between attacks: older metadata, requests and chunks are published again
    )
    disk_full: Share = 0.0  # of devices: room for less than an update, until faults end


class Scenario(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything that a run depends on."""

    name: Annotated[str, Meta(max_length=64)] = "release"
    seed: Annotated[int, Meta(ge=0, lt=1 << 62)] = 1
    devices: Annotated[int, Meta(ge=1, le=1_000_000)] = 1_000
    first_device: Count = (
        0  # its number: a part of a larger fleet has the links, clocks and luck that it has there
    )
    population: Annotated[tuple[DeviceKind, ...], Meta(min_length=1, max_length=64)] = (DeviceKind(),)
    model: Model = Model()
    releases: Annotated[tuple[ReleasePlan, ...], Meta(min_length=1, max_length=64)] = (ReleasePlan(),)
    broker: Broker = Broker()
    server: Server = Server()
    faults: Faults = Faults()
    boot_spread_s: Seconds = 60.0  # devices are switched on at random within this time
    keep_alive_s: Annotated[int, Meta(ge=5, le=65_535)] = 1_200
    start_hour: Hour = 12.0
    duration_s: Annotated[float, Meta(ge=1, le=31_536_000)] = 86_400.0  # virtual; longer is a failure
    liveness_s: Annotated[float, Meta(ge=1, le=31_536_000)] = 14_400.0  # to converge after the faults
    bin_s: Annotated[float, Meta(ge=0.1, le=86_400)] = 10.0  # resolution of the curves in the result


def encode_scenario(scenario: Scenario) -> bytes:
    """The scenario as JSON: what is not as it would be without a word."""
    return msgspec.json.encode(scenario)
