"""A scenario live: the devices, links and instants that chance draws for it in virtual time, with everything else real.

Agents, broker, server, models and trials are those of `run`. What both sides draw comes from the same functions
(`simulator.population`, `simulator.schedule`), so a difference between them is one of the worlds and not of chance.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from protocol.errors import StorageError, TransportError
from server import operations
from server.home import METADATA_FOLDER
from server.operations import RolloutStatus
from server.rollouts.states import FINAL
from server.runtime import Server
from simulator.live.brokers import MOSQUITTO, Embedded, Mosquitto, OwnBroker
from simulator.live.devices import Host, HostedDevice
from simulator.live.fleet import DESCRIPTORS_PER_DEVICE, allow_descriptors
from simulator.live.link import LinkEmulator
from simulator.live.population import DevicePlan, LinkProfile
from simulator.live.server import running_server
from simulator.loop import US_PER_S
from simulator.models import FACTORY, FAMILY, FILE_NAME, FLEET
from simulator.network import HEADER_BYTES, SEGMENT_BYTES
from simulator.population import kind_of, path_of
from simulator.scenario import Scenario
from simulator.schedule import boot_instants_us, duty_cycle
from simulator.streams import derived_seed

PROGRESS_S: Final = 30.0
"""Between two words about how far it got."""

_POLL_S: Final = 0.05
_LOOK_S: Final = 0.5
_MB: Final = 1 << 20
_KB: Final = 1_000


class LiveRun(Struct, frozen=True, kw_only=True):
    """What came of it.

    Attributes:
        reached_s: When the server knew of each device that committed, since the rollout began; ascending.
        counts: Devices by the status that the rollout gave them.
        state: Of the rollout at the end.
        steps: What each device did: instants in milliseconds since the run began, and the state entered.
        down_bytes: That links carried to devices, without headers.
        wall_s: Real time from the first boot to the end.
        cpu_s: Of this process and its children, in that time.
        load: Processes that waited for or had a processor of this machine at the end, by the system's average of a minute.
        processors: Of this machine.
    """

    reached_s: list[float]
    counts: dict[str, int]
    state: str
    steps: list[list[tuple[int, str]]]
    down_bytes: int
    wall_s: float
    cpu_s: float
    load: float
    processors: int


def run_scenario(
    scenario: Scenario, broker: str, folder: Path, tell: Callable[[str], None], limit_s: float
) -> LiveRun:
    """Run a scenario in real time.

    Args:
        scenario: That `simulator.live.possible.check_possible` has let through, with real files.
        broker: `mosquitto` or `embedded`.
        folder: Takes everything.
        tell: Told what goes on.
        limit_s: After so long since the first boot the run is over, whatever is missing.

    Raises:
        WhimbrelError: Something needed is missing or gave up; everything that was started has been stopped.
    """
    allow_descriptors(scenario.devices * DESCRIPTORS_PER_DEVICE)
    with contextlib.ExitStack() as stack:
        own: OwnBroker = Mosquitto(folder) if broker == MOSQUITTO else Embedded()
        own.start()
        stack.callback(own.stop)
        server = stack.enter_context(_served(folder / "server", own.port, scenario))
        live = _LiveScenario(scenario, own, server, folder, tell)
        stack.callback(live.stop)
        live.provision()
        return live.run(limit_s)


class _LiveScenario:
    """The parts of a run."""

    def __init__(
        self,
        scenario: Scenario,
        broker: OwnBroker,
        server: Server,
        folder: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._scenario = scenario
        self._broker = broker
        self._server = server
        self._folder = folder
        self._tell = tell
        self._rollout = ""
        self._is_stopped = False
        self._told_s = 0.0
        self._host = Host(scenario.devices + 2)  # a thread each, since trials wait on theirs
        self._links = LinkEmulator(("127.0.0.1", broker.port), lambda _link, _cause: None)
        self._links.start()
        self._devices: list[HostedDevice] = []

    def provision(self) -> None:
        """Open the links, and put the factory's version on every device.

        Raises:
            WhimbrelError: There is no port or no room left.
        """
        scenario = self._scenario
        for number in range(scenario.first_device, scenario.first_device + scenario.devices):
            plan = plan_of(scenario, number)
            link = self._links.add(plan.device, plan.link)
            place = self._folder / "devices" / plan.device
            self._devices.append(HostedDevice(plan, link, place, self._host))
        home = self._folder / "server"
        root = (home / METADATA_FOLDER / "1.root.json").read_bytes()
        release = operations.list_releases(home)[0].release
        for device in self._devices:
            device.provision(FLEET, release, self._folder / "models" / FACTORY / FILE_NAME, root)

    def run(self, limit_s: float) -> LiveRun:
        """Switch everything on, and wait for the end of the rollout."""
        begun_s, cpu_s = time.monotonic(), _cpu_s()
        begun_ms = time.time_ns() // 1_000_000
        for number, device in enumerate(self._devices, start=self._scenario.first_device):
            changes = duty_cycle(self._scenario, number, kind_of(self._scenario, number).link)
            device.link.follow(begun_s, ((at_us / US_PER_S, is_up) for at_us, is_up in changes))
        for at_s, action in self._story():
            if at_s > limit_s or self._wait(begun_s + at_s):
                break
            action()
        self._wait(begun_s + limit_s)
        status = None
        if self._rollout:
            status = operations.rollout_status(self._folder / "server", self._rollout)
        wall_s = time.monotonic() - begun_s
        self.stop()
        return LiveRun(
            reached_s=[] if status is None else _reached_s(status),
            counts={} if status is None else {str(name): count for name, count in status.counts.items()},
            state="" if status is None else status.rollout.state.value,
            steps=[_steps(device.trace, begun_ms) for device in self._devices],
            down_bytes=sum(device.link.bytes_down for device in self._devices),
            wall_s=wall_s,
            cpu_s=_cpu_s() - cpu_s,
            load=os.getloadavg()[0],
            processors=os.cpu_count() or 1,
        )

    def stop(self) -> None:
        """Stop everything; harmless a second time."""
        if self._is_stopped:
            return
        self._is_stopped = True
        for device in self._devices:
            with contextlib.suppress(TransportError):  # the loop has ended already, which was told before
                device.stop()
        self._host.close()
        self._links.stop()

    def _story(self) -> list[tuple[float, Callable[[], None]]]:
        """What happens at which second after the beginning, in order."""
        scenario = self._scenario
        story: list[tuple[float, Callable[[], None]]] = [
            (boot_us / US_PER_S, device.start)
            for device, boot_us in zip(self._devices, boot_instants_us(scenario), strict=True)
        ]
        # The operator in virtual time looks once a second.
        story.append((math.ceil(scenario.releases[0].at_s), self._roll_out))
        for at_s in scenario.faults.broker_at:
            story.append((at_s, self._kill_broker))
            story.append((at_s + scenario.faults.broker_down_s, self._restart_broker))
        return sorted(story, key=lambda step: step[0])

    def _wait(self, until_s: float) -> bool:
        """Wait for an instant; whether the rollout ended before.

        Raises:
            TransportError: The server or the devices have ended by themselves.
        """
        look_s = 0.0
        while (now_s := time.monotonic()) < until_s:
            if now_s >= look_s:
                look_s = now_s + _LOOK_S
                if self._server.failure is not None:
                    raise TransportError(f"the server ended by itself: {self._server.failure}")
                if self._host.failure is not None:
                    raise TransportError(f"the devices ended by themselves: {self._host.failure!r}")
                if self._is_over():
                    return True
            time.sleep(min(_POLL_S, until_s - now_s))
        return False

    def _is_over(self) -> bool:
        rollouts: list[dict[str, Any]] = self._server.status()["rollouts"]
        for each in rollouts:
            if each["id"] == self._rollout:
                self._tell_progress(each["counts"])
                return each["state"] in FINAL
        return False

    def _tell_progress(self, counts: dict[str, int]) -> None:
        now_s = time.monotonic()
        if now_s >= self._told_s + PROGRESS_S:
            self._told_s = now_s
            self._tell(f"live: {counts.get('committed', 0)} of {len(self._devices)} devices have it")

    def _roll_out(self) -> None:
        plan = self._scenario.releases[0]
        home = self._folder / "server"
        _publish(home, self._scenario, plan.version, Path(self._scenario.model.files[1]))
        record = operations.start_rollout(
            home,
            FAMILY,
            plan.version,
            canary_count=max(1, min(plan.canary_count, len(self._devices))),
            wave_timeout_ms=int(plan.wave_timeout_s * 1_000),
            failures_max=plan.failures_max,
        )
        self._rollout = record.id
        self._tell(f"live: rollout of {plan.version} to {len(self._devices)} devices")

    def _kill_broker(self) -> None:
        self._tell("live: the broker is killed")
        self._broker.kill()
        self._links.lose_all()  # what its machine had not sent is lost with it

    def _restart_broker(self) -> None:
        self._broker.restart()
        self._tell("live: the broker is back, empty")


def plan_of(scenario: Scenario, number: int) -> DevicePlan:
    """A device of a scenario as live mode has it."""
    kind = kind_of(scenario, number)
    path = path_of(scenario, number, kind)
    link = LinkProfile(
        name=kind.name,
        bandwidth_bytes_s=int(kind.link.down_bytes_per_s * path.rate_factor),
        latency_ms=round(kind.link.latency_ms),
        up_bytes_s=int(kind.link.up_bytes_per_s * path.rate_factor),
        overhead=HEADER_BYTES / SEGMENT_BYTES,
    )
    return DevicePlan(
        device=f"d{number:06}",
        tier=kind.tier,
        link=link,
        factory="v1",
        cut=None,
        kill=None,
        seed=derived_seed(scenario.seed, "agent", number),
        settings=(
            ("memory_mb_max", max(1, kind.memory_bytes // _MB)),
            ("disk_reserve_mb", 1),
            ("link_kb_per_s", max(1, path.planned_bytes_per_s() // _KB)),
            ("processor_percent", kind.processor_percent),
        ),
    )


@contextlib.contextmanager
def _served(home: Path, port: int, scenario: Scenario) -> Iterator[Server]:
    operations.init_repository(home, FLEET, broker=f"127.0.0.1:{port}", port=0)
    _publish(home, scenario, FACTORY, Path(scenario.model.files[0]))
    with running_server(home) as server:
        yield server


def _publish(home: Path, scenario: Scenario, version: str, source: Path) -> None:
    """Sign a version as the virtual server does: the same description, name of the file included."""
    file = home.parent / "models" / version / FILE_NAME
    try:
        file.parent.mkdir(parents=True)
        shutil.copyfile(source, file)
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}", hint="choose another folder") from error
    operations.add_release(home, FAMILY, version, [file], runtime="onnx", health=Path(scenario.model.health))
    operations.publish_release(home, FAMILY, version)


def _reached_s(status: RolloutStatus) -> list[float]:
    begun_ms = status.rollout.begun_ms
    if begun_ms is None:
        return []
    return sorted(
        (member.decided_ms - begun_ms) / 1_000
        for member in status.members
        if member.status == "committed" and member.decided_ms is not None
    )


def _steps(trace: Path, begun_ms: int) -> list[tuple[int, str]]:
    steps = []
    for line in trace.read_text().splitlines():
        told = json.loads(line)
        if told["kind"] == "transition":
            steps.append((int(told["t"]) - begun_ms, str(told["to"])))
    return steps


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
