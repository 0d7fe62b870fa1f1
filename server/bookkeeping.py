"""What a running server writes down beside its work: acts and alerts that follow from what it saves, and how long all of that is kept."""

import importlib.metadata
import logging
import random
import re
from collections.abc import Sequence
from typing import Final

from protocol.errors import WhimbrelError
from protocol.trust import Target
from server.adapters.store import SqlStore
from server.alerts.records import Alert, WebhookStanding, new_alert
from server.alerts.sending import Sender
from server.alerts.watch import GROUP_INTERVAL_MS, GROUP_WAIT_MS, Watch
from server.audit import SERVER, Act, Details, new_act
from server.config import ServerConfig
from server.display import address_text
from server.events import Started
from server.ports import Clock, Repository
from server.releases.publisher import Publisher

_DAY_MS: Final = 86_400_000
_NAMED_MAX: Final = 3
_DIGEST: Final = re.compile(r"([0-9a-f]{12})[0-9a-f]{52}")
_LOG: Final = logging.getLogger(__name__)


class Bookkeeper:
    """Acts, alerts and retention of one running server.

    Args:
        store: Of the server.
        config: Its settings.
        clock: Wall clock.
        rng: For the waits of webhooks.
    """

    def __init__(self, store: SqlStore, config: ServerConfig, clock: Clock, rng: random.Random) -> None:
        self._store = store
        self._config = config
        self._clock = clock
        self._watch = Watch()
        self._chores_ms = 0  # when what is old is dropped next
        page = config.web.url if config.web is not None else ""
        self._sender = Sender(
            config.database_url, config.folder, config.fleet, config.webhooks, clock, rng, page
        )

    def start(self, started: Started) -> None:
        """Begin with what the store knows."""
        now_ms = self._clock.now_ms()
        lately = self._store.alerts(now_ms - GROUP_INTERVAL_MS - GROUP_WAIT_MS)
        self._watch = Watch(started.members, started.devices, lately)
        config = self._config
        act = self._act(
            "server.start",
            config.fleet,
            version=importlib.metadata.version("whimbrel"),
            broker=config.broker,
            database=address_text(config.database_url),
            page="" if config.web is None else config.web.url or f"{config.web.host}:{config.web.port}",
            webhooks=", ".join(f"{each.name} {each.shown_url}" for each in config.webhooks),
            audit_days=config.history.audit_days,
        )
        self._store.save([act])
        self._sender.start()

    def stop(self) -> None:
        """End; harmless where it did not begin."""
        self._sender.stop()

    def note_end(self, failure: BaseException | None) -> None:
        """Note that the server ends, and why where it did so by itself."""
        code = failure.code if isinstance(failure, WhimbrelError) else "server.failed"
        text = "" if failure is None else str(failure)
        try:
            self._store.save(
                [
                    self._act(
                        "server.stop", self._config.fleet, text, outcome="done" if failure is None else code
                    )
                ]
            )
        except WhimbrelError as error:
            _LOG.warning("the end of the server is not noted: %s", error)

    # What follows from what is saved

    def traces(self, records: Sequence[object], now_ms: int) -> list[Alert | Act]:
        """Acts and alerts to be saved in the same transaction as `records`."""
        return self._watch.look(records, now_ms)

    def saved(self, traces: Sequence[Alert | Act]) -> None:
        """They are: webhooks need not wait for the next look."""
        if any(isinstance(each, Alert) for each in traces):
            self._sender.wake()

    def signing(self, added: Sequence[Target], retired: Sequence[str]) -> list[Act]:
        """What is noted when documents are signed: deltas that are in them from now on or no more, or that they got a new date."""
        acts = []
        if added:
            paths = [target.path for target in added]
            acts.append(
                self._act(
                    "delta.sign", _named(paths), "they pay for devices of the fleet", targets=len(paths)
                )
            )
        if retired:
            acts.append(
                self._act("delta.retire", _named(retired), "nobody needs them any more", targets=len(retired))
            )
        return acts or [self._act("metadata.refresh", "timestamp", "documents were about to end")]

    def removed(self, path: str, blobs: int) -> Act:
        """What is noted when the blobs of a retired delta are removed."""
        return self._act("delta.remove", _named([path]), "it is not signed any more", blobs=blobs)

    # What people have to see to

    def remind(self, publisher: Publisher, repository: Repository) -> None:
        """Say which documents end soon that only people can sign: in the log, and once a day to webhooks."""
        now_ms = self._clock.now_ms()
        alerts = []
        for role, at_ms in publisher.due_elsewhere(repository, now_ms).items():
            days = (at_ms - now_ms) / _DAY_MS
            text = f"the document of role {role} ends in {days:.0f} days: run `whimbrel keys renew {role}`"
            _LOG.warning("%s", text)
            details: Details = {"role": role, "expires_ms": at_ms}
            alerts.append(
                new_alert(
                    "metadata.expiring",
                    role,
                    now_ms,
                    text,
                    key=f"{at_ms}/{now_ms // _DAY_MS}",
                    details=details,
                )
            )
        self._tell(alerts)

    def cannot_sign(self, error: WhimbrelError) -> None:
        """Say that the server cannot sign what it should sign by itself; once a day to webhooks."""
        _LOG.error("metadata cannot be signed: %s", error)
        now_ms = self._clock.now_ms()
        text = f"the server cannot sign metadata, which ends if that stays so: {error}"
        details = {"code": error.code}
        self._tell(
            [
                new_alert(
                    "metadata.expiring",
                    "server",
                    now_ms,
                    text,
                    key=f"sign/{now_ms // _DAY_MS}",
                    details=details,
                )
            ]
        )

    def _tell(self, alerts: list[Alert]) -> None:
        if alerts:
            self._store.save(alerts)
            self._sender.wake()

    # What is old

    def is_chore_due(self) -> bool:
        """Whether a day has passed since old records were dropped."""
        return self._clock.now_ms() >= self._chores_ms

    def drop_old(self) -> None:
        """Drop what is older than it is kept."""
        now_ms, history = self._clock.now_ms(), self._config.history
        self._chores_ms = now_ms + _DAY_MS
        self._store.forget_device_events(now_ms - history.device_days * _DAY_MS)
        self._store.forget_alerts(now_ms - history.alert_days * _DAY_MS)
        rollouts = self._store.forget_members(now_ms - history.rollout_days * _DAY_MS)
        if rollouts:
            text = f"their devices are older than {history.rollout_days} days"
            self._store.save(
                [self._act("history.forget", ", ".join(rollouts[:20]), text, rollouts=len(rollouts))]
            )
        self._store.prune_audit(now_ms - history.audit_days * _DAY_MS, now_ms)

    # For metrics

    def webhooks(self) -> list[tuple[WebhookStanding, dict[str, int]]]:
        """How it goes with each webhook, and what became of its attempts since the start."""
        names = [webhook.name for webhook in self._config.webhooks]
        counters = self._sender.counters
        return [
            (standing, {what: counters[standing.name, what] for what in ("delivered", "failed", "dropped")})
            for standing in self._store.standings(names)
        ]

    def _act(
        self, what: str, on: str, text: str = "", *, outcome: str = "done", **details: str | float
    ) -> Act:
        return new_act(SERVER, self._clock.now_ms(), what, on, text, outcome=outcome, **details)


def _named(paths: Sequence[str]) -> str:
    """The first of some targets, with as much of their digests as tells them apart."""
    more = ", …" if len(paths) > _NAMED_MAX else ""
    return ", ".join(_DIGEST.sub(r"\1…", path) for path in paths[:_NAMED_MAX]) + more
