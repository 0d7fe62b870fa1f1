"""Getting hold of the keys of encrypted artifacts (SPEC section 5.5): by request, and for as long as a download lasts. Pure.

Keys themselves never pass through here: what arrives is wrapped, whoever has the private key opens it (`OpenKeys`), and keeps it in memory.
A device that was restarted asks again, so that one that was revoked meanwhile gets nothing more.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Final

from device.effects import Effect, ForgetKeys, OpenKeys, Publish, Subscribe, Unsubscribe
from device.events import KeysOpened
from protocol.errors import (
    ContentKeyError,
    KeyRefusedError,
    KeysUnavailableError,
    NotCertifiedError,
    TransportError,
    WhimbrelError,
)
from protocol.ids import DeviceId, Digest
from protocol.messages import KEYS_MAX, KeyAnswer, KeyRequest, encode_message
from protocol.topics import Topics

PATIENCE_MS: Final = 8_000
"""Wait for an answer before the keys are asked for again; doubled each time."""

PATIENCE_MAX_MS: Final = 60_000
REQUESTS_MAX: Final = 8
"""Requests in a row without the keys before the update is put off."""

_REFUSALS: Final[dict[str, type[WhimbrelError]]] = {
    kind.code: kind for kind in (KeyRefusedError, NotCertifiedError, KeysUnavailableError)
}


class KeysUnansweredError(TransportError):
    """Connected, and yet nobody answers a request for keys."""

    code = "keys.unanswered"


class ContentKeys:
    """Asks until every key that is wanted is open.

    Args:
        topics: Topics of the fleet.
        device: Who asks.
        rng: Source of jitter.
    """

    def __init__(self, topics: Topics, device: DeviceId, rng: random.Random) -> None:
        self.deadline_ms: int | None = None
        self._topics = topics
        self._device = device
        self._rng = rng
        self._wanted: Mapping[Digest, str] = {}  # names of keys by artifact
        self._open: frozenset[str] = frozenset()
        self._is_subscribed = False
        self._requests = 0
        self._last_error: WhimbrelError | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing that is wanted is missing."""
        return not self._missing

    @property
    def _missing(self) -> dict[Digest, str]:
        return {blob: key for blob, key in self._wanted.items() if key not in self._open}

    def want(self, keys: Mapping[Digest, str], now_ms: int) -> Iterator[Effect]:
        """The connection is up: ask for what is not open yet.

        Args:
            keys: Names of keys by artifact.
            now_ms: The instant.
        """
        self._wanted = keys
        self._requests = 0
        self._last_error = None
        if self.is_complete:
            return
        if not self._is_subscribed:
            self._is_subscribed = True
            yield Subscribe((self._topics.keys(self._device),), 1)
        yield self._request(now_ms)

    def receive(self, answer: KeyAnswer) -> Iterator[Effect]:
        """Somebody answered; nothing is believed but what opens, and has the signed name.

        Raises:
            WhimbrelError: Why there are no keys.
        """
        if self.deadline_ms is None:
            return
        if answer.code:
            raise _REFUSALS.get(answer.code, KeyRefusedError)(answer.detail or answer.code)
        keys = tuple(key for key in answer.keys if key.blob in self._missing)
        if keys:
            yield OpenKeys(keys, frozenset(self._missing.values()))

    def opened(self, event: KeysOpened) -> Iterator[Effect]:
        """Whoever holds the private key has tried."""
        if not self._wanted:
            yield ForgetKeys()  # it was under way when they were given up
            return
        self._open |= event.names
        if event.trouble:
            self._last_error = ContentKeyError(event.trouble)
        if self.is_complete:
            yield from self._rest()

    def timeout(self, now_ms: int) -> Iterator[Effect]:
        """No answer with all the keys came in time: ask again.

        Raises:
            WhimbrelError: Asked often enough; what was wrong with the last answer, if there was one.
        """
        if self._requests >= REQUESTS_MAX:
            raise self._last_error or KeysUnansweredError(
                f"no keys came after {REQUESTS_MAX} requests",
                hint="is a server running, and may this device read its topic `keys`?",
            )
        yield self._request(now_ms)

    def pause(self) -> None:
        """The connection is gone."""
        self._is_subscribed = False
        self.deadline_ms = None

    def stop(self) -> Iterator[Effect]:
        """No keys are wanted for now; those that are open stay."""
        yield from self._rest()

    def forget(self) -> Iterator[Effect]:
        """No keys are wanted any more."""
        yield from self._rest()
        if self._wanted:
            yield ForgetKeys()
        self._wanted = {}
        self._open = frozenset()

    def _request(self, now_ms: int) -> Effect:
        longest_ms = min(PATIENCE_MS << self._requests, PATIENCE_MAX_MS)
        self.deadline_ms = now_ms + self._rng.randint(PATIENCE_MS, longest_ms)
        self._requests += 1
        request = KeyRequest(blobs=tuple(self._missing)[:KEYS_MAX])
        return Publish(self._topics.request(self._device), encode_message(request), 1, retain=False)

    def _rest(self) -> Iterator[Effect]:
        self.deadline_ms = None
        if self._is_subscribed:
            self._is_subscribed = False
            yield Unsubscribe((self._topics.keys(self._device),))
