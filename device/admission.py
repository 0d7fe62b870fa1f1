"""What is refused before the first byte is fetched, and how each file of an accepted release comes about.

Pure: a signed description, signed targets, what the device just measured and its limits in; a plan or a coded refusal
out. A refusal is final for this release on this device as it is; it is reported as rejected, never as failed.
"""

from collections import Counter
from itertools import pairwise
from typing import Final, NamedTuple

from msgspec.structs import replace

from device.config import AgentConfig
from device.journal import InstallItem, InstallLink
from device.rewriting import room_bytes
from protocol.delta_graph import Edge, Route, edges_of, release_routes
from protocol.errors import AdmissionError
from protocol.ids import Digest
from protocol.release import Release, ReleaseFile, version_tuple
from protocol.trust import Target

_MB: Final = 1 << 20

DISK_SLACK_BYTES: Final = 1 << 20
"""Records, metadata and file system overhead of one update."""


class TierError(AdmissionError):
    """The release is not meant for this hardware tier."""

    code = "admission.tier"


class RuntimeMissingError(AdmissionError):
    """The runtime that loads the model is not installed, or too old."""

    code = "admission.runtime"


class MemoryBudgetError(AdmissionError):
    """The model needs more memory than this device gives to models."""

    code = "admission.memory"


class DiskBudgetError(AdmissionError):
    """There is no room for the update beside the version that must be kept.

    Args:
        needed_bytes: Room that it takes.
        available_bytes: Room that there is.
    """

    code = "admission.disk"

    def __init__(self, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(f"update needs {needed_bytes} bytes of disk, {available_bytes} are free")
        self.needed_bytes = needed_bytes


class QuarantinedError(AdmissionError):
    """This release failed its trial on this device before."""

    code = "admission.quarantined"


class MissingArtifactError(AdmissionError):
    """No signed file leads from what this device has to the release."""

    code = "admission.no_artifact"


class EncryptedError(AdmissionError):
    """What leads to the release is encrypted, and there is no certificate for which its keys could be wrapped."""

    code = "admission.encrypted"


class NotInPlaceError(AdmissionError):
    """Nothing that is signed turns the files of this device into the new ones where they are, and there is no room for both."""

    code = "admission.not_in_place"


def check_release_fits(release: Release, config: AgentConfig, runtimes: dict[str, str]) -> None:
    """Compare what the release needs with what the device is.

    Raises:
        AdmissionError: A subclass says what does not fit.
    """
    tiers = release.resources.tiers
    if tiers and config.tier not in tiers:
        raise TierError(f"release is for tiers {', '.join(tiers)}, this device is {config.tier or 'of none'}")
    installed = runtimes.get(release.runtime)
    if installed is None:
        raise RuntimeMissingError(f"runtime {release.runtime} is not installed")
    if version_tuple(installed) < version_tuple(release.runtime_version_min):
        raise RuntimeMissingError(
            f"runtime {release.runtime} is {installed}, needed is {release.runtime_version_min} or newer"
        )
    if release.resources.memory_bytes > config.memory_bytes_max:
        raise MemoryBudgetError(
            f"model needs {_parts(release)}, this device gives {_mb(config.memory_bytes_max)} to a model"
        )


class Running(NamedTuple):
    """The version that goes on answering during an update.

    Attributes:
        version: Which; empty for none.
        memory_bytes: What it takes.
    """

    version: str
    memory_bytes: int


def check_memory(release: Release, running: Running, config: AgentConfig, machine_bytes: int) -> int:
    """Check that everything that is in memory at a time fits: the version that answers, and beside it the one that is tried.

    The two are loaded together from the trial to the commit; with updates in place nothing answers meanwhile.

    Args:
        release: What to install.
        running: What goes on answering.
        config: Limits of the device.
        machine_bytes: Memory of the machine.

    Returns:
        What a decoder may take beside the version that answers.

    Raises:
        MemoryBudgetError: It does not fit; names the parts.
    """
    if config.memory_total_bytes_max is None:
        return config.delta_memory_bytes_max
    total = min(config.memory_total_bytes_max, machine_bytes)
    beside = 0 if config.is_in_place else running.memory_bytes
    if model_bytes(release) + beside > total:
        old = f" beside {_mb(beside)} for {running.version}, which answers until then" if beside else ""
        raise MemoryBudgetError(
            f"{release.version} needs {_parts(release)}{old}, this device gives {_mb(total)} to all together",
            hint="raise memory_total_mb_max, or update in place: then nothing answers meanwhile",
        )
    return max(0, min(config.delta_memory_bytes_max, total - beside))


def model_bytes(release: Release) -> int:
    """What a version takes while it runs, as its release says: weights, KV cache, runtime; without a statement its files."""
    return release.resources.memory_bytes or release.bytes_total


def _parts(release: Release) -> str:
    stated, weights = release.resources.memory_bytes, release.bytes_total
    if not stated:
        return f"{_mb(weights)} of memory (its files; it does not say what it takes)"
    if stated <= weights:
        return f"{_mb(stated)} of memory"
    return (
        f"{_mb(stated)} of memory ({_mb(weights)} of weights, {_mb(stated - weights)} of caches and runtime)"
    )


def _mb(count: int) -> str:
    return f"{count / _MB:.1f} MB"


def plan_update(
    release: Release,
    targets: dict[str, Target],
    measured: dict[str, str],
    config: AgentConfig,
    *,
    available_bytes: int,
    full_only: bool,
) -> tuple[InstallItem, ...]:
    """Choose how each file comes about: the cheapest ways for which there is room.

    A chain of deltas takes more room than a single one, and that more than a whole file, so these are tried in turn. A device that
    rewrites its files needs least room with the deltas that were made for that, and takes whole files only without one.

    Args:
        release: What to install.
        targets: Signed artifacts by path.
        measured: SHA-256 of the files in the active slot, read just now; a remembered digest may lie.
        config: Limits of the device.
        available_bytes: Room on the disk, that of the inactive slot included.
        full_only: Do not use deltas.

    Raises:
        MissingArtifactError: To a file leads nothing that is signed.
        EncryptedError: Nothing that this device could read does.
        DiskBudgetError: Whatever is chosen, there is no room.
        NotInPlaceError: There would be with a delta to rewrite files with, and there is none.
    """
    choices = (0,) if full_only else (config.capacity.links_max, 1, 0)
    missing: MissingArtifactError | None = None
    refusals: list[DiskBudgetError] = []
    can_rewrite = False
    for links_max in dict.fromkeys(choices):
        try:
            items = plan_items(release, targets, measured, config, links_max=links_max)
            can_rewrite |= any(item.in_place for item in items)
            check_disk(items, available_bytes, config)
        except MissingArtifactError as error:
            missing = missing or error
        except DiskBudgetError as error:
            refusals.append(error)
        else:
            return items
    if not refusals:
        assert missing is not None
        raise missing
    least = min(refusals, key=lambda refusal: refusal.needed_bytes)
    if config.is_in_place and not can_rewrite and not full_only:
        raise NotInPlaceError(
            f"no signed delta can be applied in place to what this device has; with whole files the {least}",
            hint="make room, or go by a version to which such a delta leads",
        )
    raise least


def plan_items(
    release: Release,
    targets: dict[str, Target],
    measured: dict[str, str],
    config: AgentConfig,
    *,
    links_max: int,
) -> tuple[InstallItem, ...]:
    """Choose for each file: keep it, make it from what is there, or fetch it whole; whatever is cheapest.

    Args:
        release: What to install.
        targets: Signed artifacts by path.
        measured: SHA-256 of the files in the active slot.
        config: Limits of the device.
        links_max: Files that may be made one after the other; 0 for whole files only.

    Raises:
        MissingArtifactError: To a file leads nothing that is signed.
        EncryptedError: Nothing that this device could read does.
    """
    edges = edges_of(targets, {Digest(file.sha256): file.length for file in release.files})
    unreadable: set[Digest] = set()
    if not config.can_decrypt:
        unreadable = {edge.result for edge in edges if edge.is_encrypted}
        edges = [edge for edge in edges if not edge.is_encrypted]
    if links_max == 0:
        edges = [edge for edge in edges if edge.base is None]
    capacity = replace(config.capacity, links_max=max(links_max, 1))
    held = [Digest(sha256) for sha256 in measured.values()]
    if config.is_in_place:
        edges = _rewriting_edges(edges, release, measured)
    routes = release_routes(release, edges, held, capacity)
    for file in release.files:
        if file.sha256 in unreadable and file.sha256 not in routes:
            raise EncryptedError(
                f"file {file.name} is encrypted, and this device has no certificate to get its key by",
                hint="whimbrel-device enroll",
            )
    return tuple(_plan_item(file, routes, targets, measured, config) for file in release.files)


def _rewriting_edges(edges: list[Edge], release: Release, measured: dict[str, str]) -> list[Edge]:
    """Leave out the deltas whose base something else still needs: a second file with the same bytes, or another file of the release.

    Files that are alike may be one file with two names, and a file is rewritten once.
    """
    names = Counter(measured.values())
    kept = {file.sha256 for file in release.files}
    bases: dict[str, Digest] = {}
    for edge in edges:
        if edge.base is not None and edge.in_place is not None and edge.result in kept:
            bases.setdefault(edge.base, edge.result)
    return [
        edge
        for edge in edges
        if edge.base is None
        or (names[edge.base] == 1 and edge.base not in kept and bases.get(edge.base) == edge.result)
    ]


def check_disk(items: tuple[InstallItem, ...], available_bytes: int, config: AgentConfig) -> None:
    """Check that everything fits at once: the artifacts, the new files, and the reserve.

    Raises:
        DiskBudgetError: It does not.
    """
    fetched = sum(link.blob_length for item in items for link in item.links)
    # A whole file becomes the new file by a rename; a kept one by a link. Only the result of a delta takes more room, or
    # what makes it safe to overwrite its base.
    built = sum(_built_bytes(item) for item in items if item.action == "delta")
    on_the_way = max((_on_the_way_bytes(item) for item in items), default=0)
    needed = fetched + built + on_the_way + DISK_SLACK_BYTES + config.disk_reserve_bytes
    if needed > available_bytes:
        raise DiskBudgetError(needed, available_bytes)


def check_quarantine(release_sha256: str, quarantine: tuple[str, ...]) -> None:
    """Refuse what failed here before.

    Raises:
        QuarantinedError: It did.
    """
    if release_sha256 in quarantine:
        raise QuarantinedError("release failed its trial on this device", hint="publish a corrected version")


def _built_bytes(item: InstallItem) -> int:
    return item.length if item.in_place is None else room_bytes(item.in_place, item.length)


def _plan_item(
    file: ReleaseFile,
    routes: dict[Digest, Route],
    targets: dict[str, Target],
    measured: dict[str, str],
    config: AgentConfig,
) -> InstallItem:
    route = routes.get(Digest(file.sha256))
    if route is None:
        raise MissingArtifactError(f"file {file.name} of the release has no signed artifact for this device")
    names = {sha256: name for name, sha256 in sorted(measured.items(), reverse=True)}
    if not route.edges:
        return InstallItem(
            name=file.name,
            sha256=file.sha256,
            length=file.length,
            action="keep",
            base_name=names[file.sha256],
        )
    *earlier, last = [_link(edge, targets[edge.path]) for edge in route.edges]
    first = route.edges[0]
    return InstallItem(
        name=file.name,
        sha256=file.sha256,
        length=file.length,
        action="delta" if last.base_sha256 else "full",
        base_name="" if first.base is None else names[first.base],
        base_sha256=last.base_sha256,
        blob=last.blob,
        blob_length=last.blob_length,
        tree=last.tree,
        key=last.key,
        earlier=tuple(earlier),
        in_place=route.edges[-1].in_place if config.is_in_place else None,
    )


def _link(edge: Edge, target: Target) -> InstallLink:
    return InstallLink(
        base_sha256=edge.base or "",
        sha256=edge.result,
        length=edge.result_bytes,
        blob=target.digest,
        blob_length=target.length,
        tree=target.custom.chunks,
        key="" if target.custom.encryption is None else target.custom.encryption.key,
    )


def _on_the_way_bytes(item: InstallItem) -> int:
    """Room beside that of the result: a file on the way is there until the next one is made from it."""
    made = [
        link.length if link.base_sha256 else 0 for link in item.earlier
    ]  # a whole one is counted as fetched
    pairs = [before + after for before, after in pairwise(made)]
    # The last of them is there together with the result, those before only while the result does not take its room.
    return max([*made[-1:], *(pair - item.length for pair in pairs)], default=0)
