"""The loopback edge of the embedded broker: where it listens, how it starts and stops, how it holds slow readers."""

import asyncio
import contextlib
import json
import signal
import socket
import struct
import subprocess
import sys
import threading

import psutil
import pytest

from protocol.errors import PortInUseError, RequestError
from server.broker.__main__ import main
from server.broker.limits import BrokerLimits
from server.broker.packets import (
    Connect,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Publish,
    Suback,
    Subscribe,
    encode,
)
from server.broker.tcp import COALESCE_BYTES, EmbeddedBroker
from tests.server.brokers import Address, Wire, embedded_broker_process, is_listening, wait_until


def address_of(broker: EmbeddedBroker) -> Address:
    return Address("embedded", broker.host, broker.port, 0)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.4", "8.8.8.8", "fleet.example", "", "127.0.0.1.x"]
)
def test_only_loopback_addresses_are_served(host: str) -> None:
    with pytest.raises(RequestError) as caught:
        EmbeddedBroker(host)
    assert "neither authentication nor TLS" in caught.value.message
    assert "mosquitto or EMQX" in caught.value.hint


def test_localhost_and_other_loopback_addresses_are_served() -> None:
    for host in ("localhost", "127.0.0.2"):
        with EmbeddedBroker(host) as broker, Wire(address_of(broker)) as wire:
            assert wire.connect(Connect("a")).code == 0


