"""Getting hold of signed metadata, from the broker's cache or by request, and believing only what verifies. Pure."""

import random
from collections.abc import Iterator
from typing import Final

from device.effects import Effect, Publish, Subscribe, Unsubscribe
from device.ports import Trust
from protocol.director import time_statement
from protocol.errors import TransportError, TrustError, WhimbrelError
from protocol.ids import DeviceId
from protocol.messages import NONCE_BYTES, MetadataBundle, MetadataRequest, TimeStatement, encode_message
from protocol.topics import Topics
from protocol.trust import Documents, Floors, Verified

PATIENCE_MS: Final = 8_000
"""Wait for retained documents before they are asked for."""

PATIENCE_MAX_MS: Final = 60_000
REQUESTS_MAX: Final = 8
"""Requests in a row without verified metadata before the update is put off."""

_ROLES: Final = ("timestamp", "snapshot", "targets")


class MetadataUnavailableError(TransportError):
    """Connected, and yet no metadata comes."""

    code = "transport.no_metadata"


class MetadataSync:
    """Collects documents until a set of them verifies.

    Args:
        topics: Topics of the fleet.
        device: Who asks.
        rng: Source of jitter.
        root: The newest trusted root document.
        trust: Verifies what was collected.
        roles: Delegated roles whose targets are wanted.
    """

    def __init__(
        self,
        topics: Topics,
        device: DeviceId,
        rng: random.Random,
        root: bytes,
        trust: Trust,
        roles: tuple[str, ...] = (),
    ) -> None:
        self.root = root
        self.deadline_ms: int | None = None
        self.last_error: WhimbrelError | None = None
        self._topics = topics
        self._device = device
        self._rng = rng
        self._trust = trust
        self._delegated = roles
        self._root_version = trust.check_root(root)
        self._collected: dict[str, bytes] = {}
        self._is_answered = False
        self._roots: dict[int, bytes] = {}
        self._filters: tuple[str, ...] = ()
        self._requests = 0
        self.asks_time = False  # and no server has answered yet
        self.attested_ms = 0  # what a server has answered; 0 while it has not
        self._nonce = b""  # of the last request; older ones no longer count
        self._heard: TimeStatement | None = None

    @property
    def is_collecting(self) -> bool:
        """Whether documents are wanted."""
        return self.deadline_ms is not None

    def begin(self, now_ms: int, *, asks_time: bool = False) -> Iterator[Effect]:
        """The connection is up: subscribe to the documents.

        Args:
            now_ms: What the device's clock shows.
            asks_time: It is not to be believed: ask a server for the time, and with it for the documents.
        """
        self.asks_time = asks_time
        self.attested_ms = 0
        self._nonce, self._heard = b"", None
        self._collected.clear()
        self._is_answered = False
        self._roots.clear()
        self._requests = 0
        self.last_error = None
        if asks_time:  # without an answer the documents would be of no use
            self._filters = ()
            yield self._request()
            self._wait(now_ms)
            return
        successor = self._topics.root(self._root_version + 1)
        self._filters = (
            *(self._topics.metadata(role) for role in (*_ROLES, *self._delegated)),
            successor,
        )
        yield Subscribe(self._filters, 1)
        self._wait(now_ms)

    def pause(self) -> None:
        """The connection is gone."""
        self._filters = ()
        self.deadline_ms = None

    def end(self) -> Iterator[Effect]:
        """Enough: no more documents are wanted."""
        self.deadline_ms = None
        if self._filters:
            yield Unsubscribe(self._filters)
            self._filters = ()

    def receive(self, document: str, data: bytes) -> None:
        """Keep a document that the broker delivered."""
        if not self._filters:
            return
        if document in _ROLES or document in self._delegated:
            self._collected[document] = data
        elif document == f"root.{self._root_version + 1}":
            self._roots[self._root_version + 1] = data

    def receive_bundle(self, bundle: MetadataBundle) -> None:
        """Keep the documents that answer a request."""
        self._is_answered = True
        wanted = {role: data for role, data in bundle.delegated.items() if role in self._delegated}
        self._collected.update(
            wanted, timestamp=bundle.timestamp, snapshot=bundle.snapshot, targets=bundle.targets
        )
        self._roots.update(enumerate(bundle.roots, start=self._root_version + 1))
        self._heard = bundle.time

    def hear_time(self) -> int | None:
        """What time it is, if a server has said so in answer to the last request."""
        heard, self._heard = self._heard, None
        if not self.asks_time or heard is None:
            return None
        topic = self._topics.metadata_answer(self._device)
        try:
            self._trust.verify_time(
                self.root, time_statement(topic, self._nonce, heard.time_ms), heard.signatures
            )
        except TrustError as error:
            self.last_error = error
            return None
        self.asks_time = False
        self.attested_ms = heard.time_ms
        return heard.time_ms

    def follow(self, floors: Floors) -> Floors | None:
        """Take all steps along the chain of roots for which documents are there.

        Returns:
            What has to be durable before `root` is kept; None if there was no step.
        """
        before = self._root_version
        while (data := self._roots.pop(self._root_version + 1, None)) is not None:
            try:
                followed = self._trust.follow(self.root, data, floors)
            except TrustError as error:
                self.last_error = error  # a false one; the true one may still come
                break
            self.root, floors = followed.root, followed.floors
            self._root_version += 1
        if self._root_version == before:
            return None
        self._requests = 0  # somebody answers, and it leads on
        return floors

    def await_successor(self) -> Iterator[Effect]:
        """Subscribe to the root that would come next."""
        successor = (self._topics.root(self._root_version + 1),)
        if self._filters and successor[0] not in self._filters:
            self._filters += successor
            yield Subscribe(successor, 1)

    def documents(self) -> Documents | None:
        """What has been collected, if it can be a complete set.

        Retained documents come one by one, so all that are wanted are waited for; an answer has what there is.
        """
        wanted = _ROLES if self._is_answered else (*_ROLES, *self._delegated)
        if any(role not in self._collected for role in wanted):
            return None
        return Documents(
            timestamp=self._collected["timestamp"],
            snapshot=self._collected["snapshot"],
            targets=self._collected["targets"],
            delegated=tuple(
                (role, self._collected[role]) for role in self._delegated if role in self._collected
            ),
        )

    def verify(self, documents: Documents, floors: Floors, now_ms: int) -> Verified | None:
        """Verify a set; what does not verify may be half of a publication, so the rest is waited for."""
        try:
            verified = self._trust.verify(self.root, documents, floors, now_ms, self._delegated)
        except TrustError as error:
            self.last_error = error
            return None
        self.last_error = None
        return verified

    def timeout(self, now_ms: int) -> Iterator[Effect]:
        """No set verified in time: ask a server.

        Raises:
            WhimbrelError: Asked often enough; what stood in the way of the last set, if there was one.
        """
        self._requests += 1
        if self._requests > REQUESTS_MAX:
            raise self.last_error or MetadataUnavailableError(
                f"no metadata came after {REQUESTS_MAX} requests", hint="is a server running?"
            )
        yield self._request()
        self._wait(now_ms)

    def _request(self) -> Effect:
        """Ask for the documents, and for the time with a number that was never used before."""
        self._nonce = self._rng.randbytes(NONCE_BYTES) if self.asks_time else b""
        request = MetadataRequest(root_version=self._root_version, roles=self._delegated, nonce=self._nonce)
        return Publish(self._topics.request(self._device), encode_message(request), 1, retain=False)

    def _wait(self, now_ms: int) -> None:
        longest_ms = min(PATIENCE_MS << self._requests, PATIENCE_MAX_MS)
        self.deadline_ms = now_ms + self._rng.randint(PATIENCE_MS, longest_ms)
