"""Who is in the fleet and what will befall each of them: a pure function of count and seed.

The seed decides links, tiers, and which device is cut off or killed at which moment of its update. It cannot decide
how the machine schedules threads, so two runs of one seed tell one story with slightly different times.
"""

import random
from dataclasses import dataclass
from typing import Final, Literal

from protocol.errors import RequestError

DEVICES_MAX: Final = 1_000
"""More is for `whimbrel-sim fleet`: here each device holds a model in memory, two on the disk, and waits its turn for a trial."""

CUT_SHARE: Final = 0.45
KILLED_SHARE: Final = 0.2
KILLED_MAX: Final = 48
"""A device that can be killed is a process of its own and takes some 100 MB."""

SLEEPER_SHARE: Final = 0.15
UNKNOWN_BASE_SHARE: Final = 0.06

Factory = Literal["v1", "v0"]
KillState = Literal["downloading", "installing", "verifying", "trial"]

_TIERS: Final = ("pi5", "pi4", "jetson", "gateway")
_KILL_STATES: Final[tuple[KillState, ...]] = (
    "downloading",
    "trial",
    "downloading",
    "verifying",
    "installing",
)


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """What lies between a device and the broker.

    Attributes:
        name: What people call such a link.
        bandwidth_bytes_s: Towards the device, and from it where `up_bytes_s` says nothing else.
        latency_ms: In each direction.
        awake_ms: Time on the air in each duty cycle; 0 for a link that never sleeps.
        asleep_ms: Time off the air in each duty cycle.
        phase_ms: Where in its cycle the link starts.
        up_bytes_s: From the device; 0 for the same as towards it.
        overhead: Bytes on the air beside each byte of a connection, as headers.
    """

    name: str
    bandwidth_bytes_s: int
    latency_ms: int
    awake_ms: int = 0
    asleep_ms: int = 0
    phase_ms: int = 0
    up_bytes_s: int = 0
    overhead: float = 0.0


@dataclass(frozen=True, slots=True)
class CutPlan:
    """A connection that is lost in the middle of the download.

    Attributes:
        at_share: Share of the expected download that has come through by then.
        offline_ms: How long the link stays down.
    """

    at_share: float
    offline_ms: int


@dataclass(frozen=True, slots=True)
class KillPlan:
    """A device process that is killed with SIGKILL.

    Attributes:
        state: The state in which it dies.
        at_share: Share of the expected download that has come through by then, for `downloading`.
        down_ms: How long until it is started again.
    """

    state: KillState
    at_share: float
    down_ms: int


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One device.

    Attributes:
        device: Its identity.
        tier: Its hardware tier.
        link: Its link.
        factory: The version that it leaves the factory with; the server has never seen the files of `v0`.
        cut: When it loses its connection.
        kill: When its process is killed; such a device runs in a process of its own.
        seed: For its own jitter.
        settings: Further lines of its configuration.
    """

    device: str
    tier: str
    link: LinkProfile
    factory: Factory
    cut: CutPlan | None
    kill: KillPlan | None
    seed: int
    settings: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Kind:
    name: str
    bandwidth_bytes_s: tuple[int, int]
    latency_ms: tuple[int, int]
    weight: int


_KINDS: Final = (
    _Kind("fibre", (1_200_000, 2_000_000), (2, 10), 3),
    _Kind("wifi", (600_000, 1_400_000), (5, 25), 5),
    _Kind("lte", (300_000, 800_000), (30, 70), 5),
    _Kind("lte-m", (150_000, 280_000), (60, 120), 2),
)


def make_population(count: int, seed: int) -> tuple[DevicePlan, ...]:
    """Draw a fleet.

    Args:
        count: Devices, 1 up to `DEVICES_MAX`.
        seed: Decides everything.

    Raises:
        RequestError: `count` or `seed` is out of range.
    """
    if not 1 <= count <= DEVICES_MAX:
        raise RequestError(f"--devices {count} is not possible", hint=f"choose 1 to {DEVICES_MAX}")
    if seed < 0:
        raise RequestError("--seed must not be negative")
    rng = random.Random(f"population/{seed}/{count}")
    order = list(range(count))
    rng.shuffle(order)
    killed = set(order[: min(KILLED_MAX, _share(count, KILLED_SHARE))])
    # Taken from the other end, so that in a large fleet those that are cut off and those that are killed differ.
    cut = set(order[::-1][: _share(count, CUT_SHARE)])
    sleepers = set(rng.sample(range(count), int(count * SLEEPER_SHARE)))
    calm = [number for number in order if number not in killed | cut]
    strangers = set(calm[: int(count * UNKNOWN_BASE_SHARE)])
    kills = {number: position for position, number in enumerate(sorted(killed))}
    width = max(2, len(str(count)))
    return tuple(
        DevicePlan(
            device=f"device-{number + 1:0{width}}",
            tier=rng.choice(_TIERS),
            link=_link(rng, sleeps=number in sleepers),
            factory="v0" if number in strangers else "v1",
            cut=_cut(rng) if number in cut else None,
            kill=_kill(rng, kills[number]) if number in killed else None,
            seed=rng.getrandbits(48),
        )
        for number in range(count)
    )


def _share(count: int, share: float) -> int:
    """That share of a fleet, at least one device."""
    return max(1, round(count * share))


def _link(rng: random.Random, *, sleeps: bool) -> LinkProfile:
    kind = rng.choices(_KINDS, [kind.weight for kind in _KINDS])[0]
    bandwidth = round(rng.uniform(*kind.bandwidth_bytes_s) / 1000) * 1000
    latency = rng.randint(*kind.latency_ms)
    awake, asleep = rng.randint(9_000, 16_000), rng.randint(1_500, 3_000)
    phase = rng.randint(0, awake)
    if not sleeps:
        return LinkProfile(kind.name, bandwidth, latency)
    return LinkProfile(kind.name, bandwidth, latency, awake, asleep, phase)


def _cut(rng: random.Random) -> CutPlan:
    return CutPlan(at_share=round(rng.uniform(0.1, 0.8), 3), offline_ms=rng.randint(500, 3_000))


def _kill(rng: random.Random, position: int) -> KillPlan:
    return KillPlan(
        state=_KILL_STATES[position % len(_KILL_STATES)],
        at_share=round(rng.uniform(0.15, 0.8), 3),
        down_ms=rng.randint(300, 1_500),
    )
