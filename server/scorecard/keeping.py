"""Keeps score of a release: reads suites, runs what is missing, draws the scorecard together. The edge between files, workers and the pure parts."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from protocol.errors import EngineError
from protocol.ids import Digest, digest_of, parse_digest
from protocol.release import Release, RuntimeName
from protocol.tensors import ReadAt, map_files, parse_gguf
from server.adapters.blobs import FileSource, FolderBlobs, storage_errors
from server.scorecard.card import (
    MISSING_MAX,
    Drift,
    Scorecard,
    Settings,
    Subject,
    TextDrift,
)
from server.scorecard.items import ClassQuestion, GoldenQuestion, Item, NumberQuestion, Suite, sampled
from server.scorecard.journal import Journal, journal
from server.scorecard.resources import Resources, classifier_resources, text_resources
from server.scorecard.runner import Progress, Runner, compare_all, running
from server.scorecard.suites import Asking, health_suite
from server.scorecard.summary import (
    Replies,
    divergences_of,
    score_speed,
    score_suite,
    suite_drift,
    text_drift,
)
from server.scorecard.verdict import Limits, checks_of, verdict_of
from server.scorecard.work import Memory, MemoryOrder, Model, Speed, SpeedOrder
from server.scorecard.worker import ANSWER_S_MAX

ASKED_BY: Final = 1
"""Grows when models are asked in another way, so that no journal from before is believed."""

WORK_FOLDER: Final = "scorecards"
"""In the folder of a server: journals."""

_PACKAGES: Final[dict[RuntimeName, tuple[str, ...]]] = {
    "llama": ("llama-cpp-python",),
    "onnx": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
}


class Plan(Struct, frozen=True, kw_only=True):
    """What is measured and how.

    Attributes:
        asking: How suites are asked.
        limits: What is good enough.
        threads: Of one inference.
        context_tokens: Of text models, at most what they were trained for.
        drift_texts: Solutions of problems, or inputs of classifiers, over which two versions are compared; golden prompts come on top.
        speed: How speed is measured.
        memory: How memory is measured.
        timeout_s: After which one answer is given up.
    """

    asking: Asking
    limits: Limits
    threads: int
    context_tokens: int = 4096
    drift_texts: int = 64
    speed: SpeedOrder = SpeedOrder()
    memory: MemoryOrder = MemoryOrder()
    timeout_s: float = ANSWER_S_MAX


def keep_score(
    blobs: FolderBlobs,
    folder: Path,
    release: Release,
    against: Release | None,
    suites: Sequence[Suite],
    plan: Plan,
    progress: Progress,
) -> Scorecard:
    """Measure what no journal has, and draw the scorecard together.

    Args:
        blobs: Have the files.
        folder: Of the journals; made when it is not there.
        release: Whose scorecard it is.
        against: The version that it replaces.
        suites: Beside the prompts of the release's health plan.
        plan: How it is done.
        progress: Told how it goes.

    Raises:
        RequestError: Another process measures the same model.
        StorageError: A file of a release is missing or damaged, or the journals cannot be written.
    """
    suites = (health_suite(release.health), *suites)
    machine = machine_text()
    with ExitStack() as opened:
        now = opened.enter_context(_scored(blobs, folder, release, plan, progress))
        before = None
        if against is not None and _identity(against, plan) != _identity(release, plan):
            before = opened.enter_context(_scored(blobs, folder, against, plan, progress))
        elif against is not None:
            before = now
        speed = now.measure(plan.speed, Speed, machine)
        memory = now.measure(plan.memory, Memory, machine)
        replies = [now.ask_all(suite.items, suite.name) for suite in suites]
        drift = None
        if against is not None and before is not None:
            earlier = [before.ask_all(suite.items, f"{against.version}, {suite.name}") for suite in suites]
            pair = opened.enter_context(_pair(folder, release, against, plan))
            compared = compare_all(pair, before, now, drift_items(suites, plan), progress)
            drift = _drift(against, suites, earlier, replies, text_drift(compared))
        missing = [*now.missing, *(before.missing if before is not None and before is not now else ())]
    scores = tuple(score_suite(suite, each) for suite, each in zip(suites, replies, strict=True))
    peak = memory.contexts[0].peak_bytes if memory is not None else None
    checks = checks_of(release.health, plan.limits, scores, drift, peak)
    return Scorecard(
        subject=_subject(release),
        runtime=release.runtime,
        runtime_version=runtime_version(release.runtime),
        machine=machine,
        settings=Settings(
            threads=plan.threads,
            context_tokens=plan.context_tokens,
            asking=plan.asking,
            drift_texts=plan.drift_texts,
        ),
        verdict=verdict_of(checks, len(missing)),
        checks=checks,
        speed=None if speed is None else score_speed(speed),
        memory=memory,
        resources=_resources(blobs, release, plan, memory),
        suites=scores,
        drift=drift,
        missing=tuple(missing[:MISSING_MAX]),
        missing_count=len(missing),
    )


def drift_items(suites: Sequence[Suite], plan: Plan) -> list[Item]:
    """The texts over which two versions are compared: all golden prompts, and a sample of the problems or inputs."""
    prompts = [
        item for suite in suites if suite.kind in {"golden", "edge"} for item in suite.items if item.solution
    ]
    others = [
        item
        for suite in suites
        if suite.kind in {"gsm8k", "classes"}
        for item in suite.items
        if isinstance(item.question, NumberQuestion | ClassQuestion)
    ]
    if not prompts:  # a classifier's prompts are inputs like others
        others += [item for item in suites[0].items if isinstance(item.question, ClassQuestion)]
    texts = [item for item in prompts if isinstance(item.question, GoldenQuestion)]
    return [*texts, *(sampled(others, plan.drift_texts, plan.asking.seed) if plan.drift_texts else ())]


def machine_text() -> str:
    """The machine that keeps score, in a few words."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except (OSError, UnicodeDecodeError):
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


