"""Everything that is known about a run; `--json` prints it, the page and the summary are made from it."""

from typing import Literal

from msgspec import Struct

RECORD_VERSION = 1

FaultKind = Literal["cut", "sleep", "kill"]


class Transition(Struct, frozen=True, kw_only=True):
    """A device moved from one state to another."""

    at_ms: int  # since the run began
    device: str
    source: str
    target: str
    version: str  # that the update leads to
    code: str = ""


class Fault(Struct, frozen=True, kw_only=True):
    """Something was done to a device."""

    at_ms: int
    device: str
    kind: FaultKind  # link cut | link gone to sleep under a connection | SIGKILL
    state: str  # in which the device was, by its own trace
    is_mid_update: bool


class Phase(Struct, frozen=True, kw_only=True):
    """A part of the run."""

    name: str
    begin_ms: int
    end_ms: int


class DeviceResult(Struct, frozen=True, kw_only=True):
    """One device and what it went through."""

    device: str
    tier: str
    link: str
    bandwidth_bytes_s: int
    latency_ms: int
    is_sleeper: bool
    is_process: bool
    factory_version: str
    final_version: str
    is_canary: bool  # in the good rollout
    is_delta: bool  # the good update came as a delta
    update_ms: int | None  # from the request to the commit of the good version
    transfer_bytes: int  # of the good update, as planned from signed metadata
    full_bytes: int  # what whole files would have taken
    air_bytes: int  # that reached the device during both rollouts, everything included
    chunks_stored: int
    chunks_twice: int  # stored more than once
    redundant_chunks: int  # received although there already
    resumes: int
    cuts: int  # connections lost in the middle of an update
    kills: int  # in the middle of an update
    asked: int
    answered: int
    failed: int
    bad_outcome: str = ""  # of the bad version; empty where it was never offered
    bad_code: str = ""


class Member(Struct, frozen=True, kw_only=True):
    """A device in a rollout, as the server saw it."""

    device: str
    wave: str
    status: str
    code: str
    detail: str
    asked_ms: int
    decided_ms: int | None
    prompts_passed: int | None = None
    prompts_total: int | None = None
    latency_p99_ms: float | None = None
    memory_peak_bytes: int | None = None


class Rollout(Struct, frozen=True, kw_only=True):
    """A rollout, as the server saw it."""

    rollout: str
    version: str
    state: str
    reason: str
    canary_count: int
    created_ms: int
    finished_ms: int | None
    members: list[Member]


class ModelVersion(Struct, frozen=True, kw_only=True):
    """A version of the model and what its builder measured."""

    version: str
    length: int
    score: float | None = None  # share of held-out inputs answered rightly, or mean log-probability
    story: str = ""


class Traffic(Struct, frozen=True, kw_only=True):
    """What one rollout put on the air."""

    version: str
    devices: int  # that fetched something
    delta_bytes: int  # size of the delta, 0 where there was none
    file_bytes: int  # size of the whole file
    air_bytes: int  # that reached the devices, everything included
    full_bytes: int  # what whole files would have taken for these devices


class Answer(Struct, frozen=True, kw_only=True):
    """What a device answered to a prompt, before and after the good update."""

    device: str
    prompt: str
    expected: str
    before: str
    after: str


class Check(Struct, frozen=True, kw_only=True):
    """One promise and whether this run kept it."""

    name: str
    wanted: str
    measured: str
    is_passed: bool


class Totals(Struct, frozen=True, kw_only=True):
    """Sums over the fleet, computed once so that all outputs say the same."""

    devices: int
    on_good_version: int
    cut_devices: int
    cuts: int
    killed_devices: int
    kills: int
    chunks_stored: int
    chunks_twice: int
    redundant_chunks: int
    resumes: int
    delta_chunks: int
    delta_bytes: int
    air_bytes: int
    full_bytes: int
    asked: int
    answered: int
    failed: int
    update_p50_ms: int | None
    update_max_ms: int | None


class Run(Struct, frozen=True, kw_only=True):
    """A whole run."""

    v: int = RECORD_VERSION
    model: str  # what kind of model, for people
    score_name: str
    family: str
    devices_asked: int
    seed: int
    broker: str
    command: str
    started: str  # ISO 8601, UTC
    duration_ms: int
    phases: list[Phase]
    models: list[ModelVersion]
    totals: Totals
    checks: list[Check]
    rollouts: list[Rollout]
    traffic: list[Traffic]
    devices: list[DeviceResult]
    faults: list[Fault]
    transitions: list[Transition]
    answers: list[Answer] = []

    @property
    def is_passed(self) -> bool:
        """Whether every check passed."""
        return all(check.is_passed for check in self.checks)
