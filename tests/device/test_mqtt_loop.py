import random
import socket
import threading
from pathlib import Path

import pytest

from device.adapters.mqtt import CONNECTORS_MAX, BrokerAddress, MqttLoop, MqttTransport, Will
from device.reconnect import ATTEMPTS_AFTER_PROGRESS
from tests.server.brokers import BROKERS, free_port, running_broker


class Client:
    """A transport that notes what happens to it."""

    def __init__(
        self,
        loop: MqttLoop,
        port: int,
        name: str,
        *,
        will: Will | None = None,
        makes_progress: bool = False,
    ) -> None:
        self.makes_progress = makes_progress
        self.connects = 0
        self.losses = 0
        self.messages: list[tuple[str, bytes]] = []
        self.transport = MqttTransport(
            loop,
            BrokerAddress("127.0.0.1", port),
            name,
            random.Random(name),
            will=will,
            on_connected=self.on_connected,
            on_disconnected=self.on_disconnected,
            on_message=lambda topic, payload: self.messages.append((topic, payload)),
        )

    def on_connected(self) -> None:
        self.connects += 1
        self.transport.subscribe((f"to/{self.transport._client_id}", "all"), 1)
        if self.makes_progress:
            self.transport.progressed()

    def on_disconnected(self) -> None:
        self.losses += 1


@pytest.mark.parametrize("broker", BROKERS)
def test_many_clients_on_one_loop_hear_each_other_and_come_back_after_a_loss(
    broker: str, tmp_path: Path
) -> None:
    with running_broker(broker, tmp_path) as running:
        loop = MqttLoop()
        clients = [Client(loop, running.port, f"client-{number}") for number in range(40)]
        for client in clients:
            client.transport.start()
        assert loop.run_until(lambda: all(client.connects for client in clients), 20)
        speaker = clients[0].transport
        for number in range(40):
            # Retained, since a connection says nothing yet about the subscription that follows it.
            speaker.publish(f"to/client-{number}", bytes(65_536), 1, retain=True)
        assert loop.run_until(lambda: all(client.messages for client in clients), 20)
        for client in clients[:10]:
            client.transport.drop()
        assert loop.run_until(lambda: all(client.connects == 2 for client in clients[:10]), 20)
        assert [client.losses for client in clients[:11]] == [1] * 10 + [0]
        for client in clients:
            client.transport.close()
        loop.close()


@pytest.mark.parametrize("broker", BROKERS)
def test_the_will_is_said_after_a_loss_and_not_after_a_goodbye(broker: str, tmp_path: Path) -> None:
    with running_broker(broker, tmp_path) as running:
        loop = MqttLoop()
        listener = Client(loop, running.port, "listener")
        lost = Client(loop, running.port, "lost", will=Will("all", b"lost"))
        polite = Client(loop, running.port, "polite", will=Will("all", b"polite"))
        for client in (listener, lost, polite):
            client.transport.start()
        assert loop.run_until(lambda: bool(listener.connects and lost.connects and polite.connects), 20)
        loop.run_until(lambda: False, 0.3)
        polite.transport.close()
        lost.transport.drop(stay_away=True)
        assert loop.run_until(lambda: ("all", b"lost") in listener.messages, 20)
        assert ("all", b"polite") not in listener.messages
        assert not lost.transport.is_connected
        listener.transport.close()
        lost.transport.close()
        loop.close()


def test_a_broker_that_is_not_there_is_named_and_tried_again() -> None:
    loop = MqttLoop()
    port = free_port()
    client = Client(loop, port, "lonely")
    client.transport.start()
    assert loop.run_until(lambda: bool(client.transport.error), 20)
    assert str(port) in client.transport.error
    client.transport.close()
    loop.close()


class Doorman:
    """A broker that lets everyone in and shows them out again at once, as one does whose access rules forbid them all."""

    def __init__(self) -> None:
        self.visits = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            visitor, _ = self._listener.accept()
            with visitor:
                if not visitor.recv(4096):
                    return
                visitor.sendall(b"\x20\x02\x00\x00")  # CONNACK: accepted
                self.visits += 1

    def close(self) -> None:
        socket.create_connection(("127.0.0.1", self.port)).close()  # a visitor who says nothing ends it
        self._thread.join()
        self._listener.close()


def test_a_broker_that_accepts_and_closes_at_once_is_visited_less_and_less() -> None:
    doorman = Doorman()
    loop = MqttLoop()
    client = Client(loop, doorman.port, "client")
    client.transport.start()
    assert loop.run_until(lambda: client.losses >= 4, 30)
    assert client.transport._backoff._attempts >= 4
    client.transport.close()
    doorman.close()
    loop.close()


def test_a_broker_that_closes_after_it_brought_something_is_visited_again_soon() -> None:
    doorman = Doorman()
    loop = MqttLoop()
    client = Client(loop, doorman.port, "guest", makes_progress=True)
    client.transport.start()
    assert loop.run_until(lambda: client.losses >= 5, 30)
    assert client.transport._backoff._attempts == ATTEMPTS_AFTER_PROGRESS + 1
    client.transport.close()
    doorman.close()
    loop.close()


def test_connections_are_opened_a_bounded_number_at_a_time() -> None:
    loop = MqttLoop()
    lock, release = threading.Lock(), threading.Event()
    busy: list[int] = [0]
    most: list[int] = [0]
    ended: list[int] = []

    def connect() -> None:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        release.wait(20)
        with lock:
            busy[0] -= 1
            ended.append(1)

    for _ in range(3 * CONNECTORS_MAX):
        loop.run_connector(connect)
    assert loop.run_until(lambda: busy[0] == CONNECTORS_MAX, 20)
    release.set()
    assert loop.run_until(lambda: len(ended) == 3 * CONNECTORS_MAX, 20)
    assert most[0] == CONNECTORS_MAX
    loop.run_until(lambda: not loop._connectors, 20)
    loop.close()
