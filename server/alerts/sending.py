"""Brings alerts to webhooks while a server runs: one thread gives them to the webhooks that want them, and one for each webhook sends.

What is to be sent is in the database before anything is tried, and stays there until it has arrived or is given up: an alert arrives at
least once, whatever ends when. A receiver that does not answer keeps nothing waiting but what is for itself.
"""

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from protocol.errors import RequestError, StorageError
from server.adapters.store import SqlStore
from server.adapters.webhooks import post, read_secrets
from server.alerts.delivery import Answer, attempted, headers, message
from server.alerts.records import Alert, Delivery
from server.alerts.settings import WebhookSettings
from server.ports import Clock

POLL_S: Final = 0.5
"""How often the database is asked for new alerts: commands of other processes write some."""

STOP_S_MAX: Final = 1.0
"""That the end of the server waits for receivers, all together."""

IDLE_S: Final = 30.0
"""A webhook for which nothing waits looks that often by itself."""

_LOG: Final = logging.getLogger(__name__)

Post = Callable[[WebhookSettings, dict[str, str], bytes], Answer]


class Sender:
    """Sends what is to be sent; from `start` to `stop`.

    Args:
        database_url: Of the server.
        folder: Of the server.
        fleet: Name of the fleet.
        webhooks: Where to.
        clock: Wall clock.
        rng: For waits.
        page: Address of the page, if it has one that browsers elsewhere can use.
    """

    def __init__(
        self,
        database_url: str,
        folder: Path,
        fleet: str,
        webhooks: tuple[WebhookSettings, ...],
        clock: Clock,
        rng: random.Random,
        page: str = "",
    ) -> None:
        self.counters: Counter[tuple[str, str]] = Counter()  # by webhook and what became of an attempt
        self._store = SqlStore(database_url)
        self._folder = folder
        self._fleet = fleet
        self._webhooks = webhooks
        self._clock = clock
        self._rng = rng
        self._page = page
        self._is_stopping = threading.Event()
        self._closing = threading.Lock()
        self._is_closed = False
        self._wake = threading.Event()
        self._wakes = {webhook.name: threading.Event() for webhook in webhooks}
        self._warned: dict[str, str] = {}
        self._threads = [
            threading.Thread(target=self._run, args=[webhook], name=f"whimbrel-{webhook.name}", daemon=True)
            for webhook in webhooks
        ]
        self._threads.append(threading.Thread(target=self._share, name="whimbrel-alerts", daemon=True))

    def start(self) -> None:
        """Begin; gives up what waits for webhooks that are not in the settings any more."""
        gone = self._store.drop_deliveries([webhook.name for webhook in self._webhooks])
        if gone:
            _LOG.warning(
                "%d alerts are given up: the webhooks that they were for are gone from the settings", gone
            )
        for webhook in self._webhooks:
            try:
                read_secrets(self._folder, webhook)
            except RequestError as error:
                self._warn(webhook.name, f"webhook {webhook.name}: {error}")
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Alerts were saved just now."""
        self._wake.set()

    def stop(self) -> None:
        """End, without waiting for receivers: what is on its way is sent again after the next start."""
        self._is_stopping.set()
        for event in (self._wake, *self._wakes.values()):
            event.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout=STOP_S_MAX / len(self._threads))
        with self._closing:
            self._is_closed = True
            self._store.close()

    # Giving

    def _share(self) -> None:
        while not self._is_stopping.is_set():
            try:
                self._distribute()
            except StorageError as error:
                self._warn("", f"alerts cannot be given to webhooks: {error}")
            self._wake.wait(POLL_S)
            self._wake.clear()

    def _distribute(self) -> None:
        given: set[str] = set()

        def wanted(alert: Alert) -> list[str]:
            names = [webhook.name for webhook in self._webhooks if webhook.wants(alert)]
            given.update(names)
            return names

        for delivery in self._store.distribute(self._clock.now_ms(), wanted):
            self._count(delivery)
        for name in given:
            self._wakes[name].set()

    # Sending

    def _run(self, webhook: WebhookSettings) -> None:
        wake = self._wakes[webhook.name]
        while not self._is_stopping.is_set():
            wake.clear()
            try:
                wait_s = self._send_next(webhook)
            except StorageError as error:
                self._warn(webhook.name, f"webhook {webhook.name}: {error}")
                wait_s = IDLE_S
            if wait_s > 0:
                wake.wait(min(wait_s, IDLE_S))

    def _send_next(self, webhook: WebhookSettings) -> float:
        """Try what is due next; returns the seconds until the next look."""
        found = self._store.next_delivery(webhook.name)
        if found is None:
            return IDLE_S
        delivery, alert = found
        now_ms = self._clock.now_ms()
        if delivery.next_ms > now_ms:
            return (delivery.next_ms - now_ms) / 1000
        answer = self._post(webhook, alert)
        after = attempted(delivery, answer, self._clock.now_ms(), self._rng.random())
        with self._closing:
            if self._is_closed:
                return (
                    0  # the receiver took longer than the server's end: after the next start it is sent again
                )
            self._store.put_delivery(after)
        self._count(after)
        self._is_stopping.wait(60 / webhook.per_minute)
        return 0

    def _post(self, webhook: WebhookSettings, alert: Alert) -> Answer:
        body = message(alert, self._fleet, self._page)
        try:
            secrets = read_secrets(self._folder, webhook)  # each time: it may have been changed
        except RequestError as error:
            return Answer(0, f"secret: {error.message}")
        return post(self._folder, webhook, headers(alert, body, secrets, self._clock.now_ms()), body)

    def _count(self, delivery: Delivery) -> None:
        outcome = "failed" if delivery.state == "waiting" else delivery.state
        self.counters[delivery.webhook, outcome] += 1
        if outcome == "delivered":
            self._warned.pop(delivery.webhook, None)
        elif outcome == "dropped":
            _LOG.error(
                "webhook %s: alert %s is given up: %s", delivery.webhook, delivery.alert, delivery.error
            )
        else:
            self._warn(delivery.webhook, f"webhook {delivery.webhook}: {delivery.error}; tried again")

    def _warn(self, about: str, text: str) -> None:
        """Say something once, until it is something else."""
        if self._warned.get(about) != text:
            self._warned[about] = text
            _LOG.warning("%s", text)
