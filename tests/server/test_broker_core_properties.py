"""No history of packets, however strange, makes the broker core fail or lose count; the same one gives the same outputs."""

from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.broker.core import BrokerCore, Close, Output, Send
from server.broker.limits import BrokerLimits
from server.broker.packets import (
    Connack,
    Connect,
    Disconnect,
    Malformed,
    Pingreq,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Received,
    Subscribe,
    Unsubscribe,
    Will,
    encode,
    wire_bytes,
)

LIMITS = BrokerLimits(
    packet_bytes_max=100,
    connections_max=4,
    sessions_max=4,
    subscriptions_per_session_max=3,
    inflight_max=2,
    inbound_unreleased_max=2,
    queue_messages_max=3,
    queue_bytes_max=100,
    retained_messages_max=3,
    retained_bytes_max=90,
    unsent_bytes_max=150,
    unsent_control_bytes=8,
    match_cache_topics=2,
)

Step: TypeAlias = tuple[str, int, Received | int]


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Choose among strategies by weight; `one_of` drops repeated ones."""
    strategies = [strategy for weight, strategy in choices for _ in range(weight)]
    return st.integers(0, len(strategies) - 1).flatmap(strategies.__getitem__)


# Mostly what makes traffic; what ends a connection is rare, or nothing would ever be queued.
names = st.sampled_from(["a", "b", "a", "b", "c", "d", "e", ""])
good_topics = st.sampled_from(["t", "t/u", "t/v", "$t"])
topics = weighted((40, good_topics), (1, st.sampled_from(["", "t/+"])))
good_filters = st.sampled_from(["t", "t/+", "#", "+", "t/#", "t/u", "$t/#", "$share/g/t"])
filters = weighted((40, good_filters), (1, st.just("#/t")))
payloads = st.integers(0, 60).map(bytes)
identifiers = st.integers(1, 4)
qualities = st.integers(0, 2)


@st.composite
def publishes(draw: st.DrawFn) -> Publish:
    qos = draw(qualities)
    return Publish(
        draw(topics), draw(payloads), qos, draw(st.booleans()), False, draw(identifiers) if qos else 0
    )


wills = st.none() | st.builds(Will, topics, payloads, qualities, st.booleans())
subscribes = st.builds(
    Subscribe, identifiers, st.lists(st.tuples(filters, qualities), min_size=1, max_size=3).map(tuple)
)
traffic = weighted(
    (8, publishes()),
    (3, subscribes),
    (1, st.just(Pingreq())),
    (1, st.builds(Unsubscribe, identifiers, st.lists(filters, min_size=1, max_size=2).map(tuple))),
    *[(1, st.builds(kind, identifiers)) for kind in (Puback, Pubrec, Pubrel, Pubcomp)],
)
connects = st.builds(Connect, names, st.booleans(), st.sampled_from([0, 0, 2]), wills)
ends = weighted(
    (1, connects),
    (3, st.just(Disconnect())),
    (1, st.sampled_from([Malformed("damaged"), Connack(session_present=False, code=0)])),
)
slots = st.integers(0, 4)
joins = st.tuples(st.just("join"), slots, connects)
packets = st.tuples(st.just("packet"), slots, traffic)
steps = weighted(
    (8, joins),
    (40, packets),
    (8, st.tuples(st.just("drain"), slots, st.integers(1, 400))),
    (2, st.tuples(st.just("packet"), slots, ends)),
    (2, st.tuples(st.just("break"), slots, st.just(0))),
    (1, st.tuples(st.just("forget"), slots, st.just(0))),
    (1, st.tuples(st.just("wait"), st.just(0), st.integers(0, 2_000))),
)


class Replay:
    """Carries out steps on five places for connections, and checks what must hold after each."""

    def __init__(self) -> None:
        self.core = BrokerCore(LIMITS)
        self.now_ms = 0
        self.places: dict[int, int] = {}  # place -> connection
        self.unsent: dict[int, int] = {}  # open connection -> bytes
        self.last_connection_id = 0
        self.trace: list[Output] = []

    def step(self, step: Step) -> None:
        kind, place, detail = step
        connection_id = self.places.get(place, 0)
        if kind == "join":
            assert isinstance(detail, Connect)
            self.join(place, detail)
        elif kind == "packet":
            assert not isinstance(detail, int)
            self.take(self.core.received(connection_id, detail, self.now_ms))
        elif kind == "drain":
            assert isinstance(detail, int)
            byte_count = min(detail, self.unsent.get(connection_id, 0))
            if byte_count:
                self.unsent[connection_id] -= byte_count
            self.take(self.core.sent(connection_id, byte_count, self.now_ms))
        elif kind == "break":
            self.unsent.pop(connection_id, None)
            self.take(self.core.disconnected(connection_id, self.now_ms))
        elif kind == "forget":
            self.core.forget_retained()
        else:
            assert isinstance(detail, int)
            self.now_ms += detail
            self.take(self.core.expire(self.now_ms))
            deadline_ms = self.core.deadline()
            assert deadline_ms is None or deadline_ms > self.now_ms
        self.check()

    def join(self, place: int, packet: Connect) -> None:
        if self.places.get(place) in self.unsent:
            return
        self.last_connection_id += 1
        connection_id = self.places[place] = self.last_connection_id
        self.unsent[connection_id] = 0
        self.take(self.core.connected(connection_id, self.now_ms))
        self.take(self.core.received(connection_id, packet, self.now_ms))

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.connection_id in self.unsent, "nothing is sent to a connection that is closed"
            if isinstance(output, Close):
                del self.unsent[output.connection_id]
            else:
                assert output.byte_count == wire_bytes(output.packet) == len(encode(output.packet))
                self.unsent[output.connection_id] += output.byte_count
        self.trace += outputs

    def check(self) -> None:
        core, counts = self.core, self.core.statistics
        sessions = core._sessions.values()
        assert {key: value.unsent_bytes for key, value in core._connections.items()} == self.unsent
        assert counts.connections_now == len(core._connections) <= LIMITS.connections_max
        assert counts.sessions_now == len(sessions) <= LIMITS.sessions_max
        assert counts.queued_messages_now == sum(len(session.queue) for session in sessions)
        assert counts.subscriptions_now == sum(len(session.subscriptions) for session in sessions)
        assert set(core._offline) == {session.client_id for session in sessions if session.connection is None}
        for session in sessions:
            assert session.queue_bytes == sum(len(message.payload) for message in session.queue)
            assert len(session.subscriptions) <= LIMITS.subscriptions_per_session_max
            assert len(session.inflight) <= LIMITS.inflight_max
            assert session.queue_bytes <= LIMITS.queue_bytes_max
            assert not (session.is_clean and session.connection is None)
        assert counts.retained_messages <= LIMITS.retained_messages_max
        assert counts.retained_payload_bytes <= LIMITS.retained_bytes_max
        # The bound, one packet that was started below it, and the repetitions of a window.
        assert counts.unsent_bytes_peak <= (
            LIMITS.unsent_bytes_max + LIMITS.packet_bytes_max * (1 + LIMITS.inflight_max) + 8
        )


@settings(max_examples=150, deadline=None)
@given(st.lists(joins, min_size=2, max_size=4), st.lists(steps, max_size=80))
def test_no_history_makes_the_core_fail_or_lose_count(first: list[Step], history: list[Step]) -> None:
    one, other = Replay(), Replay()
    for step in [*first, *history]:
        one.step(step)
        other.step(step)
    assert one.trace == other.trace


def test_nothing_is_left_when_everyone_is_gone() -> None:
    core = BrokerCore(LIMITS)
    for connection_id in range(1, 4):
        core.connected(connection_id, 0)
        core.received(connection_id, Connect(f"c{connection_id}", will=Will("t", b"x")), 0)
        core.received(connection_id, Subscribe(1, (("t/#", 2), ("+", 1))), 0)
        core.received(connection_id, Publish("t/u", b"x", 2, packet_id=1), 0)
    for connection_id in range(1, 4):
        core.disconnected(connection_id, 0)
    assert not core._sessions
    assert not core._connections
    assert not core._subscriptions._root.children
    assert core.deadline() is None


@pytest.mark.parametrize("kind", [Send, Close])
def test_outputs_are_plain_tuples_that_a_trace_can_compare(kind: type) -> None:
    core = BrokerCore()
    core.connected(1, 0)
    outputs = core.received(1, Connect("", clean_session=False), 0)
    assert any(isinstance(output, kind) and output == tuple(output) for output in outputs)
