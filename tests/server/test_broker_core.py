"""The broker core in virtual time: sessions, limits, back-pressure, deadlines. No sockets, no clock.

What any broker must do is in `test_broker_contract.py`; here is what only a pure core can show.
"""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.errors import RequestError
from server.broker.core import BrokerCore, Close, Output, Send
from server.broker.limits import BrokerLimits
from server.broker.packets import (
    SUBACK_FAILURE,
    Connack,
    Connect,
    Disconnect,
    Malformed,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Received,
    Suback,
    Subscribe,
    Unsubscribe,
    Will,
    wire_bytes,
)


class World:
    """A core with a network that takes everything at once, unless it is told to hold back."""

    def __init__(self, **limits: Any) -> None:
        self.core = BrokerCore(BrokerLimits(**limits))
        self.now_ms = 1_000
        self.inboxes: dict[int, list[Packet]] = {}
        self.closed: dict[int, str] = {}
        self.held: dict[int, int] = {}

    def open(self, client_id: str, *, clean: bool = True, **fields: Any) -> int:
        connection_id = len(self.inboxes) + 1
        self.inboxes[connection_id] = []
        self.carry_out(self.core.connected(connection_id, self.now_ms))
        self.send(connection_id, Connect(client_id, clean, **fields))
        return connection_id

    def send(self, connection_id: int, *packets: Received) -> None:
        for packet in packets:
            self.carry_out(self.core.received(connection_id, packet, self.now_ms))

    def carry_out(self, outputs: list[Output]) -> None:
        for output in outputs:
            if isinstance(output, Close):
                self.closed[output.connection_id] = output.reason
                continue
            assert output.byte_count == wire_bytes(output.packet)
            self.inboxes[output.connection_id].append(output.packet)
            if output.connection_id in self.held:
                self.held[output.connection_id] += output.byte_count
            else:
                self.carry_out(self.core.sent(output.connection_id, output.byte_count, self.now_ms))

    def hold(self, connection_id: int) -> None:
        self.held[connection_id] = 0

    def release(self, connection_id: int) -> None:
        self.carry_out(self.core.sent(connection_id, self.held.pop(connection_id), self.now_ms))

    def advance(self, milliseconds: int) -> None:
        self.now_ms += milliseconds
        self.carry_out(self.core.expire(self.now_ms))

    def take(self, connection_id: int) -> list[Packet]:
        taken, self.inboxes[connection_id] = self.inboxes[connection_id], []
        return taken

    def messages(self, connection_id: int) -> list[Publish]:
        return [packet for packet in self.take(connection_id) if isinstance(packet, Publish)]


def subscribed(world: World, client_id: str, topic_filter: str = "#", qos: int = 0, **fields: Any) -> int:
    connection_id = world.open(client_id, **fields)
    world.send(connection_id, Subscribe(1, ((topic_filter, qos),)))
    world.take(connection_id)
    return connection_id


# --- Who may do what, and when ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("connect", "code"),
    [
        (Connect("a"), 0),
        (Connect(""), 0),
        (Connect("", clean_session=False), 2),
        (Connect("a" * 257), 2),
        (Connect("é" * 129), 2),
        (Connect("", protocol_level=5), 1),
        (Connect("", protocol_level=3), 1),
    ],
)
def test_connect_is_answered_with_the_code_of_the_standard(connect: Connect, code: int) -> None:
    core = BrokerCore()
    core.connected(1, 0)
    outputs = core.received(1, connect, 0)
    assert outputs[0] == Send(1, Connack(session_present=False, code=code), 4)
    assert [type(output) for output in outputs[1:]] == [Close] * (code != 0)


@pytest.mark.parametrize(
    "packets",
    [
        (Pingreq(),),
        (Disconnect(),),
        (Malformed("damaged"),),
        (Connect("a"), Connect("a")),
        (Connect("a"), Malformed("damaged")),
        (Connect("a"), Connack(session_present=False, code=0)),
        (Connect("a"), Suback(1, (0,))),
        (Connect("a"), Publish("a/+", b"")),
        (Connect("a"), Publish("", b"")),
        (Connect("a"), Publish("a" * 1_025, b"")),
        (Connect("a"), Publish("/".join("a" * 33), b"")),
        (Connect("a"), Publish("a", bytes(8 << 20))),
        (Connect("a"), Subscribe(1, (("a/#/b", 0),))),
        (Connect("a"), Subscribe(1, (("a", 0),) * 1_001)),
        (Connect("a"), Unsubscribe(1, ("",))),
        (Connect("a", will=Will("a/#", b"")),),
    ],
)
def test_what_breaks_the_protocol_or_a_limit_closes_the_connection(packets: tuple[Received, ...]) -> None:
    core = BrokerCore()
    core.connected(1, 0)
    outputs = [output for packet in packets for output in core.received(1, packet, 0)]
    assert isinstance(outputs[-1], Close)
    assert core.statistics.protocol_errors == 1
    assert core.received(1, Pingreq(), 0) == core.sent(1, 4, 0) == core.disconnected(1, 0) == []
    assert (core.statistics.connections_now, core.statistics.sessions_now) == (0, 0)