@contextmanager
def _scored(
    blobs: FolderBlobs, folder: Path, release: Release, plan: Plan, progress: Progress
) -> Iterator[Runner]:
    """A runner on a release, with its journal; its files are laid out and checked once something has to be asked."""
    identity = _identity(release, plan)
    name = digest_of(msgspec.json.encode(identity))
    place = folder / f"files-{name}"
    with journal(folder, name, {**identity, "family": release.family, "version": release.version}) as kept:
        try:
            runner = Runner(kept, lambda: _prepared(blobs, place, release, plan), progress, plan.timeout_s)
            with running(runner):
                yield runner
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _prepared(blobs: FolderBlobs, place: Path, release: Release, plan: Plan) -> Model:
    """Lay out the files under their own names, since they speak of each other."""
    if not place.exists():
        partial = place.with_suffix(".partial")
        with storage_errors(place):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        for file in release.files:
            blobs.describe(parse_digest(file.sha256))  # the bytes that are measured are those that are named
            _place(blobs.path(Digest(file.sha256)), partial / file.name)
        with storage_errors(place):
            partial.rename(place)
    return Model(
        path=str((place / release.files[0].name).absolute()),
        runtime=release.runtime,
        threads=plan.threads,
        context_tokens=plan.context_tokens,
        adapter=str((place / release.adapter.name).absolute()) if release.adapter else "",
    )


def _place(blob: Path, target: Path) -> None:
    with storage_errors(target):
        try:
            os.link(blob, target)
        except OSError:  # another file system
            shutil.copyfile(blob, target)


@contextmanager
def _pair(folder: Path, release: Release, against: Release, plan: Plan) -> Iterator[Journal]:
    identity: dict[str, object] = {"before": _identity(against, plan), "now": _identity(release, plan)}
    with journal(folder, digest_of(msgspec.json.encode(identity)), identity) as kept:
        yield kept


def _identity(release: Release, plan: Plan) -> dict[str, object]:
    """All that an answer depends on beside the question."""
    adapter = release.adapter
    return {
        "asked_by": ASKED_BY,
        "files": [file.sha256 for file in release.files],
        "runtime": release.runtime,
        "runtime_version": runtime_version(release.runtime),
        "threads": plan.threads,
        "context_tokens": plan.context_tokens if release.runtime == "llama" else 0,
        **(
            {"adapter": adapter.sha256} if adapter else {}
        ),  # journals of releases without one are found as before
    }


def runtime_version(runtime: RuntimeName) -> str:
    """Version of the package, without loading it."""
    for package in _PACKAGES[runtime]:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise EngineError(
        f"{_PACKAGES[runtime][0]} is not installed, and runs {runtime} models",
        hint=f"install whimbrel with the extra {runtime!r}",
    )


def _subject(release: Release) -> Subject:
    return Subject(family=release.family, version=release.version, files=tuple(release.files))


def _drift(
    against: Release,
    suites: Sequence[Suite],
    before: Sequence[Replies],
    now: Sequence[Replies],
    texts: TextDrift | None,
) -> Drift:
    changes = [suite_drift(*each) for each in zip(suites, before, now, strict=True)]
    return Drift(
        against=_subject(against),
        suites=tuple(each for each in changes if each is not None),
        texts=texts,
        divergences=tuple(
            found for each in zip(suites, before, now, strict=True) for found in divergences_of(*each)
        ),
    )


def _resources(blobs: FolderBlobs, release: Release, plan: Plan, memory: Memory | None) -> Resources:
    """From what the files say about themselves."""
    with ExitStack() as opened:
        sources: dict[str, ReadAt] = {}
        for file in release.files:
            path = blobs.path(Digest(file.sha256))
            with storage_errors(path):
                sources[file.name] = FileSource(opened.enter_context(path.open("rb")))
        if release.runtime == "llama":
            loaded = {release.files[0].name, release.adapter.name if release.adapter else ""}
            parts = [
                parse_gguf(source)
                for name, source in sources.items()
                if name in loaded or name.endswith(".gguf")
            ]
            return text_resources(parts, release.bytes_total, plan.speed.prompt_tokens, plan.memory.contexts)
        tensors = [region for regions in map_files(sources).values() for region in regions if region.name]
        operators = memory.operators if memory is not None else ()
        return classifier_resources(tensors, release.bytes_total, operators)
