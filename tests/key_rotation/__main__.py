"""Keys on a live fleet: a server, a broker and agents with real models go through lost, stolen and replaced keys, with a thief among them.

The operator's part is docs/keys.md, line by line. It shows, in this order: a root key is lost and replaced while an update is
under way and some devices are off; both keys of a family are replaced; a thief takes everything that is on the server, signs
with the online keys, fills the cache and speaks on the broker as the server, and nothing wrong runs; the runbook brings the fleet back and it takes
the next release; what the thief has is worth nothing; every key is replaced in the middle of an update; a device that lay in a
drawer all that time, with the first root of all, arrives. Every device is asked all the time, and has to answer rightly.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from device.journal import UpdateRecord
from device.slots import measure_slot
from device.states import RESTING, State
from protocol.ids import digest_of
from protocol.messages import Desired, Report
from server import operations
from server.adapters.keys import PASSPHRASE_VARIABLE
from server.config import FOLDER_VARIABLE
from server.rollouts.states import RolloutState
from tests.endings import run_in_folder
from tests.key_rotation.fleet import FAMILY, Fleet, NotReachedError, broker_of
from tests.key_rotation.runbook import run_line, sections
from tests.key_rotation.thief import HIGHEST, LAST_NUMBER, Thief
from tests.models import write_classifier, write_health_plan
from tests.server.brokers import SecuredBroker

HIDDEN: Final = 4_000
"""About 320 kB of weights: five chunks."""

VERSIONS: Final = ("v1", "v2", "v3", "v4")
DELTA_BYTES: Final = 70_000
"""A forged delta is shorter than the whole file, or no device would choose it."""

DRAWER: Final = "drawer"
OFF_SHARE: Final = 4
"""One device of so many, and at least one, is off while keys are replaced."""

UNDER_WAY: Final = frozenset(State) - frozenset(RESTING)

STRIKE_S: Final = 2.0
"""How long devices are left to what the thief has put before them and they cannot verify."""


@dataclass
class Step:
    """What was gone through."""

    name: str
    seconds: float
    shown: str


@dataclass
class Outcome:
    """What happened."""

    devices: int
    broker: str
    steps: list[Step] = field(default_factory=list)
    answers: int = 0
    violation: str = ""
    status: list[str] = field(default_factory=list)


class Scenario:
    """One fleet, one operator, one thief.

    Args:
        fleet: With nothing in it but the broker.
        folder: Where the operator works; the current folder, as for the runbook.
        names: Of the devices, those first that stay on.
        outcome: Takes down what was gone through.
        is_reduced: With one rollout instead of three, which is the one in the middle of which every key is replaced.
    """

    def __init__(
        self, fleet: Fleet, folder: Path, names: list[str], outcome: Outcome, *, is_reduced: bool
    ) -> None:
        self._fleet = fleet
        self._folder = folder
        self._names = names
        self._off = names[-max(1, len(names) // OFF_SHARE) :]
        self._page = sections()
        self._outcome = outcome
        self._is_reduced = is_reduced
        self._ahead = list(VERSIONS)
        self._running = self._next = ""
        self._evil = (folder / "evil.onnx").read_bytes()

    def run(self) -> None:
        """All of it.

        Raises:
            NotReachedError: Something did not come, or came that must not.
        """
        steps: list[tuple[str, Callable[[], str]]] = [
            ("three people, a first release, devices of two roots", self._set_up),
            ("a root key is lost", self._lose_a_root_key),
            ("both keys of the family are replaced", self._replace_family_keys),
            ("everything on the server is stolen", self._steal),
            ("the runbook: new online keys", self._recover),
            ("the next release", self._next_release),
            ("the thief tries again", self._steal_again),
            ("every key anew, in the middle of an update", self._replace_every_key),
            ("a device comes out of its drawer", self._open_the_drawer),
        ]
        if self._is_reduced:
            del steps[5]  # it is the one in the middle of which every key is replaced
            steps[5], steps[6] = steps[6], steps[5]
        for name, step in steps:
            began = time.monotonic()
            shown = step()
            self._outcome.steps.append(Step(name, round(time.monotonic() - began, 2), shown))
            self._outcome.answers = self._fleet.answers

    # The operator

    def _operate(self, *lines: str) -> None:
        """Run commands of the operator; the fleet goes on between them."""
        for line in lines:
            run_line_quietly(line)
            self._fleet.go_on(0.01)
            if line.startswith("whimbrel broker revoke"):
                self._fleet.forget_revoked()

    def _release(self, builder: str, approver: str) -> str:
        """The section of the runbook, for the next version and today's keys."""
        version = self._ahead.pop(0)
        names = {"v1": version, "builder": builder, "approver": approver}
        text = "\n".join(self._page["A release"])
        for old, new in names.items():
            text = text.replace(f" {old}", f" {new}")
        self._operate(*text.splitlines())
        return version

    def _roll_out(self, version: str) -> str:
        return operations.start_rollout(self._fleet.home, FAMILY, version, canary_count=1).id

    def _finished(self, rollout: str) -> bool:
        state = operations.rollout_status(self._fleet.home, rollout).rollout.state
        if state is RolloutState.STOPPED:
            raise NotReachedError(f"rollout {rollout} was stopped\n" + "\n".join(self._fleet.status()))
        return state is RolloutState.FINISHED

    def _wait_finished(self, rollout: str) -> None:
        looked = 0.0

        def is_finished() -> bool:
            nonlocal looked
            if time.monotonic() - looked < 0.05:
                return False
            looked = time.monotonic()
            return self._finished(rollout)

        self._fleet.wait(is_finished, f"rollout {rollout} is finished")

    def _publish_in_the_middle(
        self, version: str, lines: list[str], states: Collection[State] = UNDER_WAY
    ) -> str:
        """Sign the last of what waits while a device is in one of these states and others are off; bring all to that version."""
        *before, last = lines
        self._operate(*before)
        self._fleet.stop(*self._off)
        rollout = self._roll_out(version)
        on = [name for name in self._names if name not in self._off]
        self._fleet.wait(
            lambda: any(self._is_under_way(name, version, states) for name in on), "an update is under way"
        )
        run_line_quietly(last)
        now = [self._fleet.devices[name].agent.state for name in on]
        busy = [state.value for state in now if state in states]
        if not busy:
            raise NotReachedError("the update was over before the keys were published")
        self._fleet.wait(
            lambda: all(self._fleet.version(name) == version for name in on),
            f"{version} on those that are on",
        )
        self._fleet.start(*self._off)
        self._wait_finished(rollout)
        self._running = version
        self._expect(version)
        return f"published while one was {busy[0]}, {len(self._off)} off; {len(self._names)} run {version}"

    def _is_under_way(self, name: str, version: str, states: Collection[State] = UNDER_WAY) -> bool:
        agent = self._fleet.devices[name].agent
        update = agent.record.update
        return update is not None and update.desired.version == version and agent.state in states

    def _heard_of(self) -> dict[str, Report]:
        """What each device has reported, as the server knows it."""
        devices = operations.list_devices(self._fleet.home)
        return {device.device: device.report for device in devices if device.report is not None}

    def _alarm_of(self, name: str) -> str:
        """Why the device did not take a wish, as its server knows it."""
        report = self._heard_of().get(name)
        return report.alarm or "" if report is not None else ""

    # The steps

    def _set_up(self) -> str:
        rest = self._page["From one machine to three people"][2:]
        is_secured = isinstance(self._fleet.broker, SecuredBroker)
        self._operate(
            *(line for line in rest if not (is_secured and line.startswith("whimbrel broker config")))
        )
        self._release("builder", "approver")
        first_root = self._fleet.home / "metadata/1.root.json"
        for number, name in enumerate([*self._names, DRAWER]):
            self._fleet.provision(name, "v1", first_root if number % 2 == 0 or name == DRAWER else None)
        self._fleet.start_server()
        self._fleet.start(*self._names)
        server = self._fleet.server
        assert server is not None, "it was started"
        self._fleet.wait(lambda: server.status()["devices"] == len(self._names), "the server knows them")
        self._running = "v1"
        return f"{len(self._names)} devices run v1"

    def _lose_a_root_key(self) -> str:
        lines = self._page["A key is lost"]
        if self._is_reduced:
            self._operate(*lines)
            return f"root {self._newest_root()}"
        version = self._release("builder", "approver")
        return self._publish_in_the_middle(version, lines, (State.INSTALLING, State.VERIFYING, State.TRIAL))

    def _replace_family_keys(self) -> str:
        self._operate(*self._page["A key is stolen"])
        self._next = self._release("builder-2", "approver-2")
        return f"{self._next} is signed by the new ones"

    def _steal(self) -> str:
        self._thief = Thief(self._fleet.home, self._folder / "stolen", self._fleet.broker)
        self._fleet.stop_server()  # by the thief: nobody is to speak against him, nor under the same name
        if not self._thief.connect():
            raise NotReachedError("the broker does not take the server's certificate")
        if self._thief.cannot_sign() != ["root", "targets", f"releases.{FAMILY}"]:
            raise NotReachedError(f"the thief cannot sign for {self._thief.cannot_sign()}")
        everybody = [*self._names, DRAWER]
        self._thief.publish_forged(self._next, self._evil)
        self._thief.ask(everybody, self._next, 1_000)
        self._fleet.wait(
            lambda: all(self._update_of(name, 1_000).code for name in self._names),
            "no device takes a forged file",
        )
        codes = sorted({self._update_of(name, 1_000).code for name in self._names})
        self._thief.publish_forged(self._next, self._evil[:DELTA_BYTES], as_delta=True)
        self._thief.ask(everybody, self._next, 1_001)
        self._fleet.wait(
            lambda: all(self._update_of(name, 1_001).full_only for name in self._names),
            "every device tries a forged delta, and goes back to whole files",
        )
        floors = {self._fleet.devices[name].agent.record.floors.timestamp for name in self._names}
        if floors != {HIGHEST}:
            raise NotReachedError(f"the thief's documents were not looked at: {floors}")
        self._thief.ask(everybody, self._running, LAST_NUMBER)
        self._thief.publish_own_release("v9", self._evil)
        self._thief.ask(everybody, "v9", 2_000)
        self._fleet.go_on(STRIKE_S)
        self._expect(self._running)
        return (
            f"a forged file ends with {', '.join(codes)}, a forged delta is of no use, a forged release is not believed; "
            f"all answer with {self._running}"
        )

    def _recover(self) -> str:
        self._operate(*self._page["Somebody was on the server"])
        self._fleet.start_server()
        return f"root {self._newest_root()}"

    def _next_release(self) -> str:
        self._wait_finished(self._roll_out(self._next))
        self._running = self._next
        self._expect(self._running, root=self._newest_root())
        return f"{len(self._names)} run {self._running} and follow root {self._newest_root()}"

    def _steal_again(self) -> str:
        self._thief.close()
        if isinstance(self._fleet.broker, SecuredBroker):
            if self._thief.connect():
                raise NotReachedError("the broker still takes the stolen certificate")
            return "the broker does not let him in"
        self._thief.connect()
        self._thief.publish_own_release("v9", self._evil)
        self._thief.ask([*self._names, DRAWER], "v9", 100_000)
        self._fleet.wait(
            lambda: all(self._alarm_of(name) == "trust.director" for name in self._names),
            "they say that nobody who may has asked for v9",
        )
        self._fleet.go_on(STRIKE_S)
        self._expect(self._running)
        return f"what he signs is not believed; all answer with {self._running}"

    def _replace_every_key(self) -> str:
        version = self._next if self._is_reduced else self._release("builder-2", "approver-2")
        lines = self._page["Every key anew"]
        published = (
            max(number for number, line in enumerate(lines) if line.startswith("whimbrel keys sign")) + 1
        )
        shown = self._publish_in_the_middle(version, lines[:published])
        self._operate(*lines[published:])
        self._expect_no_floor_of_the_thief()
        return shown

    def _open_the_drawer(self) -> str:
        self._fleet.start(DRAWER)
        before = self._fleet.root(DRAWER)
        self._names.append(DRAWER)
        # All others run it: a rollout that begins before the server has heard of this one is finished at once, and asks nobody.
        self._fleet.wait(lambda: DRAWER in self._heard_of(), "the server has heard of the device")
        rollout = self._roll_out(self._running)
        self._fleet.wait(
            lambda: self._fleet.version(DRAWER) == self._running, "the device from the drawer is up to date"
        )
        self._wait_finished(rollout)
        self._expect(self._running)
        self._expect_no_floor_of_the_thief()
        self._fleet.wait(self._is_over, "`whimbrel devices` says that it is over")
        return f"from v1 and root {before} to {self._running} and root {self._fleet.root(DRAWER)}"

    # What has to hold

    def _expect(self, version: str, root: int | None = None) -> None:
        """Every device runs a version, byte for byte, and follows a root."""
        model = digest_of((self._folder / f"{version}.onnx").read_bytes())
        for name in self._names:
            record = self._fleet.devices[name].agent.record
            active = record.active
            assert active is not None, "it answers"
            files = measure_slot(self._fleet.devices[name].disk, active)
            if record.active_slot.version != version or set(files.values()) != {model}:
                raise NotReachedError(f"{name} runs {record.active_slot.version} {files}, and not {version}")
            if root is not None and record.floors.root != root:
                raise NotReachedError(f"{name} follows root {record.floors.root}, and not {root}")

    def _expect_no_floor_of_the_thief(self) -> None:
        for name in self._names:
            floors = self._fleet.devices[name].agent.record.floors.numbers()
            if any(version >= HIGHEST for version in floors.values()):
                raise NotReachedError(f"{name} still has a version of the thief's in its record: {floors}")

    def _is_over(self) -> bool:
        """As the runbook says: the version, the newest root somewhere, no code of trust."""
        reports = self._heard_of().values()
        codes = [report.update.code for report in reports if report.update is not None]
        return (
            len(reports) == len(self._names)
            and all(report.version == self._running for report in reports)
            and max(report.root for report in reports) == self._newest_root()
            and not any(code.startswith("trust") for code in codes)
        )

    def _newest_root(self) -> int:
        return len(list((self._fleet.home / "metadata").glob("*.root.json")))

    def _update_of(self, name: str, number: int) -> UpdateRecord:
        """The update of a device that a wish asked for; one in which nothing has happened yet until it is under way."""
        update = self._fleet.devices[name].agent.record.update
        if update is not None and update.desired.sequence == number:
            return update
        nothing = Desired(sequence=number, rollout="", family=FAMILY, version="")
        return UpdateRecord(desired=nothing, started_ms=0)


