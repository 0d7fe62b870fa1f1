"""What an operator can do, as plain calls: the command line, the simulator and tests all use these.

Each call opens the folder, acts in one transaction and closes it. A running server on the same folder notices.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from protocol.errors import RequestError, UnknownReleaseError
from protocol.ids import (
    Digest,
    Family,
    Version,
    parse_digest,
    parse_family,
    parse_fleet_id,
    parse_version,
)
from protocol.release import (
    RuntimeName,
    encode_release,
    release_digest,
    release_target,
)
from server.actors import current_actor
from server.adapters.blobs import FolderBlobs, storage_errors, write_file
from server.adapters.clock import SystemClock
from server.adapters.keys import KeyFolder
from server.adapters.lock import is_locked
from server.adapters.pending import read_document
from server.adapters.store import SqlStore
from server.audit import Act, new_act
from server.config import (
    CONFIG_FILE,
    DEFAULT_FLEET,
    DEFAULT_PORT,
    EMBEDDED,
    ServerConfig,
    config_text,
    parse_broker,
)
from server.documents import named_documents, read_card, read_statement
from server.fleet.registry import DeviceRecord
from server.home import BLOBS_FOLDER, KEYS_FOLDER, LOCK_FILE, METADATA_FOLDER, Home, opened, write_metadata
from server.ports import Clock, ReleaseRecord
from server.releases import encryption
from server.releases.catalog import blob_target
from server.releases.chain import Chain, explain
from server.releases.importer import import_release
from server.releases.metadata import Standing
from server.releases.provenance import Statement
from server.releases.publisher import Publisher
from server.rollouts.evidence import Rules
from server.rollouts.records import MemberRecord, MemberStatus, RolloutRecord
from server.rollouts.states import ACTIVE, RolloutState
from server.rollouts.waves import Wave
from server.scorecard.card import Scorecard
from server.signing import change_signed, signed_paths
from server.statements import Said, check_said, statement_of
from server.tiers.judging import check_still_fits, for_tiers, read_named


class RolloutPlan(Struct, frozen=True, kw_only=True):
    """How a rollout goes about it.

    Attributes:
        waves: In order; empty for canaries and then all.
        rules: What it is judged by; None where only failures are counted.
        in_flight_max: Devices that are asked and have not answered for good; None for any number.
        pace_per_minute: Devices that are asked in a minute, likewise.
        hold_max_ms: How long the policy of a device may hold it.
        from_version: Only devices that run this version take part.
        by: Who starts it.
    """

    waves: tuple[Wave, ...] = ()
    rules: Rules | None = None
    in_flight_max: int | None = None
    pace_per_minute: int | None = None
    hold_max_ms: int = 86_400_000
    from_version: str = ""
    by: str = ""

    def record(
        self,
        number: int,
        family: Family,
        version: Version,
        *,
        canary_count: int,
        wave_timeout_ms: int,
        failures_max: int | None,
        created_ms: int,
    ) -> RolloutRecord:
        """A new rollout that goes about it so; its arguments are those of `start_rollout`."""
        return RolloutRecord(
            id=f"r{number}",
            family=family,
            version=version,
            canary_count=canary_count,
            wave_timeout_ms=wave_timeout_ms,
            failures_max=failures_max,
            waves=self.waves,
            rules=self.rules,
            in_flight_max=self.in_flight_max,
            pace_per_minute=self.pace_per_minute,
            hold_max_ms=self.hold_max_ms,
            from_version=self.from_version,
            created_by=self.by,
            created_ms=created_ms,
        )


class RolloutStatus(Struct, frozen=True, kw_only=True):
    """A rollout with what became of its devices."""

    rollout: RolloutRecord
    counts: dict[MemberStatus, int]
    members: list[MemberRecord]


class ReleaseDetails(Struct, frozen=True, kw_only=True):
    """A release with what is signed beside its description.

    Attributes:
        record: The release.
        digest: Of its description, which is what a device trusts.
        provenance: Where its files come from, if anybody said so.
        scorecard: How good it is, if anybody measured it.
    """

    record: ReleaseRecord
    digest: Digest
    provenance: Statement | None
    scorecard: Scorecard | None


def init_repository(
    folder: Path,
    fleet: str = DEFAULT_FLEET,
    *,
    broker: str = EMBEDDED,
    port: int = DEFAULT_PORT,
    database: str = "",
    clock: Clock | None = None,
) -> Path:
    """Make keys, an empty signed repository, a database and a settings file.

    Returns:
        The root document that devices start their trust from.

    Raises:
        RequestError: There is a repository already; nothing is overwritten.
        StorageError: The folder cannot be written.
    """
    parse_broker(broker)
    config = ServerConfig(
        folder=folder, fleet=parse_fleet_id(fleet), broker=broker, port=port, database=database
    )
    with storage_errors(folder):
        if (folder / CONFIG_FILE).exists():
            raise RequestError(f"{folder} holds a repository already", hint="choose another folder")
        if folder.exists() and any(folder.iterdir()):
            raise RequestError(f"{folder} is not empty", hint="choose another folder")
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    try:
        _lay_out(config, (clock or SystemClock()).now_ms())
    except BaseException:
        for path in folder.iterdir():  # it was empty: all that is here is ours and half done
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not existed:
            folder.rmdir()
        raise
    return folder / METADATA_FOLDER / "1.root.json"


def add_release(
    folder: Path,
    family: str,
    version: str,
    files: list[Path],
    *,
    runtime: RuntimeName,
    health: Path,
    adapter: Path | None = None,
    memory_bytes: int = 0,
    tiers: list[str] | None = None,
    runtime_version_min: str = "",
    provenance: Said | None = None,
    is_encrypted: bool | None = None,
) -> ReleaseRecord:
    """Check and copy the files of a release, and keep it as a draft.

    Args:
        folder: The server's.
        family: As `import_release`, like all that follow.
        version: Likewise.
        files: Likewise.
        runtime: Likewise.
        health: Likewise.
        adapter: Likewise.
        memory_bytes: Likewise.
        tiers: Likewise.
        runtime_version_min: Likewise.
        provenance: Where the files come from, if anybody says so.
        is_encrypted: Let only devices with a certificate read the files; None for as the last release of the family was added.

    Raises:
        AlreadyPublishedError: A published release has this name.
        RequestError: It would show a file to everybody that is encrypted in another release.
        RequestError: It fits none of the server's tiers, or none of those that are named. It is for those that it fits.
        WhimbrelError: As `server.releases.importer.import_release`.
    """
    name = f"{family} {version}"
    with opened(folder) as home, home.attempting("release.add", name):
        known = home.store.release(parse_family(family), parse_version(version))
        if known is not None and known.published_ms is not None:
            home.store.add_release(known)  # raises the error that says so, before a large file is copied
        read_named(home, tiers or ())  # before a large file is copied
        check_said(provenance)  # before a large file is copied
        if is_encrypted is None:
            is_encrypted = encryption.is_family_encrypted(home.store.releases(), parse_family(family))
        release = import_release(
            home.blobs,
            family=family,
            version=version,
            files=files,
            runtime=runtime,
            health=health,
            adapter=adapter,
            memory_bytes=memory_bytes,
            tiers=tiers,
            runtime_version_min=runtime_version_min,
        )
        if provenance is not None:
            statement = statement_of(release, provenance)
            release = msgspec.structs.replace(release, provenance_sha256=home.blobs.put(statement).digest)
        release = for_tiers(home, release)
        encryption.check_files(home.store.releases(), release, is_encrypted=is_encrypted)
        record = ReleaseRecord(release=release, added_ms=home.clock.now_ms(), is_encrypted=is_encrypted)
        named = ", ".join(release.resources.tiers)
        added = home.act(
            "release.add",
            name,
            tiers=named,
            encrypted="yes" if is_encrypted else "",
            digest=release_digest(release),
        )
        home.store.add_release(record, [added])
        return record


def publish_release(folder: Path, family: str, version: str) -> ReleaseRecord:
    """Sign a draft: from now on it can be rolled out, and never changes.

    Returns:
        The release. It stays a draft while its family's role lacks signatures; see `server.ceremony`.

    Raises:
        RequestError: There is no such draft, or it does not fit a tier that it is for.
        AlreadyPublishedError: It is published.
        MissingKeyError: A signing key is not there.
        StorageError: A file of the draft is missing or damaged.
    """
    name = f"{family} {version}"
    with opened(folder) as home, home.attempting("release.publish", name):
        record = find_release(home, parse_family(family), parse_version(version))
        if record.published_ms is not None:
            home.store.add_release(record)  # raises the error that says so
        release = record.release
        check_still_fits(home, release)
        description = home.blobs.put(encode_release(release))
        for file in release.files:
            home.blobs.describe(parse_digest(file.sha256))
        for _, digest in named_documents(release):
            home.blobs.describe(digest)
        path = release_target(Family(release.family), Version(release.version))
        act = home.act(
            "release.publish", name, tiers=", ".join(release.resources.tiers), digest=description.digest
        )
        change_signed(home, act, added=[blob_target(path, description)])
        return find_release(home, Family(release.family), Version(release.version))


def withdraw_release(folder: Path, family: str, version: str) -> list[Standing]:
    """Take a release out of the signed metadata: no device installs it any more; one that runs it goes on until it is led away.

    The version stays taken, so that no other bytes ever get its name.

    Returns:
        What waits for the signatures of others; nothing if it is done.

    Raises:
        RequestError: It is not published, or was withdrawn before.
    """
    name = f"{family} {version}"
    with opened(folder) as home, home.attempting("release.withdraw", name):
        record = find_release(home, parse_family(family), parse_version(version))
        path = release_target(Family(record.release.family), Version(record.release.version))
        if record.published_ms is None:
            raise RequestError(f"{family} {version} is not published", hint="a draft reaches no device")
        if path not in signed_paths(home):
            raise RequestError(f"{family} {version} was withdrawn before")
        return change_signed(home, home.act("release.withdraw", name), lambda draft: draft.drop(path))


def show_release(folder: Path, family: str, version: str) -> ReleaseDetails:
    """Everything that is known about a release.

    Raises:
        RequestError: There is no such release.
        StorageError: Its provenance or its scorecard is missing or damaged.
    """
    with opened(folder) as home:
        record = find_release(home, parse_family(family), parse_version(version))
        return ReleaseDetails(
            record=record,
            digest=release_digest(record.release),
            provenance=read_statement(home, record.release),
            scorecard=read_card(home, record.release),
        )


def list_releases(folder: Path) -> list[ReleaseRecord]:
    """All releases, in the order in which they were added."""
    with opened(folder) as home:
        return home.store.releases()


def is_withdrawn(folder: Path, records: Sequence[ReleaseRecord]) -> list[bool]:
    """Which releases were published and are not in the signed metadata any more."""
    with opened(folder) as home:
        signed = signed_paths(home)
    return [
        record.published_ms is not None
        and release_target(Family(record.release.family), Version(record.release.version)) not in signed
        for record in records
    ]


def export_release(folder: Path, family: str, version: str, target: Path) -> None:
    """Write what a device is provisioned with: the signed description, the files, and the start of trust.

    Args:
        folder: The server's.
        family: Of a published release.
        version: Of a published release.
        target: Folder that gets `release.json`, `root.json`, `provenance.json` and `scorecard.json` where there are some, and the
            files; made if it is not there.

    Raises:
        RequestError: There is no such release, or the target cannot be written.
    """
    with opened(folder) as home:
        record = home.store.release(parse_family(family), parse_version(version))
        if record is None or record.published_ms is None:
            raise RequestError(f"{family} {version} is not published", hint="see `whimbrel release list`")
        repository = home.store.repository()
        assert repository is not None, "what is published was signed"
        try:
            target.mkdir(parents=True, exist_ok=True)
            (target / "release.json").write_bytes(encode_release(record.release))
            (target / "root.json").write_bytes(repository.roots[-1])  # older keys may be anywhere by now
            for name, digest in named_documents(record.release):
                shutil.copyfile(home.blobs.path(digest), target / name)
            for file in record.release.files:
                shutil.copyfile(home.blobs.path(Digest(file.sha256)), target / file.name)
        except OSError as error:
            raise RequestError(
                f"{target}: {error.strerror or error}", hint="choose another folder"
            ) from error


def explain_file(folder: Path, file: Path, root: Path | None = None) -> Chain:
    """Why a file may run on devices, or why not.

    Args:
        folder: The server's.
        file: For example a model.
        root: The root document that devices start from; None takes the first one.

    Raises:
        RequestError: A file is not there.
        TrustError: The root is none of this repository.
    """
    with opened(folder) as home:
        repository = home.store.repository()
        assert repository is not None, "an open folder has been signed"
        try:
            with file.open("rb") as source:
                digest = Digest(hashlib.file_digest(source, "sha256").hexdigest())
                length = source.tell()
        except OSError as error:
            raise RequestError(f"{file}: {error.strerror}") from error
        start = None if root is None else read_document(root)
        return explain(repository, home.store.releases(), digest, length, home.clock.now_ms(), start)


def start_rollout(
    folder: Path,
    family: str,
    version: str,
    *,
    canary_count: int = 2,
    wave_timeout_ms: int = 3_600_000,
    failures_max: int | None = 0,
    plan: RolloutPlan | None = None,
) -> RolloutRecord:
    """Ask for a rollout; the server takes it up.

    Args:
        folder: The server's.
        family: Of a published release.
        version: Of a published release.
        canary_count: Devices that go first, where the plan names no waves.
        wave_timeout_ms: What a device may take before it counts as failed.
        failures_max: Failures that are accepted in each wave; None leaves the judgement to the rules of the plan.
        plan: How to go about it; None for canaries, then all, judged by `failures_max` alone.

    Raises:
        RequestError: The release is not published, a number is out of range, or the family is busy.
    """
    plan = plan or RolloutPlan()
    if canary_count < 1 or wave_timeout_ms < 1 or (failures_max is not None and failures_max < 0):
        raise RequestError("a rollout needs a canary, time, and no negative number of failures")
    if failures_max is None and plan.rules is None:
        raise RequestError("a rollout that nothing judges would never stop", hint="give it rules")
    if plan.rules is not None:
        plan.rules.checked()
    with opened(folder) as home, home.attempting("rollout.start", f"{family} {version}"):
        record = find_release(home, parse_family(family), parse_version(version))
        if record.published_ms is None:
            raise RequestError(
                f"{family} {version} is not published",
                hint=f"run `whimbrel release publish {family} {version}`",
            )
        if release_target(Family(family), Version(version)) not in signed_paths(home):
            raise RequestError(f"{family} {version} was withdrawn", hint="publish it under another version")
        now_ms = home.clock.now_ms()

        def make(number: int, before: list[RolloutRecord]) -> RolloutRecord:
            for other in before:
                if other.family == family and other.state in {*ACTIVE, RolloutState.CREATED}:
                    raise RequestError(
                        f"rollout {other.id} of {family} {other.version} is under way",
                        hint="wait until it is finished or stopped",
                    )
            return plan.record(
                number,
                Family(family),
                Version(version),
                canary_count=canary_count,
                wave_timeout_ms=wave_timeout_ms,
                failures_max=failures_max,
                created_ms=now_ms,
            )

        def act(record: RolloutRecord) -> Act:
            waves = ", ".join(wave.size_text for wave in record.plan)
            return home.act(
                "rollout.start", record.id, release=f"{family} {version}", waves=waves, operator=plan.by
            )

        return home.store.create_rollout(make, act)


def list_rollouts(folder: Path) -> list[RolloutStatus]:
    """All rollouts, oldest first."""
    with opened(folder) as home:
        members: dict[str, list[MemberRecord]] = {}
        for member in home.store.members():
            members.setdefault(member.rollout, []).append(member)
        return [_status(record, members.get(record.id, [])) for record in home.store.rollouts()]


def rollout_status(folder: Path, rollout: str) -> RolloutStatus:
    """One rollout.

    Raises:
        RequestError: There is no such rollout.
    """
    with opened(folder) as home:
        for record in home.store.rollouts():
            if record.id == rollout:
                return _status(record, home.store.members(rollout))
    raise RequestError(f"there is no rollout {rollout[:80]!r}", hint="see `whimbrel rollout list`")


def devices_shut_out(folder: Path, family: str, version: str) -> list[str]:
    """Devices of a family that cannot take an encrypted release, since they have no valid certificate of this server.

    Raises:
        RequestError: There is no such release.
    """
    with opened(folder) as home:
        if not find_release(home, parse_family(family), parse_version(version)).is_encrypted:
            return []
        identities, now_ms = home.store.identities(), home.clock.now_ms()
        return [
            device.device
            for device in home.store.devices()
            if device.family == family and not identities.valid(device.device, now_ms)
        ]


def list_devices(folder: Path) -> list[DeviceRecord]:
    """All devices that ever reported."""
    with opened(folder) as home:
        return home.store.devices()


def has_users(folder: Path) -> bool:
    """Whether anybody can sign in to the page."""
    with opened(folder) as home:
        return bool(home.store.accounts().users)


def is_served(folder: Path) -> bool:
    """Whether a server runs on this folder."""
    return is_locked(folder / LOCK_FILE)


def _lay_out(config: ServerConfig, now_ms: int) -> None:
    with storage_errors(config.folder):
        (config.folder / METADATA_FOLDER).mkdir()
    keys = KeyFolder(config.folder / KEYS_FOLDER)
    keys.create()
    published = Publisher(keys.load()).create(now_ms)
    store = SqlStore(config.database_url)
    try:
        act = new_act(current_actor(), now_ms, "repository.init", config.fleet, folder=config.folder.name)
        store.create(published.repository, [act])
    finally:
        store.close()
    FolderBlobs(config.folder / BLOBS_FOLDER)
    write_metadata(config.folder, published.repository)
    # Last: its presence says that all the rest is there.
    write_file(config.folder / CONFIG_FILE, config_text(config).encode())


def find_release(home: Home, family: Family, version: Version) -> ReleaseRecord:
    """A release by its name.

    Raises:
        RequestError: There is none; says which there are.
    """
    record = home.store.release(family, version)
    if record is not None:
        return record
    known = sorted({release.release.family for release in home.store.releases()})
    if family not in known:
        hint = f"known are {', '.join(known)[:200]}" if known else "run `whimbrel release add`"
        raise UnknownReleaseError(f"there is no model family {family}", hint=hint)
    raise UnknownReleaseError(f"{family} has no version {version}", hint="see `whimbrel release list`")


def _status(record: RolloutRecord, members: list[MemberRecord]) -> RolloutStatus:
    counts: dict[MemberStatus, int] = {}
    for member in members:
        counts[member.status] = counts.get(member.status, 0) + 1
    return RolloutStatus(rollout=record, counts=counts or dict(record.counts), members=members)
