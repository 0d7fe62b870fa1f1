"""Topics and filters: what is well-formed, which subscribers a topic reaches, which retained messages a filter finds.

Pure data structures over the levels of a topic (standard, section 4.7). Both trees are walked level by level, never
by recursion, and empty branches are pruned when their last entry goes.
"""

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from server.broker.limits import BrokerLimits
from server.broker.packets import Publish

Subscriber = TypeVar("Subscriber")

_SHARED_PREFIX: Final = "$share/"


def is_topic(topic: str, limits: BrokerLimits) -> bool:
    """Tell whether one may publish to `topic`: not empty, no wildcards, within the limits (section 4.7.3)."""
    return "+" not in topic and "#" not in topic and is_within_limits(topic, limits)


def is_filter(topic_filter: str) -> bool:
    """Tell whether the wildcards of a filter stand where they may (section 4.7.1)."""
    if not topic_filter:
        return False
    if "+" not in topic_filter and "#" not in topic_filter:
        return True
    levels = topic_filter.split("/")
    if "#" in topic_filter and ("#" in topic_filter[:-1] or levels[-1] != "#"):
        return False
    return all(level == "+" or "+" not in level for level in levels)


def is_shared(topic_filter: str) -> bool:
    """Tell whether a filter asks for a shared subscription, which MQTT 3.1.1 does not have."""
    return topic_filter.startswith(_SHARED_PREFIX)


def is_within_limits(topic: str, limits: BrokerLimits) -> bool:
    """Tell whether a topic or filter is neither empty nor too long nor too deep, and can be a string at all."""
    return (
        0 < len(topic) <= limits.topic_bytes_max
        and (topic.isascii() or len(topic.encode()) <= limits.topic_bytes_max)
        and topic.count("/") < limits.topic_levels_max
        and "\0" not in topic
    )


class _Branch(Generic[Subscriber]):
    __slots__ = ("children", "subscribers")

    def __init__(self) -> None:
        self.children: dict[str, _Branch[Subscriber]] = {}
        self.subscribers: dict[Subscriber, int] = {}


class SubscriptionTree(Generic[Subscriber]):
    """Who subscribed to what, by level of the filter.

    Order is that of subscribing, so that the same history gives the same deliveries.

    Args:
        cached_topics_max: Topics whose subscribers are remembered until any subscription changes.
    """

    def __init__(self, cached_topics_max: int) -> None:
        self._root: _Branch[Subscriber] = _Branch()
        self._cache: dict[str, tuple[tuple[Subscriber, int], ...]] = {}
        self._cached_topics_max = cached_topics_max

    def add(self, subscriber: Subscriber, topic_filter: str, qos: int) -> None:
        """Subscribe, or change the QoS of a subscription."""
        branch = self._root
        for level in topic_filter.split("/"):
            child = branch.children.get(level)
            if child is None:
                child = branch.children[level] = _Branch()
            branch = child
        branch.subscribers[subscriber] = qos
        self._cache.clear()

    def remove(self, subscriber: Subscriber, topic_filter: str) -> None:
        """Take back a subscription that exists."""
        path = [self._root]
        levels = topic_filter.split("/")
        for level in levels:
            path.append(path[-1].children[level])
        del path[-1].subscribers[subscriber]
        for level in reversed(levels):
            branch = path.pop()
            if branch.children or branch.subscribers:
                break
            del path[-1].children[level]
        self._cache.clear()

    def match(self, topic: str) -> tuple[tuple[Subscriber, int], ...]:
        """Return every subscriber of a topic once, with the highest QoS of its filters (section 3.3.5)."""
        found = self._cache.get(topic)
        if found is None:
            found = tuple(self._match(topic).items())
            if len(self._cache) >= self._cached_topics_max:
                self._cache.clear()
            self._cache[topic] = found
        return found

    def _match(self, topic: str) -> dict[Subscriber, int]:
        found: dict[Subscriber, int] = {}
        branches = [self._root]
        # Wildcards in the first level do not reach topics that begin with `$` (section 4.7.2).
        sees_wildcards = not topic.startswith("$")
        for level in topic.split("/"):
            below = []
            for branch in branches:
                children = branch.children
                if sees_wildcards:
                    if "#" in children:
                        _merge(found, children["#"].subscribers)
                    if "+" in children:
                        below.append(children["+"])
                if level in children:
                    below.append(children[level])
            branches = below
            sees_wildcards = True
        for branch in branches:
            _merge(found, branch.subscribers)
            # `a/#` reaches `a` as well (section 4.7.1.2).
            if "#" in branch.children:
                _merge(found, branch.children["#"].subscribers)
        return found