def test_filters_beyond_a_limit_and_shared_ones_are_refused_one_by_one() -> None:
    world = World(subscriptions_per_session_max=2)
    client = world.open("a")
    wanted = (("$share/g/x", 1), ("a", 2), ("/".join("a" * 33), 0), ("b", 1), ("c", 1), ("a", 0))
    world.send(client, Subscribe(7, wanted))
    refused = SUBACK_FAILURE
    assert world.take(client)[1:] == [Suback(7, (refused, 2, refused, 1, refused, 0))]


def test_connections_beyond_the_limit_are_closed_at_once() -> None:
    world = World(connections_max=1)
    first, second = world.open("a"), world.open("b")
    assert (first in world.closed, second in world.closed) == (False, True)
    assert world.take(second) == []


def test_the_session_that_was_away_longest_makes_room_and_a_connected_one_never() -> None:
    world = World(sessions_max=2)
    oldest, newer = (subscribed(world, name, qos=1, clean=False) for name in ("oldest", "newer"))
    for connection in (oldest, newer):
        world.send(connection, Disconnect())
    third = world.open("third")
    assert world.core.statistics.sessions_displaced == 1
    newer = world.open("newer", clean=False)
    assert world.take(newer) == [Connack(session_present=True, code=0)]
    refused = world.open("fourth")
    assert world.take(refused) == [Connack(session_present=False, code=3)]
    assert refused in world.closed
    assert third not in world.closed
    assert world.core.statistics.subscriptions_now == 1


def test_a_taken_over_connection_is_closed_before_the_new_one_is_answered() -> None:
    world = World()
    observer = subscribed(world, "observer", "gone")
    world.open("device", will=Will("gone", b"1"))
    core = world.core
    core.connected(99, 0)
    outputs = core.received(99, Connect("device"), 0)
    assert [type(output) for output in outputs] == [Close, Send, Send]
    assert [output.connection_id for output in outputs] == [2, observer, 99]
    assert core.statistics.takeovers == 1


# --- Deadlines ----------------------------------------------------------------------------------------------


def test_a_connection_that_never_says_connect_is_closed_after_ten_seconds() -> None:
    core = BrokerCore()
    core.connected(1, 500)
    assert core.deadline() == 10_500
    assert core.expire(10_499) == []
    assert isinstance(core.expire(10_500)[0], Close)
    assert core.deadline() is None


def test_keep_alive_runs_from_the_last_packet_and_publishes_the_will() -> None:
    world = World()
    observer = subscribed(world, "observer", "gone")
    device = world.open("device", keep_alive_s=10, will=Will("gone", b"1"))
    world.advance(14_999)
    world.send(device, Pingreq())
    world.advance(14_999)
    assert device not in world.closed
    assert world.messages(observer) == []
    world.advance(1)
    assert device in world.closed
    assert world.messages(observer) == [Publish("gone", b"1")]
    assert world.core.statistics.keep_alive_expired == 1
    assert world.core.deadline() is None


def test_without_keep_alive_there_is_no_deadline() -> None:
    world = World()
    device = world.open("device", keep_alive_s=0)
    assert world.core.deadline() is None
    world.advance(10**9)
    assert device not in world.closed


def test_deadlines_of_connections_that_left_do_not_pile_up() -> None:
    world = World()
    world.open("stays", keep_alive_s=1_000)
    for _ in range(10_000):
        device = world.open("device", keep_alive_s=60_000)
        world.send(device, Disconnect())
    assert len(world.core._deadlines) < 2_000
    assert world.core.deadline() == 1_000 + 1_500_000


# --- Flow ---------------------------------------------------------------------------------------------------


def test_one_message_object_goes_to_every_subscriber_at_qos_0() -> None:
    world = World()
    clients = [subscribed(world, f"c{number}") for number in range(5)]
    world.send(clients[0], Publish("a", b"x", retain=True))
    first, *others = [world.messages(client)[0] for client in clients]
    assert all(other is first for other in others)
    world.send(clients[1], Subscribe(1, (("a", 0),)))
    world.send(clients[2], Subscribe(1, (("a", 0),)))
    assert world.messages(clients[1])[0] is world.messages(clients[2])[0]


