"""Subscriptions and retained messages against a matcher that is too simple to be wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.broker.limits import BrokerLimits
from server.broker.matching import RetainedStore, SubscriptionTree, is_filter, is_topic, is_within_limits

levels = st.sampled_from(["", "a", "b", "$x", "é"])
topics = st.lists(levels, min_size=1, max_size=4).map("/".join).filter(bool)
filters = (
    st.tuples(st.lists(levels | st.just("+"), max_size=4), st.sampled_from(["", "#"]))
    .map(lambda parts: "/".join([*parts[0], *parts[1]]))
    .filter(bool)
)
subscribers = st.integers(0, 3)


def naive_match(topic_filter: str, topic: str) -> bool:
    """Section 4.7, one level at a time."""
    if topic[0] == "$" and topic_filter[0] in "+#":
        return False
    wanted, have = topic_filter.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted = wanted[:-1]
        if len(have) < len(wanted):
            return False
        have = have[: len(wanted)]
    return len(wanted) == len(have) and all(w in ("+", h) for w, h in zip(wanted, have, strict=True))


changes = st.tuples(subscribers, filters, st.sampled_from([None, 0, 1, 2]))


@given(st.lists(st.tuples(changes, topics), max_size=40))
def test_subscribers_are_those_of_a_naive_matcher_after_any_history(
    history: list[tuple[tuple[int, str, int | None], str]],
) -> None:
    tree: SubscriptionTree[int] = SubscriptionTree(3)
    model: dict[tuple[int, str], int] = {}
    for (subscriber, topic_filter, qos), topic in history:
        if qos is not None:
            tree.add(subscriber, topic_filter, qos)
            model[subscriber, topic_filter] = qos
        elif model.pop((subscriber, topic_filter), None) is not None:
            tree.remove(subscriber, topic_filter)
        expected: dict[int, int] = {}
        for (each, wanted), granted in model.items():
            if naive_match(wanted, topic):
                expected[each] = max(granted, expected.get(each, 0))
        found = tree.match(topic)
        assert dict(found) == expected
        assert len(found) == len(expected)
    for subscriber, topic_filter in model:
        tree.remove(subscriber, topic_filter)
    assert not tree._root.children


@given(st.lists(st.tuples(topics, st.binary(max_size=4), st.integers(0, 2)), max_size=40), filters)
def test_retained_messages_are_those_of_a_naive_matcher_after_any_history(
    history: list[tuple[str, bytes, int]], topic_filter: str
) -> None:
    store = RetainedStore(8, 20)
    model: dict[str, tuple[bytes, int]] = {}
    for topic, payload, qos in history:
        if not payload:
            store.clear(topic)
            model.pop(topic, None)
            continue
        model.pop(topic, None)
        has_room = len(model) < 8 and sum(len(kept) for kept, _ in model.values()) + len(payload) <= 20
        if has_room:
            model[topic] = (payload, qos)
        assert store.keep(topic, payload, qos) == has_room
        assert len(store) == len(model)
        assert store.payload_bytes == sum(len(kept) for kept, _ in model.values())
    found = store.find(topic_filter)
    assert {message.topic: (message.payload, store.qos_of(message.topic)) for message in found} == {
        topic: kept for topic, kept in model.items() if naive_match(topic_filter, topic)
    }
    assert len({message.topic for message in found}) == len(found)
    for topic in model:
        store.clear(topic)
    assert (store.payload_bytes, store._root.children) == (0, {})


@pytest.mark.parametrize(
    ("topic_filter", "is_one"),
    [
        ("a", True),
        ("/", True),
        ("+", True),
        ("#", True),
        ("a/+/b/#", True),
        ("+/+", True),
        ("$share/a/b", True),
        ("", False),
        ("a#", False),
        ("#/a", False),
        ("a/#/b", False),
        ("##", False),
        ("a+/b", False),
        ("+a", False),
        ("a/#b", False),
        ("a/b+#", False),
    ],
)
def test_wildcards_stand_alone_in_a_level_and_the_hash_last(topic_filter: str, is_one: bool) -> None:
    assert is_filter(topic_filter) == is_one


def test_topics_are_bounded_in_bytes_and_levels() -> None:
    limits = BrokerLimits(topic_bytes_max=8, topic_levels_max=3)
    assert is_topic("a/b/c", limits)
    assert is_topic("éééé", limits)
    for topic in ("", "a/+", "#", "a/b/c/d", "123456789", "ééééé", "a\0"):
        assert not is_topic(topic, limits)
    assert is_within_limits("+/#", limits)
