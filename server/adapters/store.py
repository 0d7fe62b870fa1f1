"""The store in a relational database. With `database.py` and `trail.py` the only importer of `sqlalchemy`.

Records are JSON in the shape of their structs, beside the columns that queries need: a field that is added later costs
no migration. Every write is one transaction that is durable on return (SQLite: write-ahead log, `synchronous=FULL`) and
excludes every other one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    and_,
    delete,
    func,
    insert,
    inspect,
    select,
    update,
)

from protocol.errors import AlreadyPublishedError, RequestError, StorageError
from protocol.ids import DeviceId, Digest, Family, Version
from protocol.trust import Documents
from server.accounts import AccountRecord, Accounts, SessionRecord, SessionRemoval, UserRecord, UserRemoval
from server.adapters.database import decoded, encode, replace_rows, text
from server.adapters.trail import TRAIL, Trail, prepare_trail, write_traces
from server.alerts.records import Alert, Trace
from server.audit import Act
from server.fleet.history import DeviceEvent
from server.fleet.identities import (
    CertificateRecord,
    CertificateRemoval,
    ClaimRecord,
    ClaimRemoval,
    Identities,
    IdentityRecord,
)
from server.fleet.registry import DeviceRecord
from server.ports import (
    CacheEntry,
    CacheRemoval,
    ContentKeyRecord,
    ContentKeyRemoval,
    DeltaRefusal,
    IdleDelta,
    IdleDeltaRemoval,
    KeyChange,
    Record,
    ReleaseRecord,
    Repository,
)
from server.rollouts.records import Decision, Labels, MemberRecord, MemberStatus, Order, RolloutRecord
from server.rollouts.states import RolloutState

SCHEMA_VERSION: Final = 1

_schema: Final = MetaData()
_NAME = text(128)
_PATH = text(192)
_CONSTANTS = Table("constants", _schema, Column("name", _NAME, primary_key=True), Column("value", Integer))
_DOCUMENTS = Table("documents", _schema, Column("name", _NAME, primary_key=True), Column("body", LargeBinary))
_RELEASES = Table(
    "releases",
    _schema,
    Column("number", Integer, primary_key=True),
    Column("family", _NAME, nullable=False),
    Column("version", _NAME, nullable=False),
    Column("body", LargeBinary, nullable=False),
)
_DEVICES = Table("devices", _schema, Column("device", _NAME, primary_key=True), Column("body", LargeBinary))
_ROLLOUTS = Table(
    "rollouts",
    _schema,
    Column("number", Integer, primary_key=True),
    Column("id", _NAME, nullable=False, unique=True),
    Column("body", LargeBinary, nullable=False),
)
_MEMBERS = Table(
    "rollout_members",
    _schema,
    Column("rollout", _NAME, primary_key=True),
    Column("device", _NAME, primary_key=True),
    Column("body", LargeBinary),
)
_DECISIONS = Table(
    "rollout_decisions",
    _schema,
    Column("rollout", _NAME, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("body", LargeBinary),
)
_ORDERS = Table(
    "rollout_orders",
    _schema,
    Column("rollout", _NAME, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("body", LargeBinary),
)
_LABELS = Table(
    "device_labels", _schema, Column("device", _NAME, primary_key=True), Column("body", LargeBinary)
)
# Keyed by the path of the target, so that the profiles of a pair are two. The table that was keyed by the pair is left
# alone where there is one: what it knew costs one more build each.
_REFUSALS = Table(
    "refused_targets", _schema, Column("path", _PATH, primary_key=True), Column("body", LargeBinary)
)
_IDLE = Table("idle_deltas", _schema, Column("path", _PATH, primary_key=True), Column("body", LargeBinary))
_CACHED = Table(
    "cached_blobs", _schema, Column("name", String(64), primary_key=True), Column("body", LargeBinary)
)
_CONTENT_KEYS = Table(
    "content_keys", _schema, Column("blob", String(64), primary_key=True), Column("body", LargeBinary)
)
_CLAIMS = Table("claims", _schema, Column("claim", _NAME, primary_key=True), Column("body", LargeBinary))
_CERTIFICATES = Table(
    "certificates", _schema, Column("serial", String(64), primary_key=True), Column("body", LargeBinary)
)
_USERS = Table("users", _schema, Column("name", _NAME, primary_key=True), Column("body", LargeBinary))
_SESSIONS = Table(
    "sessions", _schema, Column("digest", String(64), primary_key=True), Column("body", LargeBinary)
)
_EVENTS = Table(
    "device_events",
    _schema,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("device", _NAME, nullable=False, index=True),
    Column("at_ms", BigInteger, nullable=False, index=True),
    Column("body", LargeBinary, nullable=False),
)

_DELEGATED: Final = "delegated."
"""Before the name of a delegated role, in the names of documents."""

_KEYS: Final[dict[type[Struct], tuple[Table, tuple[str, ...]]]] = {
    DeviceRecord: (_DEVICES, ("device",)),
    MemberRecord: (_MEMBERS, ("rollout", "device")),
    Decision: (_DECISIONS, ("rollout", "number")),
    Order: (_ORDERS, ("rollout", "number")),
    Labels: (_LABELS, ("device",)),
    DeltaRefusal: (_REFUSALS, ("path",)),
    IdleDelta: (_IDLE, ("path",)),
    CacheEntry: (_CACHED, ("name",)),
    ContentKeyRecord: (_CONTENT_KEYS, ("blob",)),
    ClaimRecord: (_CLAIMS, ("claim",)),
    CertificateRecord: (_CERTIFICATES, ("serial",)),
    UserRecord: (_USERS, ("name",)),
    SessionRecord: (_SESSIONS, ("digest",)),
}
_REMOVALS: Final[dict[type[Struct], tuple[Table, str]]] = {
    CacheRemoval: (_CACHED, "name"),
    IdleDeltaRemoval: (_IDLE, "path"),
    ClaimRemoval: (_CLAIMS, "claim"),
    ContentKeyRemoval: (_CONTENT_KEYS, "blob"),
    CertificateRemoval: (_CERTIFICATES, "serial"),
    UserRemoval: (_USERS, "name"),
    SessionRemoval: (_SESSIONS, "digest"),
}


class SqlStore(Trail):
    """`Store` in a database; safe to use from several threads and processes. Acts and alerts that are given to a change are noted with it."""

    def create(self, repository: Repository, acts: Sequence[Act] = ()) -> None:
        """Lay out an empty database around a new repository.

        Raises:
            RequestError: The database holds a repository.
        """
        with self._writing() as connection:
            _schema.create_all(connection)
            if connection.execute(select(_DOCUMENTS.c.name)).first():
                raise RequestError(
                    "the database holds a repository already", hint="choose another folder or database"
                )
            constants = [{"name": "schema", "value": SCHEMA_VERSION}, {"name": "changes", "value": 0}]
            connection.execute(insert(_CONSTANTS), constants)
            _write_repository(connection, repository)
            prepare_trail(connection)
            write_traces(connection, acts)

    def check(self) -> None:
        """Refuse a database that this program does not understand.

        Raises:
            RequestError: It was laid out by another version, or not at all.
        """
        try:
            version = self._scalar(select(_CONSTANTS.c.value).where(_CONSTANTS.c.name == "schema"))
        except StorageError as error:
            raise RequestError(
                f"the database holds no repository: {error}", hint="run `whimbrel init`"
            ) from error
        if version != SCHEMA_VERSION:
            raise RequestError(
                f"the database has layout {version}, understood is {SCHEMA_VERSION}",
                hint="use the version of whimbrel that wrote it",
            )
        self._add_tables()

    def save(self, records: Sequence[Record | KeyChange | Trace]) -> None:
        """Write all records in one transaction; a record replaces the one with its key."""
        with self._writing() as connection:
            self._write(connection, records)

    def _write(
        self,
        connection: Connection,
        records: Sequence[Record | KeyChange | IdentityRecord | AccountRecord | Labels | Trace],
    ) -> None:
        rows: dict[Table, dict[tuple[Any, ...], dict[str, Any] | None]] = {}
        rollouts = []
        events = []
        traces: list[Trace] = []
        for record in records:
            if isinstance(record, RolloutRecord):
                rollouts.append(record)
            elif isinstance(record, Act | Alert):
                traces.append(record)
            elif isinstance(record, DeviceEvent):
                events.append({"device": record.device, "at_ms": record.at_ms, "body": encode(record)})
            elif type(record) in _REMOVALS:
                table, name = _REMOVALS[type(record)]
                rows.setdefault(table, {})[getattr(record, name),] = None
            else:
                table, names = _KEYS[type(record)]
                key = tuple(getattr(record, name) for name in names)
                row = dict(zip(names, key, strict=True)) | {"body": encode(record)}
                rows.setdefault(table, {})[key] = row
        for table, by_key in rows.items():
            replace_rows(connection, table, by_key)
        if events:
            connection.execute(insert(_EVENTS), events)
        for rollout in rollouts:
            body = encode(rollout)
            connection.execute(update(_ROLLOUTS).where(_ROLLOUTS.c.id == rollout.id).values(body=body))
        write_traces(connection, traces)

    def devices(self) -> list[DeviceRecord]:
        """Every device that ever reported."""
        return self._load(DeviceRecord, select(_DEVICES.c.body).order_by(_DEVICES.c.device))

    def device_events(self, device: DeviceId, count_max: int) -> list[DeviceEvent]:
        """What became of a device lately, oldest first."""
        query = select(_EVENTS.c.body).where(_EVENTS.c.device == device)
        return self._load(DeviceEvent, query.order_by(_EVENTS.c.number.desc()).limit(count_max))[::-1]

    def forget_device_events(self, before_ms: int) -> None:
        """Drop what is older than `before_ms`."""
        with self._writing() as connection:
            connection.execute(delete(_EVENTS).where(_EVENTS.c.at_ms < before_ms))

    def forget_members(self, before_ms: int) -> list[str]:
        """Drop the devices of rollouts that ended before `before_ms`, but for the last one of each family that finished: what it led to counts.

        How many devices came how far stays in the record of the rollout. Returns the rollouts.
        """
        gone = []
        with self._writing() as connection:
            bodies = connection.execute(select(_ROLLOUTS.c.body).order_by(_ROLLOUTS.c.number)).scalars()
            records = [decoded(RolloutRecord, body) for body in bodies]
            latest = {each.family: each.id for each in records if each.state is RolloutState.FINISHED}
            for record in records:
                if (
                    record.finished_ms is None
                    or record.finished_ms >= before_ms
                    or record.id in latest.values()
                ):
                    continue
                mine = _MEMBERS.c.rollout == record.id
                found = [
                    decoded(MemberRecord, body)
                    for body in connection.execute(select(_MEMBERS.c.body).where(mine)).scalars()
                ]
                if found:
                    counts: Counter[MemberStatus] = Counter(member.status for member in found)
                    connection.execute(delete(_MEMBERS).where(mine))
                    self._write(connection, [replace(record, counts=dict(counts))])
                    gone.append(record.id)
        return gone

    def rollouts(self) -> list[RolloutRecord]:
        """Every rollout, oldest first."""
        return self._load(RolloutRecord, select(_ROLLOUTS.c.body).order_by(_ROLLOUTS.c.number))

    def members(self, rollout: str | None = None) -> list[MemberRecord]:
        """What rollouts asked of devices, and what came of it."""
        query = select(_MEMBERS.c.body).order_by(_MEMBERS.c.rollout, _MEMBERS.c.device)
        return self._load(
            MemberRecord, query if rollout is None else query.where(_MEMBERS.c.rollout == rollout)
        )

    def refusals(self) -> list[DeltaRefusal]:
        """Deltas that are not worth sending."""
        return self._load(DeltaRefusal, select(_REFUSALS.c.body))

    def idle_deltas(self) -> list[IdleDelta]:
        """Deltas that nobody needs."""
        return self._load(IdleDelta, select(_IDLE.c.body).order_by(_IDLE.c.path))

    def content_key(self, blob: Digest) -> ContentKeyRecord | None:
        """The key of an encrypted artifact."""
        query = select(_CONTENT_KEYS.c.body).where(_CONTENT_KEYS.c.blob == blob)
        found = self._load(ContentKeyRecord, query)
        return found[0] if found else None

    def has_content_keys(self) -> bool:
        """Whether there are any."""
        return self._scalar(select(_CONTENT_KEYS.c.blob).limit(1)) is not None

    def cached(self) -> list[CacheEntry]:
        """Blobs that a broker may retain."""
        return self._load(CacheEntry, select(_CACHED.c.body))

    def releases(self) -> list[ReleaseRecord]:
        """Every release, in the order in which they were added."""
        return self._load(ReleaseRecord, select(_RELEASES.c.body).order_by(_RELEASES.c.number))

    def release(self, family: Family, version: Version) -> ReleaseRecord | None:
        """One release."""
        found = self._load(ReleaseRecord, select(_RELEASES.c.body).where(_named(family, version)))
        return found[0] if found else None

    def add_release(self, record: ReleaseRecord, traces: Sequence[Trace] = ()) -> None:
        """Store a draft; a draft of the same name is replaced."""
        family, version = Family(record.release.family), Version(record.release.version)
        with self._writing() as connection:
            _refuse_published(connection, family, version)
            connection.execute(delete(_RELEASES).where(_named(family, version)))
            connection.execute(insert(_RELEASES).values(family=family, version=version, body=encode(record)))
            write_traces(connection, traces)

    def repository(self) -> Repository | None:
        """What was signed last."""
        with self._reading() as connection:
            return _read_repository(connection)

    def sign(
        self,
        update_repository: Callable[[Repository], Repository],
        *published: ReleaseRecord,
        traces: Sequence[Trace] = (),
    ) -> Repository:
        """Replace the repository in one transaction that excludes every other signer; `traces` are noted if it changes."""
        with self._writing() as connection:
            before = _read_repository(connection)
            if before is None:
                raise RequestError("there is no repository here", hint="run `whimbrel init`")
            for record in published:
                family, version = Family(record.release.family), Version(record.release.version)
                _refuse_published(connection, family, version)
                body = encode(record)
                connection.execute(update(_RELEASES).where(_named(family, version)).values(body=body))
            after = update_repository(before)
            if after != before:
                _write_repository(connection, after)
                _count_change(connection)
            if after != before or published:
                write_traces(connection, traces)
            return after

    def create_rollout(
        self,
        make: Callable[[int, list[RolloutRecord]], RolloutRecord],
        act: Callable[[RolloutRecord], Act] | None = None,
    ) -> RolloutRecord:
        """Store a new rollout, and `act` of it."""
        with self._writing() as connection:
            bodies = connection.execute(select(_ROLLOUTS.c.body).order_by(_ROLLOUTS.c.number)).scalars()
            before = [decoded(RolloutRecord, body) for body in bodies]
            highest = connection.execute(select(func.max(_ROLLOUTS.c.number))).scalar()
            number = (highest or 0) + 1
            record = make(number, before)
            connection.execute(insert(_ROLLOUTS).values(number=number, id=record.id, body=encode(record)))
            _count_change(connection)
            write_traces(connection, [] if act is None else [act(record)])
            return record

    def order_rollout(
        self,
        rollout: str,
        make: Callable[[RolloutRecord | None, list[Order]], Order],
        act: Callable[[Order], Act] | None = None,
    ) -> Order:
        """Store an order, and `act` of it, in a transaction that excludes every other one."""
        with self._writing() as connection:
            body = connection.execute(select(_ROLLOUTS.c.body).where(_ROLLOUTS.c.id == rollout)).scalar()
            query = select(_ORDERS.c.body).where(_ORDERS.c.rollout == rollout).order_by(_ORDERS.c.number)
            before = [decoded(Order, each) for each in connection.execute(query).scalars()]
            order = make(None if body is None else decoded(RolloutRecord, body), before)
            _count_change(connection)
            self._write(connection, [order] if act is None else [order, act(order)])
            return order

    def orders(self, rollout: str | None = None) -> list[Order]:
        """What operators ordered, oldest first."""
        query = select(_ORDERS.c.body).order_by(_ORDERS.c.rollout, _ORDERS.c.number)
        return self._load(Order, query if rollout is None else query.where(_ORDERS.c.rollout == rollout))

    def decisions(self, rollout: str) -> list[Decision]:
        """What was decided about a rollout, oldest first."""
        query = select(_DECISIONS.c.body).where(_DECISIONS.c.rollout == rollout)
        return self._load(Decision, query.order_by(_DECISIONS.c.number))

    def label(self, labels: Labels, acts: Sequence[Act] = ()) -> None:
        """Replace the labels of a device."""
        with self._writing() as connection:
            _count_change(connection)
            self._write(connection, [labels, *acts])

    def labels(self) -> list[Labels]:
        """The labels of all devices that have some."""
        return self._load(Labels, select(_LABELS.c.body).order_by(_LABELS.c.device))

    def identities(self) -> Identities:
        """Every claim and every certificate."""
        with self._reading() as connection:
            return _read_identities(connection)

    def change_identities(self, change: Callable[[Identities], Sequence[IdentityRecord | Act]]) -> Identities:
        """Write what `change` decides, in one transaction that excludes every other change; returns how things stand then."""
        with self._writing() as connection:
            records = change(_read_identities(connection))
            if records:
                _count_change(connection)
                self._write(connection, records)
            return _read_identities(connection)

    def accounts(self) -> Accounts:
        """Users, their sign-ins and tokens."""
        with self._reading() as connection:
            return _read_accounts(connection)

    def accounts_of(self, digest: str) -> Accounts:
        """One sign-in or token, by the digest of its secret, and its user: what a request needs of all accounts."""
        with self._reading() as connection:
            query = select(_SESSIONS.c.body).where(_SESSIONS.c.digest == digest)
            sessions = [decoded(SessionRecord, body) for body in connection.execute(query).scalars()]
            users = [_read_user(connection, session.user) for session in sessions]
        return Accounts([user for user in users if user is not None], sessions)

    def user(self, name: str) -> UserRecord | None:
        """A user, if there is one of this name."""
        with self._reading() as connection:
            return _read_user(connection, name)

    def change_accounts(self, change: Callable[[Accounts], Sequence[AccountRecord | Act]]) -> None:
        """Write what `change` decides, in one transaction that excludes every other change."""
        with self._writing() as connection:
            records = change(_read_accounts(connection))
            if records:
                self._write(connection, records)

    def changes(self) -> int:
        """Grows with everything that other processes want noticed."""
        return int(self._scalar(select(_CONSTANTS.c.value).where(_CONSTANTS.c.name == "changes")) or 0)

    def _add_tables(self) -> None:
        """Make the tables that came later; an older program does without them, so the layout keeps its version."""
        with self._reading() as connection:
            known = inspect(connection).get_table_names()
        if {*_schema.tables, *TRAIL.tables} - set(known):
            with self._writing() as connection:
                _schema.create_all(connection)
                prepare_trail(connection)


def _named(family: Family, version: Version) -> Any:
    return and_(_RELEASES.c.family == family, _RELEASES.c.version == version)


def _refuse_published(connection: Connection, family: Family, version: Version) -> None:
    body = connection.execute(select(_RELEASES.c.body).where(_named(family, version))).scalar()
    if body is not None and decoded(ReleaseRecord, body).published_ms is not None:
        raise AlreadyPublishedError(
            f"{family} {version} is published and cannot change", hint="publish under another version"
        )


def _count_change(connection: Connection) -> None:
    row = _CONSTANTS.c.name == "changes"
    connection.execute(update(_CONSTANTS).where(row).values(value=_CONSTANTS.c.value + 1))


def _read_identities(connection: Connection) -> Identities:
    claims = connection.execute(select(_CLAIMS.c.body)).scalars()
    certificates = connection.execute(select(_CERTIFICATES.c.body)).scalars()
    return Identities(
        [decoded(ClaimRecord, body) for body in claims],
        [decoded(CertificateRecord, body) for body in certificates],
    )


def _read_accounts(connection: Connection) -> Accounts:
    users = connection.execute(select(_USERS.c.body).order_by(_USERS.c.name)).scalars()
    sessions = connection.execute(select(_SESSIONS.c.body)).scalars()
    return Accounts(
        [decoded(UserRecord, body) for body in users], [decoded(SessionRecord, body) for body in sessions]
    )


def _read_user(connection: Connection, name: str) -> UserRecord | None:
    body = connection.execute(select(_USERS.c.body).where(_USERS.c.name == name)).scalar()
    return None if body is None else decoded(UserRecord, body)


def _read_repository(connection: Connection) -> Repository | None:
    rows = connection.execute(select(_DOCUMENTS.c.name, _DOCUMENTS.c.body))
    bodies: dict[str, bytes] = {row.name: row.body for row in rows}
    if not bodies:
        return None
    roots: list[bytes] = []
    while f"root.{len(roots) + 1}" in bodies:
        roots.append(bodies[f"root.{len(roots) + 1}"])
    return Repository(
        roots=tuple(roots),
        documents=Documents(
            timestamp=bodies["timestamp"],
            snapshot=bodies["snapshot"],
            targets=bodies["targets"],
            delegated=tuple(
                (name.removeprefix(_DELEGATED), bodies[name])
                for name in sorted(bodies)
                if name.startswith(_DELEGATED)
            ),
        ),
    )


def _write_repository(connection: Connection, repository: Repository) -> None:
    documents = repository.documents
    bodies = {f"root.{version}": root for version, root in enumerate(repository.roots, start=1)}
    bodies |= {
        "timestamp": documents.timestamp,
        "snapshot": documents.snapshot,
        "targets": documents.targets,
    }
    bodies |= {_DELEGATED + role: data for role, data in documents.delegated}
    replace_rows(
        connection, _DOCUMENTS, {(name,): {"name": name, "body": body} for name, body in bodies.items()}
    )
