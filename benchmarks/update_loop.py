"""One update of a live fleet from the float model to the commit, with the operator's own commands; what became of it is read back from the server.

The broker, the server, the links and the agents are those of `whimbrel-sim run`: real ones, on this machine. Every command is printed as it would be
typed in the folder of the work, with what it says.
"""

import contextlib
import io
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from device.executor import CURRENT_LINK
from device.leases import NoModelError
from protocol.delta.format import Profile
from protocol.errors import RequestError
from protocol.ids import Digest, digest_of
from protocol.release import ARTIFACTS_ROLE, HealthPlan, Prompt, TextPrompt, delta_target
from server import operations
from server.cli import main as whimbrel
from server.home import METADATA_FOLDER
from server.operations import ReleaseDetails, RolloutStatus
from server.requantize.controls import write_plain
from server.requantize.evaluation import Evaluator
from server.requantize.record import RECORD_SUFFIX
from server.requantize.weighing import delta_bytes
from server.rollouts.states import FINAL, RolloutState
from server.runtime import Server
from server.scorecard.items import GoldenQuestion
from server.scorecard.suites import Asking, read_suite
from server.scorecard.summary import is_right
from simulator.live.fleet import Fleet
from simulator.live.models import Models
from simulator.live.observer import Observer
from simulator.live.population import DevicePlan, LinkProfile
from simulator.live.server import running_server

FAMILY: Final = "smollm2"
FLEET_NAME: Final = "loop"
BEFORE: Final = "v1"
AFTER: Final = "v2"

INSTALLED_FILE: Final = "v1.q4_0.gguf"
NEW_FILE: Final = "v2.bf16.gguf"
CHOSEN_FILE: Final = "v2.q4_0.gguf"
PLAIN_FILE: Final = "plain.gguf"
CACHE_FOLDER: Final = "measured"
SERVER_FOLDER: Final = "server"
DEVICES_FOLDER: Final = "devices"

LINK: Final = LinkProfile("lte-m", bandwidth_bytes_s=125_000, latency_ms=60)
"""A megabit a second: the plain file of SmolLM2 takes such a device twelve minutes, and plain's delta half a minute."""

THREADS: Final = 1
LOGPROB_ROOM: Final = 0.1
"""By how much the server's own answer is likelier than a prompt of the trial demands: other processors round otherwise."""

LATENCY_P99_MS_MAX: Final = 120_000.0
TIMEOUT_MS: Final = 300_000
"""All trials share one machine here, with whatever else runs on it."""

