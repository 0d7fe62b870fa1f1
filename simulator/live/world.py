"""The parts of a live run and the story that is played with them: a good release, then a bad one, then the verdict."""

import itertools
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from protocol.errors import EngineError, TransportError, WhimbrelError
from protocol.ids import Digest, digest_of
from protocol.release import ARTIFACTS_ROLE, Prompt, TextPrompt, delta_target
from server import operations
from server.home import METADATA_FOLDER
from server.operations import RolloutStatus
from server.rollouts.states import FINAL
from server.runtime import Server
from simulator.live.devices import Device
from simulator.live.display import Progress
from simulator.live.fleet import Fleet
from simulator.live.link import Cause, Link
from simulator.live.models import Models
from simulator.live.observer import Observer
from simulator.live.options import Options
from simulator.live.results import device_result, rollout_of, traffic_of
from simulator.live.saboteur import Saboteur
from simulator.report.bands import RESTING
from simulator.report.checks import check_run, sum_up
from simulator.report.page import question
from simulator.report.record import Answer, Run, Transition

FLEET_NAME: Final = "demo"
FACTORY: Final = "v1"
GOOD: Final = "v2"
BAD: Final = "v3"

CANARY_SHARE: Final = 9
"""One device in so many is a canary, at least two where there are two."""

START_S_MAX: Final = 120.0
START_S_PER_DEVICE: Final = 0.5
"""What a large fleet gets beside: its devices load their models one after the other."""

SETTLE_S: Final = 1.0
"""At the end of a rollout the fleet is left alone for this long, so that the pictures show how it ended."""

ANSWERS_SHOWN: Final = 2
_POLL_S: Final = 0.05