def test_two_groups_of_chunks_are_never_dropped_for_a_reader_that_stands_still() -> None:
    world = World()
    publisher, device = world.open("publisher"), world.open("device")
    for number in range(16):
        world.send(publisher, Publish(f"b/d.{number // 8}/{number}", bytes(65_536), retain=True))
    world.hold(device)
    world.send(device, Subscribe(1, (("b/d.0/+", 0), ("b/d.1/+", 0))))
    assert len(world.messages(device)) == 16
    assert world.core.statistics.dropped == 0


def test_beyond_the_hard_bound_qos_0_is_dropped_and_qos_1_waits() -> None:
    world = World(unsent_bytes_max=1_000)
    publisher = world.open("publisher")
    device = subscribed(world, "device", qos=1)
    world.hold(device)
    for number in range(20):
        world.send(publisher, Publish(f"zero/{number}", bytes(100)))
    for number in range(5):
        world.send(publisher, Publish(f"one/{number}", bytes(100), 1, packet_id=1))
    counts = world.core.statistics
    # A message of QoS 1 is started while there is any room, and may pass the bound by itself.
    assert [message.qos for message in world.messages(device)] == [0] * 9 + [1]
    assert (counts.dropped_slow_consumer, counts.queued_messages_now) == (11, 4)
    world.release(device)
    assert [message.topic for message in world.messages(device)] == [
        f"one/{number}" for number in range(1, 5)
    ]
    assert (counts.queued_messages_now, counts.dropped) == (0, 11)


def test_a_client_that_makes_us_answer_and_never_reads_is_closed() -> None:
    world = World(unsent_bytes_max=1, unsent_control_bytes=1, packet_bytes_max=1_000)
    client = world.open("client")
    world.hold(client)
    for _ in range(600):
        world.send(client, Pingreq())
    assert "does not read" in world.closed[client]
    assert len(world.take(client)) <= 502


@pytest.mark.parametrize("limits", [{"queue_messages_max": 3}, {"queue_bytes_max": 30}])
def test_a_full_queue_drops_the_newest_and_counts_it(limits: dict[str, int]) -> None:
    world = World(**limits)
    publisher = world.open("publisher")
    device = subscribed(world, "device", qos=1, clean=False)
    world.send(device, Disconnect())
    for number in range(5):
        world.send(publisher, Publish(f"{number}", bytes(10), 1, packet_id=1))
    assert (world.core.statistics.dropped_queue_full, world.core.statistics.queued_messages_now) == (2, 3)
    device = world.open("device", clean=False)
    assert [message.topic for message in world.messages(device)] == ["0", "1", "2"]


def test_packet_identifiers_skip_those_in_use_and_start_again_after_65535() -> None:
    world = World()
    publisher = world.open("publisher")
    device = subscribed(world, "device", qos=1)
    seen = []
    for _ in range(65_536):
        world.send(publisher, Publish("a", b"", 1, packet_id=1))
        (message,) = world.messages(device)
        seen.append(message.packet_id)
        if message.packet_id != 1:
            world.send(device, Puback(message.packet_id))
    assert seen[:3] == [1, 2, 3]
    assert seen[-2:] == [65_535, 2]


@pytest.mark.parametrize(
    ("qos", "answers", "expected"),
    [
        (1, [Pubrec], []),
        (1, [Pubcomp], []),
        (2, [Puback], []),
        (2, [Pubcomp], []),
        (2, [Pubrec, Pubrec], [Pubrel, Pubrel]),
        (2, [Pubrec, Puback], [Pubrel]),
    ],
)
def test_an_answer_of_the_wrong_kind_changes_nothing(
    qos: int, answers: list[Any], expected: list[type]
) -> None:
    world = World()
    publisher = world.open("publisher")
    device = subscribed(world, "device", qos=2)
    world.send(publisher, Publish("a", b"", qos, packet_id=1))
    (message,) = world.messages(device)
    for answer in answers:
        world.send(device, answer(message.packet_id))
    assert [type(packet) for packet in world.take(device)] == expected
    assert len(world.core._sessions["device"].inflight) == 1


def test_an_unknown_pubrec_is_released_and_an_unknown_pubrel_completed() -> None:
    world = World()
    client = world.open("client")
    world.take(client)
    world.send(client, Puback(5), Pubrec(5), Pubrel(6), Pubcomp(7))
    assert world.take(client) == [Pubrel(5), Pubcomp(6)]


def test_a_publisher_cannot_leave_any_number_of_qos_2_messages_open() -> None:
    world = World(inbound_unreleased_max=3)
    client = world.open("client")
    world.send(client, *(Publish("a", b"", 2, packet_id=number) for number in (1, 2, 3, 3)))
    assert client not in world.closed
    world.send(client, Publish("a", b"", 2, packet_id=4))
    assert client in world.closed


