"""What is refused before the first byte is fetched, and how each file of an accepted release comes about.

Pure: a signed description, signed targets, what the device just measured and its limits in; a plan or a coded refusal
out. A refusal is final for this release on this device as it is; it is reported as rejected, never as failed.
"""

from typing import Final

from msgspec.structs import replace

from device.config import AgentConfig
from device.journal import InstallItem
from protocol.errors import AdmissionError
from protocol.ids import Digest
from protocol.release import Release, ReleaseFile, delta_target, file_target, version_tuple
from protocol.trust import Target

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
    """There is no room for the update beside the version that must be kept."""

    code = "admission.disk"


class QuarantinedError(AdmissionError):
    """This release failed its trial on this device before."""

    code = "admission.quarantined"


class MissingArtifactError(AdmissionError):
    """No signed file leads from what this device has to the release."""

    code = "admission.no_artifact"


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
            f"model needs {release.resources.memory_bytes} bytes of memory, this device gives {config.memory_bytes_max}"
        )


def plan_items(
    release: Release,
    targets: dict[str, Target],
    measured: dict[str, str],
    config: AgentConfig,
    *,
    full_only: bool,
) -> tuple[InstallItem, ...]:
    """Choose for each file: keep it, apply a delta to what is there, or fetch it whole.

    Args:
        release: What to install.
        targets: Signed artifacts by path.
        measured: SHA-256 of the files in the active slot, read just now; a remembered digest may lie.
        config: Limits of the device.
        full_only: Do not use deltas.

    Raises:
        MissingArtifactError: A file has no signed artifact.
    """
    return tuple(_plan_item(file, targets, measured, config, full_only=full_only) for file in release.files)


def check_disk(
    items: tuple[InstallItem, ...], disk_free_bytes: int, inactive_bytes: int, config: AgentConfig
) -> None:
    """Check that everything fits at once: the artifacts, the new files, and the reserve.

    Raises:
        DiskBudgetError: It does not.
    """
    fetched = sum(item.blob_length for item in items)
    # A whole file becomes the new file by a rename; a kept one by a link. Only the result of a delta takes more room.
    built = sum(item.length for item in items if item.action == "delta")
    needed = fetched + built + DISK_SLACK_BYTES + config.disk_reserve_bytes
    available = disk_free_bytes + inactive_bytes
    if needed > available:
        raise DiskBudgetError(f"update needs {needed} bytes of disk, {available} are free")


def check_quarantine(release_sha256: str, quarantine: tuple[str, ...]) -> None:
    """Refuse what failed here before.

    Raises:
        QuarantinedError: It did.
    """
    if release_sha256 in quarantine:
        raise QuarantinedError("release failed its trial on this device", hint="publish a corrected version")


def _plan_item(
    file: ReleaseFile,
    targets: dict[str, Target],
    measured: dict[str, str],
    config: AgentConfig,
    *,
    full_only: bool,
) -> InstallItem:
    for name, sha256 in measured.items():
        if sha256 == file.sha256:
            return InstallItem(
                name=file.name, sha256=file.sha256, length=file.length, action="keep", base_name=name
            )
    full = targets.get(file_target(Digest(file.sha256)))
    candidates = [] if full_only else _deltas(file, targets, measured, config)
    if candidates:
        base_name, delta = min(candidates, key=lambda candidate: candidate[1].length)
        if full is None or delta.length < full.length:
            item = _fetched(file, delta)
            return replace(item, action="delta", base_name=base_name, base_sha256=measured[base_name])
    if full is None:
        raise MissingArtifactError(f"file {file.name} of the release has no signed artifact for this device")
    return _fetched(file, full)


def _deltas(
    file: ReleaseFile, targets: dict[str, Target], measured: dict[str, str], config: AgentConfig
) -> list[tuple[str, Target]]:
    found = [
        (name, target)
        for name, sha256 in sorted(measured.items())
        if (target := targets.get(delta_target(Digest(sha256), Digest(file.sha256)))) is not None
    ]
    return [
        (name, target)
        for name, target in found
        if target.custom.memory_bytes <= config.delta_memory_bytes_max
    ]


def _fetched(file: ReleaseFile, target: Target) -> InstallItem:
    return InstallItem(
        name=file.name,
        sha256=file.sha256,
        length=file.length,
        action="full",
        blob=target.digest,
        blob_length=target.length,
        tree=target.custom.chunks,
    )