class World:
    """The parts of a run and what is done with them.

    Args:
        options: What was asked for.
        observer: Takes note of everything.
        folder: Of the server.
    """

    def __init__(self, options: Options, observer: Observer, folder: Path) -> None:
        self.refresh: Callable[[], None] = lambda: None
        self._options = options
        self._observer = observer
        self._folder = folder
        self._started = datetime.now(UTC)
        self._start_s_max = START_S_MAX + options.devices * START_S_PER_DEVICE
        self._air: list[dict[str, int]] = []  # bytes that reached each device, at the borders of the rollouts
        self._answers: dict[tuple[str, str], list[str]] = {}
        self._rollouts: dict[str, str] = {}  # rollout by version
        self._waves: dict[str, str] = {}  # what was told of each rollout
        self._statuses: dict[str, RolloutStatus] = {}

    def enter(self, models: Models, server: Server, fleet: Fleet) -> None:
        """Take over the parts that have been made by now."""
        self._models = models
        self._server = server
        self._fleet = fleet
        self._digests = {version: digest_of(path.read_bytes()) for version, path in models.files.items()}
        self._lengths = {version: path.stat().st_size for version, path in models.files.items()}
        self.saboteur = Saboteur(fleet.devices, GOOD, self._expected_bytes, self._observer)
        self._observer.listener = self._on_transition

    def on_lost(self, link: Link, cause: Cause) -> None:
        """A link went down under a connection."""
        self.saboteur.on_lost(link, cause)

    def progress(self) -> Progress:
        """Figures for the display."""
        if not self._air:
            return Progress()
        air = sum(self._fleet.bytes_down.values()) - sum(self._air[0].values())
        sights = list(self._observer.sights.values())
        full = sum(self._lengths[version] for sight in sights for version in sight.offered.copy())
        rollouts = tuple(_rollout_line(rollout) for rollout in self._server.status()["rollouts"])
        return Progress(air, full, rollouts)

    # The story

    def bring_up(self) -> None:
        """Start the fleet, and wait until every device has reported."""
        self._observer.begin_phase("Starting the fleet")
        root = (self._folder / METADATA_FOLDER / "1.root.json").read_bytes()
        release = operations.list_releases(self._folder)[0].release
        self._fleet.provision(FLEET_NAME, release, root)
        self._fleet.start()
        self.saboteur.traces = self._fleet.traces
        count = len(self._fleet.devices)
        self._wait(
            lambda: sum(self._server.status()["versions"].values()) == count and self._all_answer(),
            self._start_s_max,
            "not every device has come up",
        )
        processes = sum(device.plan.kill is not None for device in self._fleet.devices.values())
        self._observer.tell(f"{count} devices are up, {processes} of them as processes of their own")
        self._ask_all()
        self._fleet.start_applications()

    def roll_out_good(self) -> None:
        """Publish the good version, and wait until the rollout ends and everyone has come back."""
        self._air.append(self._fleet.bytes_down)
        self._observer.begin_phase(f"Good release {GOOD}")
        self._fleet.start_cycles()
        self._roll_out(GOOD)
        self._wait(
            lambda: not self.saboteur.is_at_work, self._start_s_max, "a killed device does not come back"
        )
        self._wait(self._is_at_rest, self._start_s_max, "a device does not come to rest")
        self._settle()
        self._ask_all()
        self._air.append(self._fleet.bytes_down)

    def roll_out_bad(self) -> None:
        """Publish the bad version, and wait until the server stops it and the canaries are back."""
        self._observer.begin_phase(f"Bad release {BAD}")
        self._roll_out(BAD)
        self._wait(self._is_at_rest, self._start_s_max, "a canary does not come to rest")
        self._wait(self._is_decided, self._start_s_max, "a canary does not report")
        self._settle()
        self._air.append(self._fleet.bytes_down)

    def collect(self) -> None:
        """Take from the server's folder what the verdict needs, while it is there."""
        self._observer.end_phase()
        self._statuses = {status.rollout.version: status for status in operations.list_rollouts(self._folder)}
        self._deltas = [self._delta_bytes(FACTORY, GOOD), self._delta_bytes(GOOD, BAD)]

    def judge(self) -> Run:
        """Make the record of the run, once everything has been stopped."""
        options, observer, models = self._options, self._observer, self._models
        good, bad = self._statuses[GOOD], self._statuses[BAD]
        air = [
            {device: after[device] - before[device] for device in after}
            for before, after in itertools.pairwise(self._air)
        ]
        devices = [
            device_result(
                device.plan, observer, good, bad, air_bytes=sum(carried[device.device] for carried in air)
            )
            for device in self._fleet.devices.values()
        ]
        traffic = [
            traffic_of(status, self._lengths, carried, delta_bytes)
            for status, carried, delta_bytes in zip((good, bad), air, self._deltas, strict=True)
        ]
        totals = sum_up(devices, traffic, GOOD)
        rollouts = [rollout_of(status, observer.started_ms) for status in (good, bad)]
        offered = {device: sight.offered for device, sight in observer.sights.items()}
        tried = {device: sight.tried for device, sight in observer.sights.items()}
        transitions, faults, phases = observer.copy()
        return Run(
            model=models.title,
            score_name=models.score_name,
            family=models.family,
            devices_asked=options.devices,
            seed=options.seed,
            broker=options.broker,
            command=options.command,
            started=self._started.isoformat(timespec="seconds"),
            duration_ms=observer.now_ms,
            phases=phases,
            models=models.figures,
            totals=totals,
            checks=check_run(totals, devices, models.figures, rollouts[0], rollouts[1], offered, tried),
            rollouts=rollouts,
            traffic=traffic,
            devices=devices,
            faults=faults,
            transitions=transitions,
            answers=self._answer_list(),
        )

    # Steps

    def _roll_out(self, version: str) -> None:
        """Publish a version, start its rollout, and wait for its end."""
        publish(self._folder, self._models, version)
        self._observer.tell(f"{version} is published, {self._lengths[version] / 1e6:.1f} MB as a whole file")
        count = len(self._fleet.devices)
        canaries = min(count, max(2, round(count / CANARY_SHARE)))
        record = operations.start_rollout(
            self._folder,
            self._models.family,
            version,
            canary_count=canaries,
            wave_timeout_ms=self._options.phase_s_max * 1000,
        )
        self._rollouts[version] = record.id
        self._wait(
            lambda: self._rollout_state(version) in FINAL,
            self._options.phase_s_max,
            f"the rollout of {version} does not end",
        )

    def _wait(self, condition: Callable[[], bool], s_max: float, trouble: str) -> None:
        """Wait, and keep the display alive; whatever ended meanwhile is an error."""
        end = time.monotonic() + s_max
        while not condition():
            if self._server.failure is not None:
                raise TransportError(f"the server ended by itself: {self._server.failure}")
            self._fleet.check_alive(except_for=self.saboteur.victims)
            if time.monotonic() > end:
                raise TransportError(f"{trouble} within {s_max:.0f} s", hint="give it more with --timeout")
            self._tell_waves()
            self.refresh()
            time.sleep(_POLL_S)
        self._tell_waves()

    def _settle(self) -> None:
        end = time.monotonic() + SETTLE_S
        self._wait(lambda: time.monotonic() >= end, SETTLE_S * 10, "")

    def _tell_waves(self) -> None:
        for rollout in self._server.status()["rollouts"]:
            state = rollout["state"]
            if state == "running":
                state = "rest" if rollout["wave"] else "canary"
            if self._waves.get(rollout["id"]) == state or state == "created":
                continue
            self._waves[rollout["id"]] = state
            words = {
                "preparing": "the server builds and signs the delta",
                "canary": f"{rollout['canary_count']} canaries are asked to take it",
                "rest": "the canaries are fine, everyone else is asked",
                "finished": "the rollout is finished",
                "stopped": f"the server stops the rollout: {rollout['reason']}",
            }
            self._observer.tell(f"{rollout['version']}: {words.get(state, state)}")

    def _rollout_state(self, version: str) -> Any:
        return next(
            (
                rollout["state"]
                for rollout in self._server.status()["rollouts"]
                if rollout["id"] == self._rollouts[version]
            ),
            None,
        )

    def _is_at_rest(self) -> bool:
        return all(
            sight.state in RESTING and not sight.is_down for sight in list(self._observer.sights.values())
        )

    def _is_decided(self) -> bool:
        status = operations.rollout_status(self._folder, self._rollouts[BAD])
        return all(member.status not in {"asked", "running"} for member in status.members)

    def _all_answer(self) -> bool:
        """Whether every model is loaded: from here on, no question may stay without an answer."""
        for device in self._fleet.devices.values():
            try:
                device.ask(self._models.prompts[0])
            except EngineError:
                return False
        return True

    # Models

    def _on_transition(self, transition: Transition) -> None:
        self.saboteur.on_transition(transition)
        if (transition.source, transition.target) == ("committing", "idle"):
            self._observer.tell(f"{transition.device} runs {transition.version}")
        elif transition.target == "rolled_back":
            self._observer.tell(f"{transition.device} took {transition.version} back")

    def _expected_bytes(self, device: Device) -> int:
        """What a device has to fetch for the good version."""
        delta_bytes = self._delta_bytes(FACTORY, GOOD)
        return delta_bytes if device.plan.factory == FACTORY and delta_bytes else self._lengths[GOOD]

    def _delta_bytes(self, base: str, result: str) -> int:
        """Length of a signed delta; 0 where there is none."""
        documents = self._folder / METADATA_FOLDER / f"{ARTIFACTS_ROLE}.json"
        try:
            targets = json.loads(documents.read_bytes())["signed"]["targets"]
        except (OSError, ValueError):
            return 0  # just being written anew
        path = delta_target(Digest(self._digests[base]), Digest(self._digests[result]))
        return int(targets[path]["length"]) if path in targets else 0

    def _ask_all(self) -> None:
        """Let every device answer some real prompts, for people to compare before and after."""
        shown = [prompt for prompt in self._models.prompts if isinstance(prompt, TextPrompt)][:ANSWERS_SHOWN]
        for device, prompt in itertools.product(self._fleet.devices.values(), shown):
            answer = self._answer(device, prompt)
            self._answers.setdefault((device.device, prompt.prompt), []).append(answer)
            self._observer.tell(f'{device.device} "{question(prompt.prompt)}": {" ".join(answer.split())}')
            self.refresh()

    def _answer(self, device: Device, prompt: Prompt) -> str:
        try:
            return device.ask(prompt).strip()
        except WhimbrelError as error:
            return f"({error.message})"

    def _answer_list(self) -> list[Answer]:
        expected = {
            prompt.prompt: prompt.completion.strip()
            for prompt in self._models.prompts
            if isinstance(prompt, TextPrompt)
        }
        return [
            Answer(device=device, prompt=prompt, expected=expected[prompt], before=before, after=after)
            for (device, prompt), (before, after) in self._answers.items()
        ]


def publish(folder: Path, models: Models, version: str) -> None:
    """Add and sign one version."""
    operations.add_release(
        folder,
        models.family,
        version,
        [models.files[version]],
        runtime=models.runtime,
        health=models.health[version],
    )
    operations.publish_release(folder, models.family, version)


def _rollout_line(rollout: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in rollout["counts"].items())
    reason = f" ({rollout['reason']})" if rollout["reason"] else ""
    return f"Rollout of {rollout['version']}: {rollout['state']}{reason}   {counts}"