@pytest.mark.parametrize("port", [-1, 65_536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(RequestError, match="no TCP port"):
        EmbeddedBroker(port=port)


def test_a_port_in_use_is_an_error_that_says_what_to_do() -> None:
    with EmbeddedBroker() as broker:
        second = EmbeddedBroker(port=broker.port)
        with pytest.raises(PortInUseError) as caught:
            second.start_in_thread()
        assert str(broker.port) in caught.value.message
        assert caught.value.hint
        second.close()


def test_closing_leaves_no_thread_and_no_socket_and_it_starts_again_on_the_same_port() -> None:
    threads, process = threading.active_count(), psutil.Process()
    sockets = len(process.net_connections())
    broker, ports = EmbeddedBroker(), set()
    for _ in range(3):
        with broker:
            ports.add(broker.port)
            wires = [Wire(address_of(broker)) for _ in range(10)]
            for number, wire in enumerate(wires):
                wire.connect(Connect(f"client-{number}"))
        for wire in wires:
            assert wire.is_closed_by_broker()
            wire.socket.close()
        assert not is_listening(broker.port)
        assert broker.statistics().connections_total == 10
    broker.close()
    assert len(ports) == 1
    assert threading.active_count() == threads
    assert len(process.net_connections()) == sockets


def test_connections_that_are_just_being_accepted_do_not_outlive_the_broker() -> None:
    for _ in range(20):
        with EmbeddedBroker() as broker, contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(contextlib.closing(socket.create_connection((broker.host, broker.port))))
            broker.close()


def test_it_runs_in_a_loop_that_is_there_already() -> None:
    async def scenario() -> int:
        broker = EmbeddedBroker()
        port = await broker.start()
        reader, writer = await asyncio.open_connection(broker.host, port)
        writer.write(encode(Connect("a")) + encode(Pingreq()))
        answer = await reader.readexactly(6)
        broker.forget_retained()
        writer.close()
        await broker.stop()
        return len(answer)

    assert asyncio.run(scenario()) == 6


def test_a_reader_that_is_gone_when_its_messages_leave_is_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> int:
        broker = EmbeddedBroker()
        port = await broker.start()
        reader, writer = await asyncio.open_connection(broker.host, port)
        retained = [Publish(f"t/{number}", bytes(COALESCE_BYTES), retain=True) for number in range(20)]
        packets: list[Packet] = [Connect("a"), *retained, Pingreq()]
        writer.write(b"".join(map(encode, packets)))
        await reader.readexactly(6)
        with socket.create_connection((broker.host, port)) as gone:
            # Blocking, so that the broker, in the same loop, reads the request when its sender is gone already.
            gone.sendall(encode(Connect("b")) + encode(Subscribe(1, (("t/#", 0),))))
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        counts = broker.statistics()
        for _ in range(1_000):
            if (counts.connections_now, counts.connections_total) == (1, 2):
                break
            await asyncio.sleep(0.01)
        writer.close()
        await broker.stop()
        return counts.messages_out

    assert asyncio.run(scenario()) == 20
    assert caplog.messages == []


def test_calls_on_a_broker_that_does_not_run_are_refused() -> None:
    with pytest.raises(RequestError, match="not running"):
        EmbeddedBroker().forget_retained()


def test_a_forgotten_cache_and_a_restart_do_what_they_say() -> None:
    with EmbeddedBroker() as broker, Wire(address_of(broker)) as first:
        first.connect(Connect("a", clean_session=False))
        first.send(Publish("t", b"x", 1, retain=True, packet_id=1))
        first.expect(Puback)
        broker.forget_retained()
        assert broker.statistics().retained_messages == 0
        first.send(Subscribe(1, (("t", 0),)), Pingreq())
        first.expect(Pingresp)
        assert [type(packet) for packet in first.packets] == [Suback]
        broker.restart()
        assert first.is_closed_by_broker()
        with Wire(address_of(broker)) as second:
            assert not second.connect(Connect("a", clean_session=False)).session_present


def test_a_reader_that_stands_still_costs_bounded_memory_and_gets_the_rest_later() -> None:
    limits = BrokerLimits(unsent_bytes_max=2 << 20)
    chunk = bytes(65_536)
    with (
        EmbeddedBroker(limits=limits) as broker,
        Wire(address_of(broker)) as publisher,
        Wire(address_of(broker), receive_buffer_bytes=8_192) as slow,
    ):
        slow.connect(Connect("slow"))
        slow.send(Subscribe(1, (("#", 0),)))
        slow.expect(Suback)
        publisher.connect(Connect("publisher"))
        sent_count = 200
        for _ in range(sent_count):
            publisher.send(Publish("t", chunk, 1, packet_id=1))
            publisher.expect(Puback)
        counts = broker.statistics()
        assert counts.unsent_bytes_peak <= limits.unsent_bytes_max
        assert counts.dropped_slow_consumer > 0
        slow.send(Pingreq())
        slow.expect(Pingresp)
        got = sum(isinstance(packet, Publish) for packet in slow.packets)
        assert got + counts.dropped_slow_consumer == sent_count


def test_a_client_that_never_reads_its_answers_is_closed() -> None:
    limits = BrokerLimits(unsent_bytes_max=1_000, unsent_control_bytes=1_000, packet_bytes_max=70_000)
    # The echo fills the buffers of the system, which would take a million answers.
    flood = encode(Publish("echo", bytes(65_536))) + encode(Pingreq()) * 2_000
    with (
        EmbeddedBroker(limits=limits) as broker,
        Wire(address_of(broker), receive_buffer_bytes=4_096) as wire,
    ):
        wire.connect(Connect("a"))
        wire.send(Subscribe(1, (("echo", 0),)))
        wire.expect(Suback)
        with contextlib.suppress(ConnectionError):
            while broker.statistics().connections_now:
                wire.socket.sendall(flood)
        assert wait_until(lambda: broker.statistics().connections_now == 0)
        assert broker.statistics().protocol_errors == 1


def test_many_small_packets_arrive_in_order_however_they_are_joined() -> None:
    with EmbeddedBroker() as broker, Wire(address_of(broker)) as wire:
        wire.connect(Connect("a"))
        for start in range(0, 3_000, 500):
            packets: list[Packet] = [
                Publish(f"t/{number:04}", bytes(1 + number % 300), retain=True)
                for number in range(start, start + 500)
            ]
            wire.send(*packets)
        wire.send(Subscribe(1, (("t/#", 0),)))
        topics = [wire.expect(Publish).topic for _ in range(3_000)]
        assert topics == [f"t/{number:04}" for number in range(3_000)]


def test_keep_alive_is_watched_without_any_traffic() -> None:
    with EmbeddedBroker() as broker, Wire(address_of(broker)) as silent, Wire(address_of(broker)) as slower:
        slower.connect(Connect("slower", keep_alive_s=60))
        silent.connect(Connect("silent", keep_alive_s=1))
        assert silent.is_closed_by_broker()
        assert broker.statistics().keep_alive_expired == 1


def test_a_process_of_its_own_says_where_it_listens_and_counts_until_it_is_stopped() -> None:
    with embedded_broker_process() as address, Wire(address) as wire:
        wire.connect(Connect("a"))
        assert psutil.pid_exists(address.pid)
    assert not is_listening(address.port)


def test_a_process_prints_statistics_at_its_end() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "server.broker", "--port", "0", "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        told = json.loads(process.stdout.readline())
        with Wire(Address("embedded", told["host"], told["port"], told["pid"])) as wire:
            wire.connect(Connect("a"))
        process.send_signal(signal.SIGTERM)
        counts = json.loads(process.stdout.readline())
    assert process.returncode == 0
    assert counts["connections_total"] == 1


@pytest.mark.parametrize("options", [["--host", "0.0.0.0"], ["--port", "70000"], ["--retained-mb", "0"]])
def test_a_process_that_cannot_start_as_asked_says_why_in_one_line(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_a_port_in_use_ends_the_process_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["--port", str(other.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err
