"""Changes of what is signed: published at once, or waiting in the folder until people have signed (docs/keys.md)."""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from protocol.errors import RequestError, TrustError
from protocol.ids import (
    Digest,
    Family,
    Version,
    digest_of,
    parse_digest,
)
from protocol.release import (
    ARTIFACTS_ROLE,
    encode_release,
    file_target,
    release_target,
)
from protocol.trust import Target
from server.adapters.pending import PendingFolder
from server.alerts.records import Alert, new_alert
from server.audit import TEXT_CHARS_MAX, WAITING, Act, actor_text
from server.documents import named_documents
from server.home import Home, write_metadata
from server.ports import ReleaseRecord, Repository
from server.releases.catalog import blob_target
from server.releases.metadata import Draft, Standing


def change_signed(
    home: Home, act: Act, change: Callable[[Draft], None] = lambda _: None, added: Sequence[Target] = ()
) -> list[Standing]:
    """Change what is signed, and publish it once nothing lacks a signature; until then it waits in the folder.

    Args:
        home: The open folder.
        act: What is noted in the audit trail, as done or as waiting.
        change: Changes keys, roles or lives of documents.
        added: Targets to list, which need the signatures of others.

    Returns:
        What waits for signatures; nothing if it was published.

    Raises:
        MissingKeyError: Everything is signed, and the key of snapshot or timestamp is not here.
        RequestError: The change cannot be made.
    """
    publisher, now_ms = home.publisher(), home.clock.now_ms()
    pending = PendingFolder(home.config.folder)
    waiting, _ = read_waiting(home)

    def prepared(repository: Repository) -> tuple[dict[str, bytes], Draft]:
        # What the server signs by itself may have changed since: it is signed again where that is needed.
        known = {role for role, _ in repository.documents.delegated}
        kept = {role: data for role, data in waiting.items() if role != ARTIFACTS_ROLE or role not in known}

        def both(draft: Draft) -> None:
            change(draft)
            publisher.list_targets(draft, added)

        documents = publisher.change(repository, kept, both, now_ms)
        return documents, Draft(repository, documents)

    repository = home.store.repository()
    assert repository is not None, "an open folder has been signed"
    documents, draft = prepared(repository)
    standings = [draft.standing(role) for role in documents]
    if any(standing.missing for standing in standings):
        pending.write(documents)
        _note_waiting(home, act, standings)
        return standings
    records, files = _newly_listed(home, draft)
    published = [msgspec.structs.replace(record, published_ms=now_ms) for record in records]
    repository = home.store.sign(
        lambda before: publisher.submit(before, prepared(before)[0], files, now_ms).repository,
        *published,
        traces=_published_traces(home, act, standings, records),
    )
    write_metadata(home.config.folder, repository)
    pending.write({})
    return []


def read_waiting(home: Home) -> tuple[dict[str, bytes], Draft]:
    """What waits for signatures, and that on top of what is published.

    Raises:
        RequestError: A file is no document of a role; names the file.
    """
    repository = home.store.repository()
    assert repository is not None, "an open folder has been signed"
    pending = PendingFolder(home.config.folder)
    waiting = pending.read()
    for role, data in waiting.items():
        try:
            Draft(repository, {role: data})
        except TrustError as error:
            raise RequestError(
                f"{pending.path(role)}: {error.message}",
                hint="restore it, or give up what waits with `whimbrel keys drop`",
            ) from error
    draft = Draft(repository, waiting)
    for role in waiting:
        if role in {"snapshot", "timestamp"} or role not in draft.roles():
            raise RequestError(f"{pending.path(role)} is the document of no role", hint="remove the file")
    return waiting, draft


def _note_waiting(home: Home, act: Act, standings: Sequence[Standing]) -> None:
    """Note what was asked for, and tell that people have to sign; once for each set of documents."""
    lacking = [standing for standing in standings if standing.missing]
    texts = [
        f"{each.role} version {each.version} lacks {each.missing} signature(s) of {', '.join(key.name for key in each.unsigned)}"
        for each in lacking
    ]
    names = ", ".join(each.role for each in lacking)
    told = new_alert(
        "keys.waiting",
        names[:128],
        act.at_ms,
        f"{'; '.join(texts)}: each signs with `whimbrel keys sign`",
        key="/".join(f"{each.role}:{each.version}" for each in lacking),
        details={"act": act.what, "on": act.on, "by": act.by.name},
    )
    noted = msgspec.structs.replace(act, outcome=WAITING, text="; ".join(texts)[:TEXT_CHARS_MAX])
    home.store.save([noted, told])


def _published_traces(
    home: Home, act: Act, standings: Sequence[Standing], records: Sequence[ReleaseRecord]
) -> list[Act | Alert]:
    """What is noted and told when documents are published: also of the releases that had waited for them."""
    traces: list[Act | Alert] = [act]
    for record in records:
        published = home.act(
            "release.publish",
            f"{record.release.family} {record.release.version}",
            "its signatures are complete",
        )
        if (act.what, act.on) != (published.what, published.on):
            traces.append(published)
    keys = [f"{each.role} version {each.version}" for each in standings if each.role in {"root", "targets"}]
    if keys:
        text = f"{' and '.join(keys)}, which say whose keys count, were published: {act.what} of {act.on} by {actor_text(act.by)}"
        details = {"act": act.what, "on": act.on, "by": act.by.name}
        traces.append(new_alert("keys.changed", ", ".join(keys)[:128], act.at_ms, text, details=details))
    return traces


def _newly_listed(home: Home, draft: Draft) -> tuple[list[ReleaseRecord], list[Target]]:
    """Drafts of releases that will be listed, and the targets of their files."""
    records = [
        record
        for record in home.store.releases()
        if record.published_ms is None
        and draft.digest(release_target(Family(record.release.family), Version(record.release.version)))
        == digest_of(encode_release(record.release))
    ]
    secret = {
        file.sha256
        for record in records
        for file in record.release.files
        # An empty file has nothing to hide, and what everybody may read already cannot be hidden any more.
        if record.is_encrypted and file.length and draft.digest(file_target(Digest(file.sha256))) is None
    }
    files = {file.sha256 for record in records for file in record.release.files} - secret
    files |= {digest for record in records for _, digest in named_documents(record.release)}
    blobs = [home.blobs.describe(parse_digest(sha256)) for sha256 in sorted(files)]
    targets = [blob_target(file_target(blob.digest), blob) for blob in blobs]
    return records, targets + _encrypted(home, draft, sorted(secret))


def _encrypted(home: Home, draft: Draft, files: Iterable[str]) -> list[Target]:
    """Targets of files that only devices with a certificate can read. One that is there stays: encrypted again, a file is another artifact."""
    targets = []
    for sha256 in files:
        digest = parse_digest(sha256)
        path = file_target(digest, is_encrypted=True)
        if draft.digest(path) is None:
            home.blobs.describe(digest)
            encrypted = home.content_keys().encrypt(digest)
            targets.append(blob_target(path, encrypted.blob, encryption=encrypted.encryption))
    return targets


def signed_paths(home: Home) -> set[str]:
    """Paths of all targets that the published documents list."""
    repository = home.store.repository()
    assert repository is not None, "an open folder has been signed"
    return {path for _, path, _ in Draft(repository, {}).files()}
