"""The kill test: a real server, a real broker, one real agent that is killed again and again while it updates.

Each kill is aimed at a moment that is drawn from the seed: some time after the start of the process, a chunk of the
download, or an instant inside one of the states. After each of them the state folder must hold a record that loads and an active
slot that is byte for byte a signed release and answers; in the end the last update must have come through.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from device.states import State
from protocol.errors import WhimbrelError
from protocol.release import Release
from server import operations
from server.config import read_config
from server.rollouts.campaign import RolloutRecord
from server.rollouts.states import FINAL, RolloutState
from server.runtime import Server
from tests.kill.device import Device
from tests.kill.models import VERSIONS, write_models

FAMILY: Final = "digits"
LIFE_S_MAX: Final = 20.0
"""An aim that does not come up by then is given up: the agent is killed where it is."""

CONVERGE_S_MAX: Final = 90.0
_OPERATOR_INTERVAL_S: Final = 0.1
_CHUNKS_AIMED_MAX: Final = 60
_START_S_MAX: Final = 0.8
_ANYWHERE_S_MAX: Final = 4.0

# How long after entering a state the kill may come: about as long as the state lasts here.
_DELAYS_S: Final = {
    State.SYNCING: 0.05,
    State.DOWNLOADING: 0.2,
    State.INSTALLING: 0.6,
    State.VERIFYING: 0.03,
    State.TRIAL: 0.8,
    State.COMMITTING: 0.03,
    State.IDLE: 0.1,
}
_AIMS: Final[tuple[tuple[str, int], ...]] = (
    ("start", 3),
    ("anywhere", 2),
    ("chunk", 5),
    *((state.value, 3 if state is State.COMMITTING else 2) for state in _DELAYS_S if state is not State.IDLE),
    (State.IDLE.value, 1),
)


@dataclass
class Outcome:
    """What happened to the agent."""

    kills: int = 0
    updates: int = 0
    states: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    chunks: int = 0
    chunks_again: int = 0
    seconds: float = 0.0


class Operator:
    """Rolls out one version after the other, so that there is always an update to be killed in."""

    def __init__(self, home: Path, outcome: Outcome) -> None:
        self._home = home
        self._outcome = outcome
        self._current: RolloutRecord | None = None
        self._looked_at = 0.0
        self.version = VERSIONS[0]

    def look(self) -> None:
        """Start the next rollout once the last one is through; now and then is enough."""
        now = time.monotonic()
        if now - self._looked_at < _OPERATOR_INTERVAL_S:
            return
        self._looked_at = now
        if self.is_done():
            following = VERSIONS[(VERSIONS.index(self.version) + 1) % len(VERSIONS)]
            if operations.list_devices(self._home):
                self._current = operations.start_rollout(self._home, FAMILY, following, canary_count=1)
                self.version = following

    def is_done(self) -> bool:
        """Whether no rollout is under way; one that ended badly is a violation."""
        if self._current is None:
            return True
        status = operations.rollout_status(self._home, self._current.id)
        if status.rollout.state not in FINAL:
            return False
        bad = [member for member in status.members if member.status != "committed"]
        if status.rollout.state is not RolloutState.FINISHED or bad:
            self._outcome.violations.append(
                f"rollout {status.rollout.id} ended as {status.rollout.state}: {bad}"
            )
        self._outcome.updates += 1
        self._current = None
        return True


def run(count: int, seed: int, folder: Path, *, show: bool = False) -> Outcome:
    """Kill an agent `count` times."""
    rng = random.Random(seed)
    outcome = Outcome()
    began = time.monotonic()
    home = folder / "server"
    root = operations.init_repository(home, "lab", port=0)
    models = write_models(folder, seed)
    releases: dict[str, Release] = {}
    for version, (model, plan) in models.items():
        file = model.rename(folder / "model.onnx")
        record = operations.add_release(home, FAMILY, version, [file], runtime="onnx", health=plan)
        file.rename(model)
        operations.publish_release(home, FAMILY, version)
        releases[version] = record.release
    with Server(read_config(home), seed=seed) as server:
        device = Device(folder, server.broker_port, releases)
        device.provision(VERSIONS[0], {"model.onnx": models[VERSIONS[0]][0]}, root)
        operator = Operator(home, outcome)
        try:
            while outcome.kills < count and not outcome.violations:
                _live_and_die(device, operator, rng, outcome)
                if show:
                    sys.stderr.write(f"\r{outcome.kills} of {count} kills, {outcome.updates} updates ")
            _converge(device, operator, outcome)
        finally:
            device.close()
    device.trace.follow()
    outcome.chunks, outcome.chunks_again = device.trace.chunks, device.trace.chunks_again
    outcome.seconds = time.monotonic() - began
    if outcome.chunks_again:
        outcome.violations.append(f"{outcome.chunks_again} chunks were fetched twice in one update")
    return outcome


def _live_and_die(device: Device, operator: Operator, rng: random.Random, outcome: Outcome) -> None:
    """One life of the agent, up to the moment that was drawn for its death."""
    aim = rng.choices([name for name, _ in _AIMS], [weight for _, weight in _AIMS])[0]
    share = rng.random()
    device.start()
    _await_aim(device, operator, aim, share)
    _spare_the_last_trial(device, operator)
    if not device.is_running:
        outcome.violations.append(f"the agent ended by itself: {_last_line(device.log)}")
        return
    device.kill()
    outcome.kills += 1
    device.trace.follow()
    outcome.states[device.trace.state.value] += 1
    outcome.violations += [f"kill {outcome.kills} ({aim}): {wrong}" for wrong in device.examine()]


def _await_aim(device: Device, operator: Operator, aim: str, share: float) -> None:
    end = time.monotonic() + LIFE_S_MAX

    def wait(condition_s: float, *, state: State | None = None, chunks: int = 0) -> None:
        began = time.monotonic()
        visits, stored = device.trace.visits.copy(), device.trace.chunks

        def has_come() -> bool:
            operator.look()
            if time.monotonic() > end:
                return True
            if state is not None:
                return device.trace.visits[state] > visits[state]
            return device.trace.chunks - stored >= chunks and time.monotonic() - began >= condition_s

        device.wait_for(has_come, LIFE_S_MAX)

    if aim == "start":
        wait(share * _START_S_MAX)
    elif aim == "anywhere":
        wait(share * _ANYWHERE_S_MAX)
    elif aim == "chunk":
        wait(0.0, chunks=1 + int(share * _CHUNKS_AIMED_MAX))
    else:
        state = State(aim)
        if device.trace.state is not state:
            wait(0.0, state=state)
        wait(share * _DELAYS_S[state])


def _spare_the_last_trial(device: Device, operator: Operator) -> None:
    """The third trial of one update has to come to its end, or the release is taken for the culprit."""

    def is_spared() -> bool:
        operator.look()
        return device.may_be_killed_in_trial

    device.wait_for(is_spared, CONVERGE_S_MAX)


def _converge(device: Device, operator: Operator, outcome: Outcome) -> None:
    """Left alone, the agent must bring the last update to its end, and end cleanly when it is asked to."""
    if outcome.violations:
        return
    boots = device.trace.boots
    device.start()
    if not device.wait_for(lambda: device.trace.boots > boots and operator.is_done(), CONVERGE_S_MAX):
        outcome.violations.append(f"left alone, the agent did not finish: {_last_line(device.log)}")
    code = device.stop()
    if code != 0:
        outcome.violations.append(f"asked to end, the agent left with {code}: {_last_line(device.log)}")
    outcome.violations += device.examine()
    record = device.record()
    if record is None or record.active_slot.version != operator.version or record.state is not State.IDLE:
        outcome.violations.append(f"in the end the device does not run {operator.version}")


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    return lines[-1] if lines else "it said nothing"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides the moments (default: %(default)s)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="whimbrel-kill-") as folder:
        try:
            outcome = run(arguments.count, arguments.seed, Path(folder), show=sys.stderr.isatty())
        except WhimbrelError as error:
            sys.stderr.write(f"kill test: {error}\n")
            return 1
    sys.stdout.write(summary(outcome, arguments.seed))
    return 1 if outcome.violations else 0


def summary(outcome: Outcome, seed: int) -> str:
    """The table that is printed."""
    lines = [
        "",
        f"seed                      {seed}",
        f"kills                     {outcome.kills}",
        f"updates brought through   {outcome.updates}",
        f"chunks stored             {outcome.chunks}",
        f"chunks fetched twice      {outcome.chunks_again}",
        f"seconds                   {outcome.seconds:.0f}",
        "killed in state",
        *(f"  {state:<24}{count}" for state, count in sorted(outcome.states.items())),
        *(f"VIOLATION: {violation}" for violation in outcome.violations),
        "every kill left a model that starts, and the last update came through"
        if not outcome.violations
        else f"replay with --seed {seed}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
