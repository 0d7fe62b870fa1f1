"""What of a scenario can be done live, on one machine with one clock and links that lose nothing; everything else is refused."""

from typing import Any, Final

from msgspec import Struct

from device.adapters.mqtt import KEEPALIVE_S
from protocol.errors import RequestError
from simulator.live.population import DEVICES_MAX
from simulator.scenario import Broker, DeviceKind, Faults, Link, Model, ReleasePlan, Scenario, Server

RATE_MIN: Final = 1_000
"""Bytes per second of a link: a device's configuration counts in kilobytes."""

_DONE: Final[dict[type, frozenset[str]]] = {
    Scenario: frozenset(
        {
            *(
                "name",
                "seed",
                "devices",
                "first_device",
                "boot_spread_s",
                "duration_s",
                "liveness_s",
                "bin_s",
            ),
            *("population", "model", "releases", "broker", "server", "faults"),
        }
    ),
    DeviceKind: frozenset(
        {
            *("name", "weight", "tier", "link", "memory_bytes", "processor_percent"),
            # What this machine is like: the virtual devices are told, the live ones are.
            *("read_bytes_per_s", "write_bytes_per_s", "decode_bytes_per_s", "sync_ms", "inference_ms"),
        }
    ),
    Link: frozenset({"down_bytes_per_s", "up_bytes_per_s", "latency_ms", "spread", "on_s", "off_s"}),
    Model: frozenset({"files", "health"}),
    ReleasePlan: frozenset({"version", "at_s", "canary_count", "wave_timeout_s", "failures_max"}),
    Broker: frozenset(),
    Server: frozenset({"event_us", "transaction_ms", "build_bytes_per_s"}),  # likewise of this machine
    Faults: frozenset({"end_s", "broker_at", "broker_down_s"}),
}
"""Fields that may have any value."""

_ONLY: Final[dict[tuple[type, str], Any]] = {
    (Scenario, "keep_alive_s"): KEEPALIVE_S,
    (DeviceKind, "drift_ppm"): 0.0,
    (DeviceKind, "clock_off_s"): 0.0,
    (Link, "jitter_ms"): 0.0,
}
"""The one value that other fields may have, where it is not the usual one."""


def check_possible(scenario: Scenario) -> None:
    """Refuse what cannot be done live.

    Raises:
        RequestError: A field asks for it; it is named.
    """
    _check(scenario, "")
    if scenario.devices > DEVICES_MAX:
        raise RequestError(
            f"{scenario.devices} devices are too many for live mode", hint=f"choose 1 to {DEVICES_MAX}"
        )
    if len(scenario.releases) != 1:
        raise RequestError(
            f"releases has {len(scenario.releases)} entries, and live mode compares one",
            hint="leave one release",
        )
    if bool(scenario.model.files) != bool(scenario.model.health):
        raise RequestError(
            "model.files and model.health go together: real files are tried by their own health plan",
            hint="set both, or none for the digits of the examples",
        )
    for index, kind in enumerate(scenario.population):
        rate = min(kind.link.down_bytes_per_s, kind.link.up_bytes_per_s) / kind.link.spread
        if rate < RATE_MIN:
            raise RequestError(
                f"population.{index}.link is slower than {RATE_MIN} bytes/s for some devices,"
                " which live mode cannot configure",
                hint="raise down_bytes_per_s or up_bytes_per_s, or lower spread",
            )


def _check(value: Struct, path: str) -> None:
    kind = type(value)
    for name in kind.__struct_fields__:
        found = getattr(value, name)
        place = f"{path}{name}"
        wanted = _ONLY.get((kind, name), _usual(kind, name))
        if name not in _DONE[kind] and found != wanted:
            raise RequestError(
                f"{place} is {_shown(found)}, which live mode cannot do", hint=f"set it to {_shown(wanted)}"
            )
        if isinstance(found, Struct):
            _check(found, f"{place}.")
        elif isinstance(found, tuple):
            for index, each in enumerate(found):
                if isinstance(each, Struct):
                    _check(each, f"{place}.{index}.")


def _usual(kind: type, name: str) -> Any:
    return getattr(kind(), name)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | tuple) else str(value).lower()
