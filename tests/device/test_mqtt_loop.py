import random
from pathlib import Path

import pytest

from device.adapters.mqtt import BrokerAddress, MqttLoop, MqttTransport, Will
from tests.server.brokers import BROKERS, free_port, running_broker


class Client:
    """A transport that notes what happens to it."""

    def __init__(self, loop: MqttLoop, port: int, name: str, *, will: Will | None = None) -> None:
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


def test_a_paused_client_takes_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    with running_broker("embedded", tmp_path) as running:
        loop = MqttLoop()
        client = Client(loop, running.port, "slow")
        client.transport.start()
        assert loop.run_until(lambda: bool(client.connects), 20)
        client.transport.subscribe(("stream",), 0)
        loop.run_until(lambda: False, 0.2)
        client.transport.pause_reading()
        for _ in range(5):
            client.transport.publish("stream", b"x" * 1000, 1, retain=False)
        loop.run_until(lambda: False, 0.5)
        assert client.messages == []
        client.transport.resume_reading()
        assert loop.run_until(lambda: len(client.messages) == 5, 20)
        client.transport.close()
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