def _merge(found: dict[Subscriber, int], subscribers: dict[Subscriber, int]) -> None:
    for subscriber, qos in subscribers.items():
        if found.get(subscriber, -1) < qos:
            found[subscriber] = qos


class _Shelf:
    __slots__ = ("children", "message")

    def __init__(self) -> None:
        self.children: dict[str, _Shelf] = {}
        self.message: Publish | None = None


class RetainedStore:
    """The last retained message of each topic (section 3.3.1.3).

    Messages are kept as the PUBLISH that a subscriber at QoS 0 gets, one object for all of them, so that an edge
    encodes it once; `qos_of` has the QoS it was published with.

    Args:
        messages_max: Topics that are kept.
        payload_bytes_max: Bytes of their payloads together.
    """

    def __init__(self, messages_max: int, payload_bytes_max: int) -> None:
        self._root = _Shelf()
        self._qos: dict[str, int] = {}
        self._messages_max = messages_max
        self._payload_bytes_max = payload_bytes_max
        self.payload_bytes = 0

    def __len__(self) -> int:
        return len(self._qos)

    def qos_of(self, topic: str) -> int:
        """Return the QoS that a retained message was published with."""
        return self._qos[topic]

    def keep(self, topic: str, payload: bytes, qos: int) -> bool:
        """Replace the message of a topic; return False when there is no room, and the old one is gone.

        The old message goes in any case: a subscriber must not be told something that was superseded.
        """
        previous = self._find(topic)
        previous_bytes = len(previous.message.payload) if previous and previous.message else 0
        has_room = (
            topic in self._qos or len(self) < self._messages_max
        ) and self.payload_bytes - previous_bytes + len(payload) <= self._payload_bytes_max
        if not has_room:
            self.clear(topic)
            return False
        shelf = self._root
        for level in topic.split("/"):
            child = shelf.children.get(level)
            if child is None:
                child = shelf.children[level] = _Shelf()
            shelf = child
        shelf.message = Publish(topic, payload, retain=True)
        self._qos[topic] = qos
        self.payload_bytes += len(payload) - previous_bytes
        return True

    def clear(self, topic: str) -> None:
        """Forget the message of a topic, if there is one."""
        if topic not in self._qos:
            return
        levels = topic.split("/")
        path = [self._root]
        for level in levels:
            path.append(path[-1].children[level])
        message = path[-1].message
        assert message is not None, "every topic in the index has a message"
        self.payload_bytes -= len(message.payload)
        del self._qos[topic]
        path[-1].message = None
        for level in reversed(levels):
            shelf = path.pop()
            if shelf.children or shelf.message is not None:
                break
            del path[-1].children[level]

    def find(self, topic_filter: str) -> list[Publish]:
        """Return the retained messages that a filter matches, depth first, siblings in the order of their first arrival."""
        levels = topic_filter.split("/")
        shelves = [self._root]
        for depth, level in enumerate(levels):
            if level == "#":
                return [message for shelf in shelves for message in _below(shelf, at_root=depth == 0)]
            if level == "+":
                shelves = [
                    child
                    for shelf in shelves
                    for name, child in shelf.children.items()
                    if depth or not name.startswith("$")
                ]
            else:
                shelves = [shelf.children[level] for shelf in shelves if level in shelf.children]
        return [shelf.message for shelf in shelves if shelf.message is not None]

    def _find(self, topic: str) -> _Shelf | None:
        if topic not in self._qos:
            return None
        shelf = self._root
        for level in topic.split("/"):
            shelf = shelf.children[level]
        return shelf


def _below(shelf: _Shelf, *, at_root: bool) -> Iterator[Publish]:
    """Walk a shelf and all below it, depth first; `$` topics are not below the root (section 4.7.2)."""
    pending = [shelf]
    while pending:
        current = pending.pop()
        if current.message is not None:
            yield current.message
        pending.extend(
            child
            for name, child in reversed(current.children.items())
            if not (at_root and current is shelf and name.startswith("$"))
        )
