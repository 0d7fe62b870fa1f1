"""What a store only ever adds to: the audit trail, and alerts on their way to webhooks. Written in the transaction of what they tell of."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    delete,
    func,
    insert,
    select,
    update,
)

from server.adapters.database import Database, decoded, encode, replace_rows, text
from server.alerts.delivery import WAITING_MAX, dropped
from server.alerts.records import ABOUT_CHARS_MAX, Alert, Delivery, Sent, Trace, WebhookStanding
from server.audit import (
    NOTED,
    PRUNE,
    REFUSED_PER_HOUR_MAX,
    SERVER,
    START,
    Act,
    AuditRecord,
    Head,
    Verified,
    linked,
    new_act,
    verify,
)

TRAIL: Final = MetaData()
_NAME: Final = text(ABOUT_CHARS_MAX)
_AUDIT: Final = Table(
    "audit",
    TRAIL,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at_ms", BigInteger, nullable=False, index=True),
    Column("who", _NAME, nullable=False),
    Column("what", _NAME, nullable=False),
    Column("outcome", _NAME, nullable=False),
    Column("body", LargeBinary, nullable=False),
)
# One row: the newest record.
_HEAD: Final = Table(
    "audit_head",
    TRAIL,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
    Column("digest", text(64), nullable=False),
)
_ALERTS: Final = Table(
    "alerts",
    TRAIL,
    Column("id", text(64), primary_key=True),
    Column("at_ms", BigInteger, nullable=False, index=True),
    Column("due_ms", BigInteger, nullable=False),
    Column(
        "is_open", Integer, nullable=False, index=True
    ),  # 1 until it was given to the webhooks that want it
    Column("about", _NAME, nullable=False, index=True),
    Column("body", LargeBinary, nullable=False),
)
_DELIVERIES: Final = Table(
    "deliveries",
    TRAIL,
    Column("webhook", text(32), primary_key=True),
    Column("alert", text(64), primary_key=True, index=True),
    Column("state", text(16), nullable=False, index=True),
    Column("next_ms", BigInteger, nullable=False),
    Column("failed_ms", BigInteger, nullable=False),  # last failure of one that has not arrived; 0 for none
    Column("body", LargeBinary, nullable=False),
)

_HOUR_MS: Final = 3_600_000
_BATCH_MAX: Final = 200
"""Alerts that are given to webhooks in one transaction."""


class Trail(Database):
    """The audit trail and the outbox of a database."""

    def audit(
        self, *, since_ms: int = 0, who: str = "", what: str = "", before: int | None = None, count_max: int
    ) -> list[AuditRecord]:
        """Records of the audit trail, newest first.

        Args:
            since_ms: None that are older.
            who: Only of this user or device, or of `server`.
            what: Only acts whose kind begins so.
            before: Only records with a lower number.
            count_max: At most so many.
        """
        if not (who + what).isprintable():
            return []  # nothing is called so, and PostgreSQL does not even compare it
        query = select(_AUDIT.c.body).where(_AUDIT.c.at_ms >= since_ms)
        if who:
            query = query.where(_AUDIT.c.who == who)
        if what:
            query = query.where(_AUDIT.c.what.startswith(what, autoescape=True))
        if before is not None:
            query = query.where(_AUDIT.c.number < before)
        return self._load(AuditRecord, query.order_by(_AUDIT.c.number.desc()).limit(count_max))

    def verify_audit(self, expected: Head | None = None) -> Verified:
        """Look at every record of the audit trail; `expected` is one that was noted elsewhere."""
        with self._reading() as connection:
            head = _head(connection)
            query = select(_AUDIT.c.number, _AUDIT.c.body).order_by(_AUDIT.c.number)
            rows = connection.execute(query.execution_options(yield_per=500))
            return verify(((row.number, _bytes(row.body)) for row in rows), head, expected)

    def prune_audit(self, before_ms: int, now_ms: int) -> int:
        """Remove the oldest records, all from before `before_ms`, and note that; returns how many."""
        with self._writing() as connection:
            kept = connection.execute(
                select(func.min(_AUDIT.c.number)).where(_AUDIT.c.at_ms >= before_ms)
            ).scalar()
            old = _AUDIT.c.number < kept
            if kept is None or not (count := connection.execute(select(func.count()).where(old)).scalar()):
                return 0
            body = connection.execute(select(_AUDIT.c.body).where(_AUDIT.c.number == kept)).scalar_one()
            digest = decoded(AuditRecord, body).before
            connection.execute(delete(_AUDIT).where(old))
            text = f"{count} records are older than they are kept"
            act = new_act(
                SERVER, now_ms, PRUNE, "audit", text, through=kept - 1, digest=digest, records=count
            )
            append_acts(connection, [act])
            return count

    def alerts(self, since_ms: int) -> list[Alert]:
        """Alerts that were due after `since_ms`, or are yet to be told; oldest first."""
        query = select(_ALERTS.c.body).where(_ALERTS.c.due_ms >= since_ms).order_by(_ALERTS.c.due_ms)
        return self._load(Alert, query)

    def sent(self, about: str = "", count_max: int = 100) -> list[Sent]:
        """The latest alerts with what became of them, newest first."""
        if not about.isprintable():
            return []
        query = select(_ALERTS.c.body).order_by(_ALERTS.c.at_ms.desc(), _ALERTS.c.id).limit(count_max)
        alerts = self._load(
            Alert, query.where(_ALERTS.c.about == about[:ABOUT_CHARS_MAX]) if about else query
        )
        ids = [alert.id for alert in alerts]
        found = self._load(
            Delivery,
            select(_DELIVERIES.c.body).where(_DELIVERIES.c.alert.in_(ids)).order_by(_DELIVERIES.c.webhook),
        )
        by_alert: dict[str, list[Delivery]] = {}
        for delivery in found:
            by_alert.setdefault(delivery.alert, []).append(delivery)
        return [Sent(alert=alert, deliveries=by_alert.get(alert.id, [])) for alert in alerts]

    def distribute(self, now_ms: int, wanted: Callable[[Alert], Iterable[str]]) -> list[Delivery]:
        """Give alerts that are due to the webhooks that want them, once.

        Returns:
            Deliveries that had to be given up, since too many wait.
        """
        due = (_ALERTS.c.is_open == 1) & (_ALERTS.c.due_ms <= now_ms)
        if self._scalar(select(_ALERTS.c.id).where(due).limit(1)) is None:
            return []
        with self._writing() as connection:
            query = (
                select(_ALERTS.c.body).where(due).order_by(_ALERTS.c.due_ms, _ALERTS.c.id).limit(_BATCH_MAX)
            )
            alerts = [decoded(Alert, body) for body in connection.execute(query).scalars()]
            new = [
                Delivery(webhook=name, alert=alert.id, since_ms=alert.due_ms, next_ms=now_ms)
                for alert in alerts
                for name in wanted(alert)
            ]
            _put_deliveries(connection, new)
            ids = [alert.id for alert in alerts]
            connection.execute(update(_ALERTS).where(_ALERTS.c.id.in_(ids)).values(is_open=0))
            return [
                each for name in {each.webhook for each in new} for each in _drop_surplus(connection, name)
            ]

    def next_delivery(self, webhook: str) -> tuple[Delivery, Alert] | None:
        """What is tried next for a webhook, whenever that is."""
        query = (
            select(_DELIVERIES.c.body, _ALERTS.c.body)
            .join(_ALERTS, _ALERTS.c.id == _DELIVERIES.c.alert)
            .where(_DELIVERIES.c.webhook == webhook, _DELIVERIES.c.state == "waiting")
            .order_by(_DELIVERIES.c.next_ms, _DELIVERIES.c.alert)
            .limit(1)
        )
        with self._reading() as connection:
            row = connection.execute(query).first()
        return None if row is None else (decoded(Delivery, row[0]), decoded(Alert, row[1]))

    def put_delivery(self, delivery: Delivery) -> None:
        """Note what became of an attempt; one that was given up while it was on its way stays so, unless it has arrived."""
        mine = (_DELIVERIES.c.webhook == delivery.webhook) & (_DELIVERIES.c.alert == delivery.alert)
        with self._writing() as connection:
            state = connection.execute(select(_DELIVERIES.c.state).where(mine)).scalar()
            if state == "waiting" or delivery.state == "delivered":
                _put_deliveries(connection, [delivery])

    def drop_deliveries(self, configured: Sequence[str]) -> int:
        """Give up what waits for webhooks that are not configured any more; returns how much."""
        query = select(_DELIVERIES.c.body).where(
            _DELIVERIES.c.state == "waiting", _DELIVERIES.c.webhook.not_in(configured)
        )
        gone = self._load(Delivery, query)
        if gone:
            with self._writing() as connection:
                _put_deliveries(
                    connection, [dropped(each, "the webhook is not configured any more") for each in gone]
                )
        return len(gone)

    def standings(self, webhooks: Sequence[str]) -> list[WebhookStanding]:
        """How it goes with each of these webhooks."""
        with self._reading() as connection:
            return [_standing(connection, name) for name in webhooks]

    def forget_alerts(self, before_ms: int) -> int:
        """Drop alerts that were noticed before `before_ms`, unless they wait to be told; returns how many."""
        waiting = select(_DELIVERIES.c.alert).where(_DELIVERIES.c.state == "waiting")
        old = (_ALERTS.c.at_ms < before_ms) & (_ALERTS.c.is_open == 0) & _ALERTS.c.id.not_in(waiting)
        with self._writing() as connection:
            ids = list(connection.execute(select(_ALERTS.c.id).where(old)).scalars())
            for start in range(0, len(ids), _BATCH_MAX):
                some = ids[start : start + _BATCH_MAX]
                connection.execute(delete(_DELIVERIES).where(_DELIVERIES.c.alert.in_(some)))
                connection.execute(delete(_ALERTS).where(_ALERTS.c.id.in_(some)))
            return len(ids)


def prepare_trail(connection: Connection) -> None:
    """Lay the tables out where they are missing, and begin the chain."""
    TRAIL.create_all(connection)
    if connection.execute(select(_HEAD.c.id)).first() is None:
        connection.execute(insert(_HEAD).values(id=1, number=0, digest=START))


def write_traces(connection: Connection, traces: Sequence[Trace]) -> None:
    """Note acts and alerts; the last writes of a transaction, since others wait for the head of the chain."""
    _put_alerts(connection, [each for each in traces if isinstance(each, Alert)])
    append_acts(connection, [each for each in traces if isinstance(each, Act)])


def append_acts(connection: Connection, acts: Sequence[Act]) -> None:
    """Add to the chain. Of refused acts of one kind only so many an hour are noted; the last one says so."""
    if not acts:
        return
    head = _head(connection)
    rows = []
    refused: Counter[str] = Counter()
    for act in acts:
        if act.outcome not in NOTED:
            refused[act.what] += 1
            count = _refused_lately(connection, act) + refused[act.what]
            if count > REFUSED_PER_HOUR_MAX:
                continue
            if count == REFUSED_PER_HOUR_MAX:
                text = f"{act.text} (further ones within this hour are not noted)"
                act = msgspec.structs.replace(act, text=text)  # noqa: PLW2901 - the same act, and what comes of it
        record, body, head = linked(act, head)
        who = act.by.name if act.by.kind != "server" else "server"
        rows.append(
            {
                "number": record.number,
                "at_ms": act.at_ms,
                "who": who,
                "what": act.what,
                "outcome": act.outcome,
                "body": body,
            }
        )
    if rows:
        connection.execute(insert(_AUDIT), rows)
        connection.execute(
            update(_HEAD).where(_HEAD.c.id == 1).values(number=head.number, digest=head.digest)
        )


def _refused_lately(connection: Connection, act: Act) -> int:
    query = select(func.count()).where(
        _AUDIT.c.what == act.what, _AUDIT.c.outcome.not_in(NOTED), _AUDIT.c.at_ms > act.at_ms - _HOUR_MS
    )
    return int(connection.execute(query).scalar() or 0)


def _bytes(body: object) -> bytes:
    """A body as it was written: who alters one by hand may leave text behind, which SQLite allows."""
    return body if isinstance(body, bytes) else str(body).encode()


def _head(connection: Connection) -> Head:
    row = connection.execute(select(_HEAD.c.number, _HEAD.c.digest)).first()
    return Head(0, START) if row is None else Head(row.number, row.digest)


def _put_alerts(connection: Connection, alerts: Sequence[Alert]) -> None:
    rows: dict[tuple[Any, ...], dict[str, Any] | None] = {}
    for alert in alerts:
        is_open = connection.execute(select(_ALERTS.c.is_open).where(_ALERTS.c.id == alert.id)).scalar()
        if is_open == 0 and not alert.count:
            continue  # it was told already
        if is_open == 0:  # it was told a moment ago, and knows of more devices now
            alert = msgspec.structs.replace(alert, id=f"{alert.id}-{alert.count}")  # noqa: PLW2901 - see above
        rows[alert.id,] = {
            "id": alert.id,
            "at_ms": alert.at_ms,
            "due_ms": alert.due_ms,
            "is_open": 1,
            "about": alert.about[:ABOUT_CHARS_MAX],
            "body": encode(alert),
        }
    if rows:
        replace_rows(connection, _ALERTS, rows)


def _put_deliveries(connection: Connection, deliveries: Sequence[Delivery]) -> None:
    rows: dict[tuple[Any, ...], dict[str, Any] | None] = {
        (each.webhook, each.alert): {
            "webhook": each.webhook,
            "alert": each.alert,
            "state": each.state,
            "next_ms": each.next_ms,
            "failed_ms": (each.tried_ms or each.since_ms) if each.error else 0,
            "body": encode(each),
        }
        for each in deliveries
    }
    if rows:
        replace_rows(connection, _DELIVERIES, rows)


def _drop_surplus(connection: Connection, webhook: str) -> list[Delivery]:
    """Give up the oldest of too many."""
    waiting = (_DELIVERIES.c.webhook == webhook) & (_DELIVERIES.c.state == "waiting")
    count = connection.execute(select(func.count()).where(waiting)).scalar() or 0
    if count <= WAITING_MAX:
        return []
    bodies = connection.execute(select(_DELIVERIES.c.body).where(waiting)).scalars()
    oldest = sorted(
        (decoded(Delivery, body) for body in bodies), key=lambda each: (each.since_ms, each.alert)
    )
    gone = [
        dropped(each, f"more than {WAITING_MAX} wait: {each.error or 'not tried yet'}")
        for each in oldest[: count - WAITING_MAX]
    ]
    _put_deliveries(connection, gone)
    return gone


def _standing(connection: Connection, webhook: str) -> WebhookStanding:
    mine = _DELIVERIES.c.webhook == webhook
    counted = select(_DELIVERIES.c.state, func.count()).where(mine).group_by(_DELIVERIES.c.state)
    counts: dict[str, int] = {row[0]: row[1] for row in connection.execute(counted)}
    waiting = mine & (_DELIVERIES.c.state == "waiting")
    next_ms = connection.execute(select(func.min(_DELIVERIES.c.next_ms)).where(waiting)).scalar()
    failed = select(_DELIVERIES.c.body).where(mine, _DELIVERIES.c.failed_ms > 0)
    body = connection.execute(failed.order_by(_DELIVERIES.c.failed_ms.desc()).limit(1)).scalar()
    return WebhookStanding(
        name=webhook,
        waiting=counts.get("waiting", 0),
        delivered=counts.get("delivered", 0),
        dropped=counts.get("dropped", 0),
        next_ms=next_ms,
        failed=None if body is None else decoded(Delivery, body),
    )