# --- Retained messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"retained_messages_max": 2}, {"retained_bytes_max": 20}])
def test_a_full_store_passes_messages_on_without_keeping_them(limits: dict[str, int]) -> None:
    world = World(**limits)
    publisher, early = world.open("publisher"), subscribed(world, "early")
    for number in range(4):
        world.send(publisher, Publish(f"{number}", bytes(10), retain=True))
    late = world.open("late")
    world.send(late, Subscribe(1, (("#", 0),)))
    assert [message.topic for message in world.messages(early)] == ["0", "1", "2", "3"]
    assert [message.topic for message in world.messages(late)] == ["0", "1"]
    counts = world.core.statistics
    assert (counts.retained_refused, counts.retained_messages, counts.retained_payload_bytes) == (2, 2, 20)


def test_a_lost_cache_leaves_sessions_alone() -> None:
    world = World()
    publisher, device = world.open("publisher"), subscribed(world, "device")
    world.send(publisher, Publish("a", b"x", retain=True))
    world.core.forget_retained()
    world.messages(device)
    world.send(device, Subscribe(2, (("a", 0),)))
    assert world.messages(device) == []
    world.send(publisher, Publish("a", b"y", retain=True))
    assert [message.payload for message in world.messages(device)] == [b"y"]
    assert world.core.statistics.retained_payload_bytes_peak == 1


def test_statistics_count_packets_and_bytes_both_ways() -> None:
    world = World()
    client = subscribed(world, "a")
    world.send(client, Publish("t", bytes(100)), Pingreq(), Disconnect())
    counts = world.core.statistics
    received: list[Packet] = [
        Connect("a"),
        Subscribe(1, (("#", 0),)),
        Publish("t", bytes(100)),
        Pingreq(),
        Disconnect(),
    ]
    sent: list[Packet] = [Connack(False, 0), Suback(1, (0,)), Publish("t", bytes(100)), Pingresp()]
    assert (counts.packets_in, counts.bytes_in) == (5, sum(wire_bytes(packet) for packet in received))
    assert (counts.packets_out, counts.bytes_out) == (4, sum(wire_bytes(packet) for packet in sent))
    assert (counts.messages_in, counts.messages_out, counts.connections_peak) == (1, 1, 1)


@pytest.mark.parametrize(
    "limits", [{"inflight_max": 0}, {"inflight_max": 65_536}, {"packet_bytes_max": 1 << 29}]
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        BrokerLimits(**limits)


# --- Any history --------------------------------------------------------------------------------------------


class AnyHistory(RuleBasedStateMachine):
    """One persistent subscriber that comes and goes, acknowledges late, and must get everything once acknowledged."""

    @initialize()
    def begin(self) -> None:
        self.world = World(inflight_max=3, queue_messages_max=6)
        self.publisher = self.world.open("publisher")
        self.device = 0
        self.sent_count = 0
        self.expected: list[int] = []  # accepted by the broker and not yet acknowledged, in order
        self.held: list[int] = []  # identifiers to acknowledge on this connection
        self.come()
        self.world.send(self.device, Subscribe(1, (("t", 1), ("+", 0))))

    @precondition(lambda self: not self.device)
    @rule()
    def come(self) -> None:
        self.device = self.world.open("device", clean=False)
        self.held = []

    @precondition(lambda self: self.device)
    @rule(politely=st.booleans())
    def leave(self, politely: bool) -> None:
        self.collect()
        if politely:
            self.world.send(self.device, Disconnect())
        else:
            self.world.carry_out(self.world.core.disconnected(self.device, 0))
        self.device = 0

    @rule()
    def publish(self) -> None:
        dropped = self.world.core.statistics.dropped_queue_full
        self.world.send(self.publisher, Publish("t", b"%d" % self.sent_count, 1, packet_id=1))
        if self.world.core.statistics.dropped_queue_full == dropped:
            self.expected.append(self.sent_count)
        self.sent_count += 1

    @precondition(lambda self: self.device)
    @rule()
    def acknowledge_the_first(self) -> None:
        self.collect()
        if self.held:
            self.world.send(self.device, Puback(self.held.pop(0)))
            self.expected.pop(0)

    def collect(self) -> None:
        """What is outstanding on this connection is the beginning of what is expected, in order."""
        for message in self.world.messages(self.device):
            assert int(message.payload) == self.expected[len(self.held)]
            self.held.append(message.packet_id)

    @invariant()
    def the_window_and_the_queue_are_full_before_anything_is_dropped(self) -> None:
        if not hasattr(self, "world"):
            return
        session = self.world.core._sessions["device"]
        assert len(session.inflight) + len(session.queue) == len(self.expected)
        assert len(session.inflight) <= 3
        assert len(session.queue) <= 6
        if self.device:
            self.collect()
            assert len(self.held) == min(3, len(self.expected))
        assert self.world.core.statistics.queued_messages_now == len(session.queue)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
