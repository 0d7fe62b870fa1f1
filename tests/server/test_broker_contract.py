"""What every broker that Whimbrel is used with must do, tried with real paho clients and bare sockets.

The same tests run against the embedded broker and against mosquitto.
"""

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from server.broker.packets import (
    Connack,
    Connect,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Suback,
    Subscribe,
    Unsuback,
    Unsubscribe,
    Will,
    encode,
)
from tests.server.brokers import BROKERS, WAIT_S, Address, Wire, running_broker, wait_until

CHUNK = bytes(range(256)) * 256
_serial = itertools.count(1)


class Client:
    """A paho client on a thread of its own, with what it was told."""

    def __init__(
        self,
        address: Address,
        client_id: str = "",
        *,
        clean: bool = True,
        will: tuple[str, bytes, int, bool] | None = None,
        acks: bool = True,
        keep_alive_s: int = 60,
    ) -> None:
        self.messages: list[mqtt.MQTTMessage] = []
        self.session_present = False
        self.granted: dict[int, list[int]] = {}
        self.unsubscribed: set[int | None] = set()
        self.is_gone = threading.Event()
        self.is_connected = threading.Event()
        self.paho = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id or f"client-{next(_serial)}",
            clean_session=clean,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=not acks,
        )
        self.paho.max_inflight_messages_set(100)
        self.paho.on_connect = self._on_connect
        self.paho.on_disconnect = lambda *_: self.is_gone.set()
        self.paho.on_message = lambda _client, _data, message: self.messages.append(message)
        self.paho.on_subscribe = self._on_subscribe
        self.paho.on_unsubscribe = lambda _client, _data, mid, *_: self.unsubscribed.add(mid)
        if will is not None:
            self.paho.will_set(*will)
        self.paho.connect(address.host, address.port, keep_alive_s)
        self.paho.loop_start()
        assert self.is_connected.wait(WAIT_S), "CONNECT was not accepted"

    def _on_connect(self, _client: Any, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
        self.session_present = flags.session_present
        if not reason.is_failure:
            self.is_connected.set()

    def _on_subscribe(self, _client: Any, _data: Any, mid: int, reasons: Any, _properties: Any) -> None:
        self.granted[mid] = [reason.value for reason in reasons]

    def subscribe(self, *filters: tuple[str, int]) -> list[int]:
        _, mid = self.paho.subscribe(list(filters))
        assert mid is not None
        assert wait_until(lambda: mid in self.granted), "SUBSCRIBE was not answered"
        return self.granted[mid]

    def unsubscribe(self, topic_filter: str) -> None:
        _, mid = self.paho.unsubscribe(topic_filter)
        assert wait_until(lambda: mid in self.unsubscribed), "UNSUBSCRIBE was not answered"

    def publish(self, topic: str, payload: bytes = b"", qos: int = 1, *, retain: bool = False) -> None:
        self.paho.publish(topic, payload, qos, retain).wait_for_publish(WAIT_S)

    def has(self, count: int, wait_s: float = WAIT_S) -> bool:
        return wait_until(lambda: len(self.messages) >= count, wait_s)

    def topics(self) -> list[str]:
        return [message.topic for message in self.messages]

    def cut(self) -> None:
        """Vanish without DISCONNECT."""
        connection = self.paho.socket()
        assert isinstance(connection, socket.socket)
        connection.shutdown(socket.SHUT_RDWR)
        assert self.is_gone.wait(WAIT_S)
        self.paho.loop_stop()

    def close(self) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()


Connector = Callable[..., Client]


@pytest.fixture(scope="module", params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    with running_broker(request.param, tmp_path_factory.mktemp("broker")) as address:
        yield address


@pytest.fixture
def connect(broker: Address) -> Iterator[Connector]:
    clients: list[Client] = []

    def _connect(*arguments: Any, **options: Any) -> Client:
        clients.append(Client(broker, *arguments, **options))
        return clients[-1]

    yield _connect
    for client in clients:
        client.close()


@pytest.fixture
def root() -> str:
    """A first topic level that no other test uses."""
    return f"t{next(_serial)}"


def settle(publisher: Client, subscriber: Client, root: str) -> None:
    """Return once everything published before has had its chance: one more message went the same way."""
    topic = f"{root}-settled"
    subscriber.subscribe((topic, 0))
    before = len(subscriber.messages)
    publisher.publish(topic, b"settled", 1)
    assert wait_until(lambda: topic in subscriber.topics()[before:])
    subscriber.messages[:] = [message for message in subscriber.messages if message.topic != topic]


# --- Delivery and QoS ---------------------------------------------------------------------------------------


def test_every_qos_is_granted_and_delivered_at_the_lower_of_both(connect: Connector, root: str) -> None:
    publisher, subscriber = connect(), connect()
    granted = subscriber.subscribe((f"{root}/0/+", 0), (f"{root}/1/+", 1), (f"{root}/2/+", 2))
    assert granted == [0, 1, 2]
    for wanted, published in itertools.product(range(3), range(3)):
        publisher.publish(f"{root}/{wanted}/{published}", b"x", published)
    assert subscriber.has(9)
    got = {message.topic.removeprefix(f"{root}/"): message.qos for message in subscriber.messages}
    assert got == {f"{w}/{p}": min(w, p) for w, p in itertools.product(range(3), range(3))}


def test_overlapping_filters_deliver_once_with_the_highest_qos(broker: Address, root: str) -> None:
    with Wire(broker) as subscriber, Wire(broker) as publisher:
        subscriber.connect(Connect("overlap"))
        publisher.connect(Connect("overlap-publisher"))
        subscriber.send(Subscribe(1, ((f"{root}/#", 0), (f"{root}/a", 1), (f"{root}/+", 0))))
        assert subscriber.expect(Suback).codes == (0, 1, 0)
        publisher.send(Publish(f"{root}/a", b"x", 1, packet_id=1), Publish(f"{root}/b/c", b"end", 0))
        first, second = subscriber.expect(Publish), subscriber.expect(Publish)
    assert (first.topic, first.qos, second.topic) == (f"{root}/a", 1, f"{root}/b/c")


def test_messages_of_one_publisher_arrive_in_order(connect: Connector, root: str) -> None:
    publisher, subscriber = connect(), connect()
    subscriber.subscribe((f"{root}/#", 1))
    for number in range(300):
        publisher.paho.publish(f"{root}/x", b"%d" % number, 1)
    assert subscriber.has(300)
    assert [int(message.payload) for message in subscriber.messages] == list(range(300))


def test_a_qos_2_message_is_passed_on_once_although_it_is_sent_twice(
    broker: Address, connect: Connector, root: str
) -> None:
    subscriber = connect()
    subscriber.subscribe((f"{root}/#", 2))
    with Wire(broker) as publisher:
        publisher.connect(Connect("exactly-once"))
        publisher.send(Publish(f"{root}/a", b"x", 2, packet_id=7))
        assert publisher.expect(Pubrec) == Pubrec(7)
        publisher.send(Publish(f"{root}/a", b"x", 2, dup=True, packet_id=7))
        assert publisher.expect(Pubrec) == Pubrec(7)
        publisher.send(Pubrel(7))
        assert publisher.expect(Pubcomp) == Pubcomp(7)
        publisher.send(Publish(f"{root}/end", b"", 2, packet_id=7))
        publisher.expect(Pubrec)
        publisher.send(Pubrel(7))
        publisher.expect(Pubcomp)
    assert wait_until(lambda: f"{root}/end" in subscriber.topics())
    assert subscriber.topics() == [f"{root}/a", f"{root}/end"]


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_payload_of_one_megabyte_arrives_unchanged(connect: Connector, root: str, qos: int) -> None:
    publisher, subscriber = connect(), connect()
    subscriber.subscribe((f"{root}/big", qos))
    payload = CHUNK * 16
    publisher.publish(f"{root}/big", payload, qos)
    assert subscriber.has(1)
    assert subscriber.messages[0].payload == payload


def test_an_empty_payload_that_is_not_retained_is_an_ordinary_message(connect: Connector, root: str) -> None:
    publisher, subscriber = connect(), connect()
    subscriber.subscribe((f"{root}/a", 1))
    publisher.publish(f"{root}/a", b"", 1)
    assert subscriber.has(1)
    assert subscriber.messages[0].payload == b""


def test_a_hundred_clients_get_every_message_of_a_fan_out(connect: Connector, root: str) -> None:
    publisher, clients = connect(), [connect() for _ in range(100)]
    for client in clients:
        client.subscribe((f"{root}/+", 0))
    for number in range(10):
        publisher.publish(f"{root}/{number}", CHUNK[:1_000])
    assert wait_until(lambda: all(len(client.messages) == 10 for client in clients))


# --- Filters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topic_filter", "topic", "matches"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/", False),
        ("a/b", "A/b", False),
        ("a/+", "a/b", True),
        ("a/+", "a/", True),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("+", "/", False),
        ("+/+", "/", True),
        ("/+", "/x", True),
        ("+", "/x", False),
        ("a/#", "a", True),
        ("a/#", "a/", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("a/+/#", "a", False),
        ("a/+/#", "a/b", True),
        ("a//+", "a//x", True),
        ("a/+/c", "a//c", True),
        ("ä/+", "ä/€", True),
    ],
)
def test_wildcards_match_as_the_standard_says(
    broker: Address, root: str, topic_filter: str, topic: str, matches: bool
) -> None:
    with Wire(broker) as wire:
        wire.connect(Connect(f"wild-{root}"))
        # The root level keeps tests apart: the table is about what is below it.
        wire.send(Subscribe(1, ((f"{root}/{topic_filter}", 0), (f"{root}-end", 0))))
        wire.expect(Suback)
        wire.send(Publish(f"{root}/{topic}", b"1"), Publish(f"{root}-end", b""))
        got = [wire.expect(Publish).topic]
        if got[0] != f"{root}-end":
            got.append(wire.expect(Publish).topic)
    assert got == [f"{root}/{topic}"] * matches + [f"{root}-end"]


@pytest.mark.parametrize("topic_filter", ["#", "+/x", "+/#"])
def test_a_wildcard_in_the_first_level_does_not_reach_dollar_topics(
    broker: Address, root: str, topic_filter: str
) -> None:
    with Wire(broker) as wire:
        wire.connect(Connect(f"dollar-{root}"))
        wire.send(Publish(f"${root}/x", b"kept", retain=True))
        wire.send(Subscribe(1, ((topic_filter, 0),)))
        wire.expect(Suback)
        wire.send(Publish(f"${root}/x", b"live"), Publish(f"{root}/x", b"", 0))
        topics = []
        while f"{root}/x" not in topics:
            topics.append(wire.expect(Publish).topic)
        wire.send(Publish(f"${root}/x", b"", retain=True))
    assert f"${root}/x" not in topics


def test_dollar_topics_are_reached_by_name(connect: Connector, root: str) -> None:
    publisher, subscriber = connect(), connect()
    subscriber.subscribe((f"${root}/#", 1))
    publisher.publish(f"${root}/x", b"1")
    assert subscriber.has(1)


def test_nothing_comes_after_unsubscribing(connect: Connector, root: str) -> None:
    publisher, subscriber = connect(), connect()
    subscriber.subscribe((f"{root}/a", 1), (f"{root}/b", 1))
    subscriber.unsubscribe(f"{root}/a")
    publisher.publish(f"{root}/a", b"x")
    publisher.publish(f"{root}/b", b"x")
    settle(publisher, subscriber, root)
    assert subscriber.topics() == [f"{root}/b"]


def test_unsubscribing_what_was_never_subscribed_is_answered(broker: Address, root: str) -> None:
    with Wire(broker) as wire:
        wire.connect(Connect(f"unsubscriber-{root}"))
        wire.send(Unsubscribe(9, (f"{root}/never", f"{root}/+")))
        assert wire.expect(Unsuback) == Unsuback(9)


def test_a_repeated_subscription_changes_the_qos(connect: Connector, root: str) -> None:
    publisher, subscriber = connect(), connect()
    subscriber.subscribe((f"{root}/a", 0))
    subscriber.subscribe((f"{root}/a", 1))
    publisher.publish(f"{root}/a", b"x", 1)
    settle(publisher, subscriber, root)
    assert [message.qos for message in subscriber.messages] == [1]


# --- Retained messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic_filter", ["a/1", "a/+", "a/#", "+/1", "#"])
def test_a_new_subscription_gets_what_is_retained(connect: Connector, root: str, topic_filter: str) -> None:
    publisher, subscriber = connect(), connect()
    publisher.publish(f"{root}/a/1", b"old", retain=True)
    publisher.publish(f"{root}/a/1", b"kept", retain=True)
    subscriber.subscribe((f"{root}/{topic_filter}", 1))
    settle(publisher, subscriber, root)
    assert [(m.topic, m.payload, m.retain) for m in subscriber.messages] == [(f"{root}/a/1", b"kept", True)]


def test_the_retain_flag_is_not_set_for_who_subscribed_before(connect: Connector, root: str) -> None:
    publisher, subscriber = connect(), connect()
    subscriber.subscribe((f"{root}/#", 1))
    publisher.publish(f"{root}/a", b"x", retain=True)
    assert subscriber.has(1)
    assert not subscriber.messages[0].retain


def test_an_empty_retained_payload_clears_and_is_passed_on(connect: Connector, root: str) -> None:
    publisher, early, late = connect(), connect(), connect()
    early.subscribe((f"{root}/#", 1))
    publisher.publish(f"{root}/a", b"x", retain=True)
    publisher.publish(f"{root}/a", b"", retain=True)
    assert early.has(2)
    late.subscribe((f"{root}/#", 1))
    settle(publisher, late, root)
    assert ([m.payload for m in early.messages], late.messages) == ([b"x", b""], [])


def test_subscribing_again_brings_the_retained_message_again(connect: Connector, root: str) -> None:
    publisher, subscriber = connect(), connect()
    publisher.publish(f"{root}/a", b"x", retain=True)
    for _ in range(3):
        subscriber.subscribe((f"{root}/a", 1))
    assert subscriber.has(3)
    assert all(message.retain for message in subscriber.messages)


@pytest.mark.parametrize(("published", "wanted"), list(itertools.product(range(3), range(3))))
def test_a_retained_message_has_the_lower_qos(
    connect: Connector, root: str, published: int, wanted: int
) -> None:
    publisher, subscriber = connect(), connect()
    publisher.publish(f"{root}/a", b"x", published, retain=True)
    settle(publisher, subscriber, root)
    subscriber.subscribe((f"{root}/a", wanted))
    assert subscriber.has(1)
    assert subscriber.messages[0].qos == min(published, wanted)


def test_fifteen_hundred_retained_messages_come_through_one_filter_at_qos_0(
    connect: Connector, root: str
) -> None:
    publisher, subscriber = connect(), connect()
    for number in range(1_500):
        last = publisher.paho.publish(f"{root}/{number}", b"x" * 100, 1, retain=True)
    last.wait_for_publish(WAIT_S)
    assert wait_until(lambda: not publisher.paho.want_write())
    settle(publisher, subscriber, root)
    subscriber.subscribe((f"{root}/#", 0))
    assert subscriber.has(1_500)
    assert set(subscriber.topics()) == {f"{root}/{number}" for number in range(1_500)}


def test_groups_of_chunks_come_whole_through_a_window_of_two(connect: Connector, root: str) -> None:
    publisher = connect()
    group_count = 6
    for number in range(8 * group_count):
        publisher.publish(f"{root}/b/d.{number // 8}/{number}", b"%08d" % number + CHUNK[8:], retain=True)
    devices = [connect() for _ in range(5)]
    for device in devices:
        device.subscribe((f"{root}/b/d.0/+", 0), (f"{root}/b/d.1/+", 0))
    for group in range(group_count):
        for device in devices:
            assert device.has(8 * (group + 1)), "a chunk of the window was lost"
            device.unsubscribe(f"{root}/b/d.{group}/+")
            if group + 2 < group_count:
                device.subscribe((f"{root}/b/d.{group + 2}/+", 0))
    for device in devices:
        assert sorted(int(m.payload[:8]) for m in device.messages) == list(range(8 * group_count))
        assert all(m.payload[8:] == CHUNK[8:] and m.qos == 0 and m.retain for m in device.messages)


def test_a_reader_that_pauses_still_gets_both_groups(broker: Address, connect: Connector, root: str) -> None:
    publisher = connect()
    for number in range(16):
        publisher.publish(f"{root}/d.{number // 8}/{number}", CHUNK, retain=True)
    with Wire(broker, receive_buffer_bytes=8_192) as slow:
        slow.connect(Connect(f"slow-{root}"))
        slow.send(
            Subscribe(1, ((f"{root}/d.0/+", 0), (f"{root}/d.1/+", 0))), Unsubscribe(2, (f"{root}/d.0/+",))
        )
        # Others are served while this one reads nothing.
        subscriber = connect()
        subscriber.subscribe((f"{root}/#", 0))
        assert subscriber.has(16)
        got = [slow.expect(Publish) for _ in range(16)]
    assert len({message.topic for message in got}) == 16
    assert all(message.payload == CHUNK for message in got)


# --- Sessions -----------------------------------------------------------------------------------------------


def test_a_persistent_session_keeps_subscriptions_and_messages(connect: Connector, root: str) -> None:
    publisher = connect()
    device = connect(f"device-{root}", clean=False)
    assert not device.session_present
    device.subscribe((f"{root}/#", 1))
    device.close()
    for number in range(50):
        publisher.publish(f"{root}/{number}", b"x")
    publisher.publish(f"{root}/not-queued", b"x", 0)
    device = connect(f"device-{root}", clean=False)
    assert device.session_present
    settle(publisher, device, root)
    queued = [topic for topic in device.topics() if not topic.endswith("not-queued")]
    assert queued == [f"{root}/{number}" for number in range(50)]


def test_the_queue_of_an_absent_client_ends_at_a_thousand_and_keeps_the_oldest(
    connect: Connector, root: str
) -> None:
    publisher = connect()
    device = connect(f"device-{root}", clean=False)
    device.subscribe((f"{root}/#", 1))
    device.close()
    for number in range(1_500):
        last = publisher.paho.publish(f"{root}/{number}", b"x" * 100, 1)
    last.wait_for_publish(WAIT_S)
    settle(publisher, connect(), root)
    device = connect(f"device-{root}", clean=False)
    assert device.has(1_000)
    settle(publisher, device, root)
    assert device.topics() == [f"{root}/{number}" for number in range(1_000)]


def test_a_clean_session_forgets_everything(connect: Connector, root: str) -> None:
    publisher = connect()
    device = connect(f"device-{root}", clean=False)
    device.subscribe((f"{root}/#", 1))
    device.close()
    connect(f"device-{root}", clean=True).close()
    publisher.publish(f"{root}/a", b"x")
    device = connect(f"device-{root}", clean=False)
    assert not device.session_present
    settle(publisher, device, root)
    assert device.messages == []


def test_a_resumed_session_gets_no_retained_message_by_itself(connect: Connector, root: str) -> None:
    publisher = connect()
    publisher.publish(f"{root}/a", b"x", retain=True)
    device = connect(f"device-{root}", clean=False)
    device.subscribe((f"{root}/#", 1))
    assert device.has(1)
    device.close()
    device = connect(f"device-{root}", clean=False)
    settle(publisher, device, root)
    assert device.messages == []


def test_what_was_not_acknowledged_comes_again_marked_as_duplicate(connect: Connector, root: str) -> None:
    publisher = connect()
    device = connect(f"device-{root}", clean=False, acks=False)
    device.subscribe((f"{root}/#", 1))
    for number in range(5):
        publisher.publish(f"{root}/{number}", b"x")
    assert device.has(5)
    assert not any(message.dup for message in device.messages)
    device.cut()
    device = connect(f"device-{root}", clean=False)
    assert device.has(5)
    assert [(m.topic, m.dup) for m in device.messages] == [(f"{root}/{number}", True) for number in range(5)]


def test_an_interrupted_qos_2_delivery_goes_on_where_it_stopped(
    broker: Address, connect: Connector, root: str
) -> None:
    publisher = connect()
    subscribe = Subscribe(1, ((f"{root}/#", 2),))
    with Wire(broker) as device:
        device.connect(Connect(f"device-{root}", clean_session=False))
        device.send(subscribe)
        device.expect(Suback)
        publisher.publish(f"{root}/a", b"x", 2)
        packet_id = device.expect(Publish).packet_id
        device.send(Pubrec(packet_id))
        assert device.expect(Pubrel) == Pubrel(packet_id)
    with Wire(broker) as device:
        assert device.connect(Connect(f"device-{root}", clean_session=False)).session_present
        assert device.expect(Pubrel) == Pubrel(packet_id)
        device.send(Pubcomp(packet_id), Pingreq())
        device.expect(Pingresp)
        assert device.packets == []


def test_no_more_than_the_window_is_sent_before_an_acknowledgement(
    broker: Address, connect: Connector, root: str
) -> None:
    publisher = connect()
    with Wire(broker) as device:
        device.connect(Connect(f"device-{root}"))
        device.send(Subscribe(1, ((f"{root}/#", 1),)))
        device.expect(Suback)
        for number in range(30):
            publisher.publish(f"{root}/{number}", b"x")
        device.send(Pingreq())
        device.expect(Pingresp)
        first = [packet for packet in device.packets if isinstance(packet, Publish)]
        assert len(first) == 20
        device.packets.clear()
        for message in first:
            device.send(Puback(message.packet_id))
        rest = [device.expect(Publish) for _ in range(10)]
    assert [message.topic for message in first + rest] == [f"{root}/{number}" for number in range(30)]


def test_the_newer_connection_takes_over_a_client_id(connect: Connector, root: str) -> None:
    publisher = connect()
    older = connect(f"device-{root}", clean=False)
    older.subscribe((f"{root}/#", 1))
    newer = connect(f"device-{root}", clean=False)
    assert older.is_gone.wait(WAIT_S)
    assert newer.session_present
    publisher.publish(f"{root}/a", b"x")
    assert newer.has(1)
    assert older.messages == []


def test_an_empty_client_id_is_accepted_for_a_clean_session_only(broker: Address) -> None:
    with Wire(broker) as first, Wire(broker) as second, Wire(broker) as third:
        assert first.connect(Connect("")) == Connack(session_present=False, code=0)
        assert second.connect(Connect("")) == Connack(session_present=False, code=0)
        first.send(Pingreq())
        first.expect(Pingresp)
        assert third.connect(Connect("", clean_session=False)) == Connack(session_present=False, code=2)
        assert third.is_closed_by_broker()


# --- Wills and keep-alive -----------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [False, True])
def test_a_will_is_published_when_a_client_vanishes(connect: Connector, root: str, retain: bool) -> None:
    observer = connect()
    observer.subscribe((f"{root}/#", 1))
    device = connect(will=(f"{root}/gone", b"dead", 1, retain))
    device.cut()
    assert observer.has(1)
    late = connect()
    late.subscribe((f"{root}/#", 1))
    settle(observer, late, root)
    assert [m.payload for m in late.messages] == [b"dead"] * retain


def test_a_will_is_not_published_after_disconnect(connect: Connector, root: str) -> None:
    observer = connect()
    observer.subscribe((f"{root}/#", 1))
    connect(will=(f"{root}/gone", b"dead", 1, False)).close()
    settle(observer, observer, root)
    assert observer.messages == []


def test_a_will_is_published_when_a_client_is_taken_over(connect: Connector, root: str) -> None:
    observer = connect()
    observer.subscribe((f"{root}/#", 1))
    connect(f"device-{root}", will=(f"{root}/gone", b"dead", 1, False))
    connect(f"device-{root}")
    assert observer.has(1)


def test_a_will_is_published_when_a_client_breaks_the_protocol(
    broker: Address, connect: Connector, root: str
) -> None:
    observer = connect()
    observer.subscribe((f"{root}/#", 1))
    with Wire(broker) as wire:
        wire.connect(Connect(f"device-{root}", will=Will(f"{root}/gone", b"dead", 1)))
        wire.socket.sendall(b"\xf0\x00")
        assert wire.is_closed_by_broker()
    assert observer.has(1)


def test_a_silent_client_is_closed_after_one_and_a_half_keep_alive_periods(
    broker: Address, connect: Connector, root: str
) -> None:
    observer = connect()
    observer.subscribe((f"{root}/#", 1))
    with Wire(broker) as silent, Wire(broker) as lively:
        silent.connect(Connect(f"silent-{root}", keep_alive_s=1, will=Will(f"{root}/silent", b"dead", 1)))
        lively.connect(Connect(f"lively-{root}", keep_alive_s=0, will=Will(f"{root}/lively", b"dead", 1)))
        assert observer.has(1)
        assert silent.is_closed_by_broker()
        lively.send(Pingreq())
        lively.expect(Pingresp)
        lively.send(Disconnect())
        assert lively.is_closed_by_broker()
    assert observer.topics() == [f"{root}/silent"]


# --- Bad input ----------------------------------------------------------------------------------------------

CONNECTED = encode(Connect("bad-input"))

MALFORMED = {
    "not MQTT": b"GET / HTTP/1.1\r\n\r\n",
    "type 0": b"\x00\x00",
    "CONNECT with a reserved flag": b"\x10\x0d\x00\x04MQTT\x04\x03\x00\x00\x00\x01a",
    "PUBLISH before CONNECT": encode(Publish("a", b"")),
    "SUBSCRIBE before CONNECT": encode(Subscribe(1, (("a", 0),))),
    "second CONNECT": CONNECTED + CONNECTED,
    "type 15": CONNECTED + b"\xf0\x00",
    "five length bytes": CONNECTED + b"\x30\xff\xff\xff\xff\x01",
    "PUBLISH with QoS 3": CONNECTED + b"\x36\x05\x00\x01a\x00\x01",
    "PUBLISH to a wildcard": CONNECTED + encode(Publish("a/#", b"")),
    "PUBLISH to an empty topic": CONNECTED + encode(Publish("", b"")),
    "PUBLISH that ends in its topic": CONNECTED + b"\x30\x03\x00\x05a",
    "PUBLISH with a topic that is not UTF-8": CONNECTED + b"\x30\x04\x00\x02\xff\xfe",
    "SUBSCRIBE with wrong flags": CONNECTED + b"\x80\x06\x00\x01\x00\x01a\x00",
    "SUBSCRIBE without filters": CONNECTED + b"\x82\x02\x00\x01",
    "SUBSCRIBE with QoS 3": CONNECTED + b"\x82\x06\x00\x01\x00\x01a\x03",
    "SUBSCRIBE with a bad filter": CONNECTED + encode(Subscribe(1, (("a/#/b", 0),))),
    "UNSUBSCRIBE without filters": CONNECTED + b"\xa2\x02\x00\x01",
    "PUBREL with wrong flags": CONNECTED + b"\x60\x02\x00\x01",
    "CONNACK from a client": CONNECTED + b"\x20\x02\x00\x00",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_bytes_that_break_the_protocol_close_the_connection_and_no_other(
    broker: Address, data: bytes
) -> None:
    with Wire(broker) as witness, Wire(broker) as wire:
        witness.connect(Connect("witness"))
        wire.socket.sendall(data)
        assert wire.is_closed_by_broker()
        witness.send(Pingreq())
        assert witness.expect(Pingresp) == Pingresp()


def test_another_version_of_the_protocol_is_refused_by_number(broker: Address) -> None:
    with Wire(broker) as wire:
        assert wire.connect(Connect("future", protocol_level=9)).code == 1
        assert wire.is_closed_by_broker()


def test_packets_cut_at_every_byte_are_understood(broker: Address, root: str) -> None:
    with Wire(broker) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        packets: list[Packet] = [
            Connect(f"slow-{root}"),
            Subscribe(1, ((f"{root}/a", 1),)),
            Publish(f"{root}/a", b"x" * 20),
        ]
        for byte in b"".join(map(encode, packets)):
            wire.socket.sendall(bytes((byte,)))
        assert wire.expect(Connack).code == 0
        assert wire.expect(Publish).payload == b"x" * 20
