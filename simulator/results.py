"""What a run gives: figures that were counted while it ran, and the failure that ended it, if one did."""

from msgspec import Struct

from simulator.scenario import Scenario


class Failure(Struct, frozen=True, kw_only=True):
    """A promise that was broken, or a fleet that did not converge."""

    promise: int  # number of section 8 of the architecture, 8 for the herd, 9 for convergence, 0 for a crash of the code
    device: int  # -1 where none is to blame
    detail: str
    at_s: float


class Sample(Struct, frozen=True, kw_only=True):
    """The fleet at one instant."""

    at_s: float
    states: dict[str, int]  # devices by state of their update; `down` without power
    connections: int
    broker_bytes: int  # sent so far
    server_events: int  # handled so far
    updated: int  # devices that have committed any release so far


class RolloutOutcome(Struct, frozen=True, kw_only=True):
    """One rollout, as the store has it at the end."""

    rollout: str
    version: str
    kind: str
    state: str
    reason: str
    begun_s: float | None
    finished_s: float | None
    counts: dict[str, int]


class KindTotals(Struct, frozen=True, kw_only=True):
    """Devices of one kind."""

    devices: int
    down_bytes: int
    up_bytes: int
    metered_bytes: int


class BrokerLoad(Struct, frozen=True, kw_only=True):
    """What the broker did; figures of `server.broker.limits.BrokerStatistics` over all its lives."""

    bytes_in: int
    bytes_out: int
    messages_in: int
    messages_out: int
    connections_peak: int
    retained_bytes_peak: int
    dropped_slow_consumer: int
    dropped_queue_full: int
    keep_alive_expired: int


class ServerLoad(Struct, frozen=True, kw_only=True):
    """What the server did."""

    events: int
    busy_s: float
    records_saved: int
    transactions: int
    counters: dict[str, int]


class FleetResult(Struct, frozen=True, kw_only=True):
    """Everything about a run. All but `wall_s`, `cpu_s`, `peak_memory_bytes` and what is derived from them is replayed exactly."""

    scenario: Scenario
    command: str
    failure: Failure | None
    virtual_s: float
    events: int
    checks: int
    trace_digest: str
    versions: dict[str, int]  # devices by the version that answers at the end
    states: dict[str, int]
    outcomes: dict[str, int]  # of the last update on each device; a code follows where there is one
    updates: int  # commits, of all devices and releases
    not_converged: int
    excused: int  # devices that cannot run the last good release: it failed its trial there, or does not fit
    faults: dict[str, int]
    completion_s: list[float]  # from being asked to the commit, by the device's report; sorted
    reached_s: list[
        float
    ]  # of the last good version: from its first rollout's begin until the server knew; sorted
    samples: list[Sample]
    rollouts: list[RolloutOutcome]
    down_bytes: int
    up_bytes: int
    down_bytes_per_device: list[int]  # smallest, median, 95th percentile, largest
    kinds: dict[str, KindTotals]
    broker: BrokerLoad
    server: ServerLoad
    delta_bytes: dict[str, int]  # length of each signed delta, by its versions
    story: list[str] = []
    shrunk: Scenario | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def is_passed(self) -> bool:
        """Whether every promise was kept and the fleet converged."""
        return self.failure is None