def run_line_quietly(line: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        run_line(line)


def run(folder: Path, *, devices: int, broker: str, seed: int, is_reduced: bool = False) -> Outcome:
    """Go through all of it in a folder, which becomes the working folder meanwhile.

    Args:
        folder: Empty.
        devices: Beside the one in the drawer; at least two.
        broker: `embedded` or `mosquitto`.
        seed: Of the devices' jitter.
        is_reduced: See `Scenario`.
    """
    outcome = Outcome(devices, broker)
    for number, version in enumerate(VERSIONS, start=1):
        write_classifier(folder / f"{version}.onnx", number, hidden=HIDDEN)
    write_classifier(folder / "evil.onnx", 66, hidden=HIDDEN, shift=1)  # runs well, and answers wrongly
    write_health_plan(folder / "health.json")
    (folder / "passphrase").write_text("correct horse battery\n")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(environment(**{PASSPHRASE_VARIABLE: "passphrase", FOLDER_VARIABLE: "fleet"}))
        for line in sections()["From one machine to three people"][:2]:
            run_line_quietly(line)
        home = folder / "fleet"
        fleet = Fleet(
            home, stack.enter_context(broker_of(broker, home, folder / "broker", devices)), folder, seed
        )
        stack.callback(fleet.close)
        names = [f"device-{number}" for number in range(1, devices + 1)]
        scenario = Scenario(fleet, folder, names, outcome, is_reduced=is_reduced)
        try:
            scenario.run()
        except NotReachedError as error:
            outcome.violation = str(error)
        outcome.answers = fleet.answers
        outcome.status = fleet.status()
    return outcome


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables of the environment, and put them back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.key_rotation", description=__doc__)
    parser.add_argument(
        "--devices", type=int, default=12, help="beside the one in the drawer (default: %(default)s)"
    )
    parser.add_argument("--broker", choices=("mosquitto", "embedded"), default="mosquitto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--reduced", action="store_true", help="with one rollout instead of three")
    arguments = parser.parse_args(argv)
    if arguments.devices < 2:
        parser.error("at least two devices: one stays on while another is off")

    def work(folder: Path) -> Outcome:
        return run(
            folder,
            devices=arguments.devices,
            broker=arguments.broker,
            seed=arguments.seed,
            is_reduced=arguments.reduced,
        )

    def text(outcome: Outcome) -> str:
        if arguments.json:
            return json.dumps({**vars(outcome), "steps": [vars(step) for step in outcome.steps]}) + "\n"
        return summary(outcome)

    return run_in_folder("key rotation", work, lambda outcome: not outcome.violation, text)


def summary(outcome: Outcome) -> str:
    """The table that is printed."""
    lines = [f"{outcome.devices} devices and one in a drawer, broker: {outcome.broker}", ""]
    lines += [f"{step.seconds:6.1f} s  {step.name}: {step.shown}" for step in outcome.steps]
    lines += [
        "",
        f"VIOLATION: {outcome.violation}"
        if outcome.violation
        else f"{outcome.answers} answers, all of them right; nothing ran that people had not signed",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