MEMORY_PEAK_BYTES_MAX: Final = 1 << 30
SETTLE_S: Final = 1.0
_POLL_S: Final = 0.05

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What an update is made from; all files are in the folder of the work, under the names above.

    Attributes:
        folder: Of the work. A server and devices are made in it.
        calibration: Name of the text that says which weights matter.
        held_out: Names of the texts on which the file is judged.
        golden: Name of the file with golden prompts.
        budget: Of the delta, as `whimbrel requantize` takes it.
        devices: How many.
        score_options: Of `whimbrel score`, beside the versions.
        requantize_options: Of `whimbrel requantize`, beside what is named above.
        wait_s_max: For the rollout.
    """

    folder: Path
    calibration: str
    held_out: tuple[str, ...]
    golden: str
    budget: str
    devices: int
    score_options: tuple[str, ...] = ()
    requantize_options: tuple[str, ...] = ()
    wait_s_max: float = 1800.0


class Taken(Struct, frozen=True, kw_only=True):
    """What became of one device, by the server's records unless it says otherwise.

    Attributes:
        device: Its identity.
        status: Of its part in the rollout.
        outcome: That it reported.
        version: That it reports to run.
        transfer_bytes: That it had to fetch.
        full_bytes: That the whole file would have been.
        air_bytes: That reached it over its link while the rollout went on, everything included; by the link.
        fetched: Digests of the artifacts that its chunks belong to, beside the release's description and the lists of chunks of its
            deltas; by its trace.
        commit_ms: From the wish to the commit; by its trace.
        states_ms: Time spent in each state.
        prompts: Answered as they have to be, and asked, in its trial.
        file_sha256: Of the file that it serves; measured on its disk.
    """

    device: str
    status: str
    outcome: str
    version: str
    transfer_bytes: int
    full_bytes: int
    air_bytes: int
    fetched: frozenset[Digest]
    commit_ms: int | None
    states_ms: dict[str, int]
    prompts: tuple[int, int]
    file_sha256: str


class Outcome(Struct, frozen=True, kw_only=True):
    """What came of an update.

    Attributes:
        file_bytes: Of the chosen file.
        file_sha256: Likewise.
        promised_bytes: Of its delta, as the record of the choice says.
        deltas: Lengths of the deltas from the installed file that the server signed, by their digests: one for each profile.
        plain_delta_bytes: Of the delta to plain quantization of the same model.
        release: With scorecard and provenance.
        rollout: With its members.
        devices: What became of each.
        answers: To the first golden prompt, by device: before and after.
    """

    file_bytes: int
    file_sha256: Digest
    promised_bytes: int
    deltas: dict[Digest, int]
    plain_delta_bytes: int
    release: ReleaseDetails
    rollout: RolloutStatus
    devices: tuple[Taken, ...]
    answers: dict[str, tuple[str, str]]


def run(ingredients: Ingredients, say: Say) -> Outcome:
    """Go through all of it.

    Args:
        ingredients: What the update is made from.
        say: Takes every line that a person would see.

    Raises:
        RequestError: A command did not end well, or something did not come in time.
        WhimbrelError: As the parts.
    """
    with contextlib.chdir(ingredients.folder):
        operator = Operator(say)
        _choose(ingredients, operator, say)
        prompts = _plan_trials(ingredients, say)
        operator.run("init", SERVER_FOLDER, "--fleet", FLEET_NAME, "--port", "0")
        _publish(operator, BEFORE, INSTALLED_FILE)
        with _live(ingredients, prompts, say) as (server, fleet, observer):
            return _Update(ingredients, operator, server, fleet, observer, prompts, say).run()


class Operator:
    """Whoever types the commands.

    Args:
        say: Takes what is typed and what comes back.
    """

    def __init__(self, say: Say) -> None:
        self._say = say

    def run(self, *words: str) -> str:
        """One command; what it printed.

        Raises:
            RequestError: It did not end with 0.
        """
        self._say("")
        self._say(f"$ whimbrel {shlex.join(words)}")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = whimbrel(list(words))
        for line in printed.getvalue().splitlines():
            self._say(line)
        if code:
            raise RequestError(
                f"`whimbrel {' '.join(words[:2])}` ended with {code}", hint="what it said is above"
            )
        return printed.getvalue()


def _choose(ingredients: Ingredients, operator: Operator, say: Say) -> None:
    began = time.monotonic()
    operator.run(
        "requantize",
        NEW_FILE,
        *("--installed", INSTALLED_FILE, "--out", CHOSEN_FILE, "--budget", ingredients.budget),
        *("--calibration", ingredients.calibration),
        *(word for name in ingredients.held_out for word in ("--held-out", name)),
        *("--golden", ingredients.golden, "--cache", CACHE_FOLDER, "--force"),
        *ingredients.requantize_options,
    )
    say(f"{time.monotonic() - began:.0f} s, with what was measured before and kept")


def _plan_trials(ingredients: Ingredients, say: Say) -> dict[str, list[Prompt]]:
    """Health plans: the golden prompts that the file of each version answers, with some room."""
    suite = read_suite("golden", Path(ingredients.golden), Asking())
    plans: dict[str, list[Prompt]] = {}
    with Evaluator(
        Path(NEW_FILE), (), Path(CACHE_FOLDER) / "readings", THREADS, lambda *_: None
    ) as evaluator:
        for version, name in ((BEFORE, INSTALLED_FILE), (AFTER, CHOSEN_FILE)):
            prompts: list[Prompt] = []
            for item, reply in zip(suite.items, evaluator.ask(Path(name), suite), strict=True):
                question, least = item.question, item.logprob_mean_min
                assert isinstance(question, GoldenQuestion)
                assert least is not None
                if is_right(item, reply) and reply.scores[0] >= least + LOGPROB_ROOM:
                    prompts.append(
                        TextPrompt(
                            name=item.name,
                            prompt=question.prompt,
                            completion=question.completion,
                            logprob_mean_min=least,
                            exact=item.is_exact,
                        )
                    )
            if not prompts:
                raise RequestError(
                    f"{name} answers no golden prompt with {LOGPROB_ROOM} nats of room, so nothing tells on a device whether it works",
                    hint=f"give other prompts in {ingredients.golden}",
                )
            plans[version] = prompts
            plan = HealthPlan(
                prompts=prompts,
                latency_p99_ms_max=LATENCY_P99_MS_MAX,
                memory_peak_bytes_max=MEMORY_PEAK_BYTES_MAX,
                load_timeout_ms=TIMEOUT_MS,
                prompt_timeout_ms=TIMEOUT_MS,
            )
            _health(version).write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=1))
            say(
                f"{_health(version)}: the {len(prompts)} of {len(suite.items)} golden prompts that {name} answers"
            )
    return plans


def _health(version: str) -> Path:
    return Path(f"health-{version}.json")


def _publish(operator: Operator, version: str, file: str, score_options: Sequence[str] | None = None) -> None:
    """Add a version, score it where it is asked for, and sign it."""
    at = ("--dir", SERVER_FOLDER)
    health = str(_health(version))
    operator.run("release", "add", FAMILY, version, file, "--runtime", "llama", "--health", health, *at)
    if score_options is not None:
        operator.run("score", FAMILY, version, "--against", BEFORE, *score_options, *at)
        operator.run("release", "show", FAMILY, version, *at)
    operator.run("release", "publish", FAMILY, version, *at)


@contextlib.contextmanager
def _live(
    ingredients: Ingredients, prompts: dict[str, list[Prompt]], say: Say
) -> Iterator[tuple[Server, Fleet, Observer]]:
    """A server and a fleet with the installed version, all of which is up."""
    folder = ingredients.folder.absolute()
    observer = Observer()
    models = Models(
        kind=FAMILY,
        runtime="llama",
        files={BEFORE: folder / INSTALLED_FILE},
        health={BEFORE: folder / _health(BEFORE)},
        figures=[],
        prompts=prompts[BEFORE],
    )
    plans = tuple(
        DevicePlan(
            device=f"device-{number}",
            tier="pi5",
            link=LINK,
            factory=BEFORE,
            cut=None,
            kill=None,
            seed=number,
        )
        for number in range(1, ingredients.devices + 1)
    )
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server(folder / SERVER_FOLDER))
        fleet = Fleet(
            plans,
            folder / DEVICES_FOLDER,
            server.broker_address,
            models,
            observer,
            lambda _link, _cause: None,
        )
        stack.callback(fleet.stop)
        root = (folder / SERVER_FOLDER / METADATA_FOLDER / "1.root.json").read_bytes()
        (release,) = (
            each.release
            for each in operations.list_releases(folder / SERVER_FOLDER)
            if each.release.version == BEFORE
        )
        fleet.provision(FLEET_NAME, release, root)
        fleet.start()
        _wait(
            fleet,
            lambda: server.status()["versions"] == {f"{FAMILY} {BEFORE}": ingredients.devices},
            ingredients.wait_s_max,
            "not every device has come up",
        )
        say(
            f"\n{ingredients.devices} devices run {BEFORE} ({INSTALLED_FILE}), each on a link of {LINK.bandwidth_bytes_s:,} bytes a second and"
            f" {LINK.latency_ms} ms"
        )
        yield server, fleet, observer


def _wait(fleet: Fleet, is_so: Callable[[], bool], s_max: float, trouble: str) -> None:
    end = time.monotonic() + s_max
    while not is_so():
        fleet.check_alive(except_for=set())
        if time.monotonic() > end:
            raise RequestError(f"{trouble} within {s_max:.0f} s", hint="is the machine busy?")
        time.sleep(_POLL_S)


class _Update:
    """From the draft to the commit, on a fleet that is up."""

    def __init__(
        self,
        ingredients: Ingredients,
        operator: Operator,
        server: Server,
        fleet: Fleet,
        observer: Observer,
        prompts: dict[str, list[Prompt]],
        say: Say,
    ) -> None:
        self._ingredients = ingredients
        self._operator = operator
        self._server = server
        self._fleet = fleet
        self._observer = observer
        self._prompts = prompts
        self._say = say
        self._home = ingredients.folder.absolute() / SERVER_FOLDER

    def run(self) -> Outcome:
        before = self._answers()
        _publish(self._operator, AFTER, CHOSEN_FILE, self._ingredients.score_options)
        carried = self._fleet.bytes_down
        rollout = self._roll_out()
        air = {name: count - carried[name] for name, count in self._fleet.bytes_down.items()}
        after = self._answers()
        chosen = Path(CHOSEN_FILE).read_bytes()
        pair = digest_of(Path(INSTALLED_FILE).read_bytes()), digest_of(chosen)
        details = operations.show_release(self._home, FAMILY, AFTER)
        beside = {details.digest, *self._chunk_lists(*pair)}
        self._say("\nplain quantization of the same model, for comparison: llama.cpp's own")
        write_plain(Path(NEW_FILE), Path(INSTALLED_FILE), Path(PLAIN_FILE), THREADS)
        return Outcome(
            file_bytes=len(chosen),
            file_sha256=digest_of(chosen),
            promised_bytes=json.loads(Path(f"{CHOSEN_FILE}{RECORD_SUFFIX}").read_bytes())["delta_bytes"],
            deltas=self._signed_deltas(*pair),
            plain_delta_bytes=delta_bytes(Path(INSTALLED_FILE), Path(PLAIN_FILE)),
            release=details,
            rollout=rollout,
            devices=tuple(self._taken(beside, rollout, name, air[name]) for name in sorted(air)),
            answers={name: (before[name], after[name]) for name in before},
        )

    def _roll_out(self) -> RolloutStatus:
        """Start the rollout, and wait until it is over."""
        words = ("--canary", "1", "--dir", SERVER_FOLDER)
        self._operator.run("rollout", "start", FAMILY, AFTER, *words)
        (record,) = (each.rollout for each in operations.list_rollouts(self._home))
        _wait(
            self._fleet,
            lambda: self._has_ended(record.id),
            self._ingredients.wait_s_max,
            f"the rollout of {AFTER} does not end",
        )
        time.sleep(SETTLE_S)  # so that what devices say last has come, and is saved
        self._operator.run("rollout", "status", record.id, "--dir", SERVER_FOLDER)
        return operations.rollout_status(self._home, record.id)

    def _has_ended(self, rollout: str) -> bool:
        """Of a rollout that the running server may not have seen yet."""
        states = (each["state"] for each in self._server.status()["rollouts"] if each["id"] == rollout)
        return any(RolloutState(state) in FINAL for state in states)

    def _answers(self) -> dict[str, str]:
        """What each device answers to a golden prompt, with the model that it serves now; a device that was just started has to load it."""
        prompt = self._prompts[AFTER][0]
        answers: dict[str, str] = {}

        def have_all_answered() -> bool:
            for name, device in self._fleet.devices.items():
                if name not in answers:
                    with contextlib.suppress(NoModelError):
                        answers[name] = device.ask(prompt).strip()
            return len(answers) == len(self._fleet.devices)

        _wait(self._fleet, have_all_answered, self._ingredients.wait_s_max, "not every device answers")
        return answers

    def _signed_deltas(self, base: Digest, result: Digest) -> dict[Digest, int]:
        """Lengths of the deltas between two files that the signed metadata names, by digest."""
        found = self._delta_targets(base, result)
        return {Digest(each["hashes"]["sha256"]): int(each["length"]) for each in found}

    def _chunk_lists(self, base: Digest, result: Digest) -> set[Digest]:
        """The lists of chunks of these deltas; one of a single chunk is its own root, and has none."""
        trees = [each["custom"]["chunks"] for each in self._delta_targets(base, result)]
        return {Digest(each["root"]) for each in trees if each["levels"]}

    def _delta_targets(self, base: Digest, result: Digest) -> list[dict[str, Any]]:
        document = self._home / METADATA_FOLDER / f"{ARTIFACTS_ROLE}.json"
        targets = json.loads(document.read_bytes())["signed"]["targets"]
        found = (targets.get(delta_target(base, result, profile)) for profile in Profile)
        return [each for each in found if each is not None]

    def _taken(self, beside: set[Digest], rollout: RolloutStatus, name: str, air_bytes: int) -> Taken:
        (member,) = (each for each in rollout.members if each.device == name)
        (known,) = (each for each in operations.list_devices(self._home) if each.device == name)
        update, sight = member.update, self._observer.sights[name]
        evidence = None if update is None else update.evidence
        (file,) = (self._fleet.devices[name].folder / "state" / CURRENT_LINK).resolve().iterdir()
        steps = [each for each in self._observer.transitions if each.device == name and each.version == AFTER]
        begun = [each.at_ms for each in steps if each.target == "syncing"]
        done = [each.at_ms for each in steps if (each.source, each.target) == ("committing", "idle")]
        return Taken(
            device=name,
            status=member.status,
            outcome="" if update is None else str(update.outcome),
            version=known.version,
            transfer_bytes=0 if update is None else update.transfer_bytes_total,
            full_bytes=0 if update is None else update.full_bytes_total,
            air_bytes=air_bytes,
            fetched=frozenset(Digest(blob) for blob, _ in sight.chunks) - beside,
            commit_ms=done[-1] - begun[0] if begun and done else None,
            states_ms={} if update is None else dict(update.states_ms),
            prompts=(0, 0) if evidence is None else (evidence.prompts_passed, evidence.prompts_total),
            file_sha256=digest_of(file.read_bytes()),
        )
