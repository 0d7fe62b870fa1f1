"""The server over real brokers: what it retains, what it answers, and what it does when a broker forgets."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from protocol.chunks import child_plan, decode_chunk, root_plan
from protocol.errors import TransportError
from protocol.ids import DeviceId, Digest, Family, FleetId, digest_of
from protocol.messages import (
    ChunkRequest,
    Desired,
    Link,
    MetadataBundle,
    MetadataRequest,
    Report,
    UpdateReport,
    decode_desired,
    decode_message,
    encode_message,
    encode_window,
)
from protocol.release import ARTIFACTS_ROLE, delta_target, file_target, releases_role
from protocol.topics import Topics
from protocol.trust import Documents, Floors, Target, Verified, verify
from server import operations
from server.adapters.clock import SystemClock
from server.broker.tcp import EmbeddedBroker
from server.config import read_config
from server.home import opened
from server.runtime import Server
from tests.server.brokers import BROKERS, Address, running_broker, wait_until
from tests.server.samples import publish_models

TOPICS = Topics(FleetId("lab"))
DEVICE = DeviceId("pi-1")


class Radio:
    """A device's ears and mouth, without a device: keeps the last message of every topic, and all chunks."""

    def __init__(self, port: int, device: DeviceId = DEVICE) -> None:
        self.device = device
        self.last: dict[str, bytes] = {}
        self.chunks: list[bytes] = []
        self._subscribed: set[int] = set()
        self._lock = threading.Lock()
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=f"radio-{device}")
        self._client.on_message = lambda _c, _u, message: self._hear(message)
        self._client.on_subscribe = lambda _c, _u, mid, _r, _p: self._subscribed.add(mid)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self.listen(
            TOPICS.desired(device),
            TOPICS.chunk_answer(device),
            TOPICS.metadata_answer(device),
            TOPICS.metadata("+"),
        )

    def _hear(self, message: MQTTMessage) -> None:
        with self._lock:
            self.last[message.topic] = bytes(message.payload)
            if message.topic == TOPICS.chunk_answer(self.device) or "/b/" in message.topic:
                self.chunks.append(bytes(message.payload))

    def listen(self, *filters: str) -> None:
        """Subscribe, and wait until that is granted."""
        _, mid = self._client.subscribe([(name, 0) for name in filters])
        assert wait_until(lambda: mid in self._subscribed)

    def say(self, topic: str, message: msgspec.Struct | bytes, *, retain: bool = False) -> None:
        """Publish at QoS 1."""
        payload = message if isinstance(message, bytes) else encode_message(message)
        self._client.publish(topic, payload, 1, retain)

    def report(self, sequence: int, version: str, model: Path, update: UpdateReport | None = None) -> None:
        """Say what this device runs."""
        said = Report(
            device=self.device,
            sequence=sequence,
            state="idle",
            family="digits",
            version=version,
            files={model.name: digest_of(model.read_bytes())},
            update=update,
        )
        self.say(TOPICS.report(self.device), said, retain=True)

    def desired(self) -> Desired | None:
        """What it should run."""
        payload = self.last.get(TOPICS.desired(self.device))
        return decode_desired(payload).desired if payload else None

    def close(self) -> None:
        """Leave."""
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Address]:
    with running_broker(request.param, tmp_path) as address:
        yield address


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return publish_models(tmp_path, {"1": 1, "2": 2})


@pytest.fixture
def server(broker: Address, models: dict[str, Path], tmp_path: Path) -> Iterator[Server]:
    assert models
    with _serving(tmp_path / "server", broker.port) as server:
        server.wait_connected(10)
        yield server


@pytest.fixture
def radio(server: Server) -> Iterator[Radio]:
    radio = Radio(server.broker_port)
    yield radio
    radio.close()


ROLES = (releases_role(Family("digits")), ARTIFACTS_ROLE)


def _serving(home: Path, port: int) -> Server:
    return Server(msgspec.structs.replace(read_config(home), broker=f"127.0.0.1:{port}"), seed=1)


def _verified(home: Path, radio: Radio) -> Verified | None:
    """What a device believes of the metadata that it heard."""
    names = ("timestamp", "snapshot", "targets", *ROLES)
    heard = {name: data for name in names if (data := radio.last.get(TOPICS.metadata(name))) is not None}
    if len(heard) < len(names):
        return None
    timestamp, snapshot, targets, *delegated = (heard[name] for name in names)
    documents = Documents(
        timestamp=timestamp,
        snapshot=snapshot,
        targets=targets,
        delegated=tuple(zip(ROLES, delegated, strict=True)),
    )
    root = (home / "metadata" / "1.root.json").read_bytes()
    with opened(home) as there:
        return verify(root, documents, Floors(), there.clock.now_ms(), ROLES)


def _ask(radio: Radio, name: Digest, chunks: list[int]) -> list[bytes]:
    """Request chunks and wait for all of them; payloads in order."""
    radio.chunks.clear()
    wanted = encode_window(chunks, min(chunks))
    radio.say(TOPICS.request(radio.device), ChunkRequest(blob=name, first=min(chunks), wanted=wanted))
    assert wait_until(lambda: len(radio.chunks) >= len(chunks))
    answers = {chunk.index: chunk.payload for chunk in map(decode_chunk, radio.chunks) if chunk.blob == name}
    assert sorted(answers) == chunks
    return [answers[index] for index in chunks]


def test_a_device_verifies_the_metadata_and_fetches_a_file_chunk_by_chunk(
    server: Server, radio: Radio, models: dict[str, Path], tmp_path: Path
) -> None:
    home = tmp_path / "server"
    assert wait_until(lambda: _verified(home, radio))
    verified = _verified(home, radio)
    assert verified is not None
    data = models["2"].read_bytes()
    target = verified.targets[file_target(digest_of(data))]
    tree = target.custom.chunks
    plan = root_plan(target.digest, target.length, tree)
    for level in range(tree.levels, -1, -1):
        payloads = _ask(radio, plan.name, list(range(plan.count)))
        assert all(plan.accepts(index, payload) for index, payload in enumerate(payloads))
        if level:
            plan = child_plan(target.digest, target.length, tree, level, b"".join(payloads))
    assert b"".join(payloads) == data
    assert server.counters()["chunks_answered"] == plan.count + 1


def test_a_device_that_hears_no_retained_messages_can_ask_for_metadata(
    server: Server, radio: Radio, tmp_path: Path
) -> None:
    assert server.status()["is_connected"]
    topic = TOPICS.metadata_answer(DEVICE)
    radio.say(TOPICS.request(DEVICE), MetadataRequest(root_version=1, roles=ROLES))
    assert wait_until(lambda: topic in radio.last)
    bundle = decode_message(MetadataBundle, radio.last[topic])
    assert bundle.roots == []
    root = (tmp_path / "server/metadata/1.root.json").read_bytes()
    documents = Documents(
        timestamp=bundle.timestamp,
        snapshot=bundle.snapshot,
        targets=bundle.targets,
        delegated=tuple(bundle.delegated.items()),
    )
    with opened(tmp_path / "server") as there:
        assert len(verify(root, documents, Floors(), there.clock.now_ms(), ROLES).targets) == 4


def test_a_rollout_builds_a_signed_delta_retains_it_and_ends_with_a_commit(
    server: Server, radio: Radio, models: dict[str, Path], tmp_path: Path
) -> None:
    home = tmp_path / "server"
    radio.report(1, "1", models["1"])
    assert wait_until(lambda: server.status()["devices"] == 1)
    rollout = operations.start_rollout(home, "digits", "2")
    assert wait_until(radio.desired, 60)
    desired = radio.desired()
    assert desired is not None
    assert (desired.rollout, desired.version) == (rollout.id, "2")
    verified = _verified(home, radio)
    assert verified is not None
    old, new = (digest_of(models[version].read_bytes()) for version in ("1", "2"))
    delta = verified.targets[delta_target(old, new)]
    assert delta.length < len(models["2"].read_bytes()) / 10
    # The chunks were retained before the request went out: a device that subscribes now gets them from the broker.
    radio.chunks.clear()
    radio.listen(TOPICS.chunk_group(delta.digest, 0))
    assert wait_until(lambda: radio.chunks)
    assert digest_of(decode_chunk(radio.chunks[0]).payload) == delta.digest
    assert server.counters()["chunks_answered"] == 0
    update = UpdateReport(rollout=rollout.id, sequence=desired.sequence, version="2", outcome="committed")
    radio.report(2, "2", models["2"], update)
    assert wait_until(lambda: operations.rollout_status(home, rollout.id).rollout.state == "finished")
    assert operations.rollout_status(home, rollout.id).counts == {"committed": 1}
    # Nobody needs the delta now: the broker is told to forget it, and that is noted.
    assert wait_until(lambda: server.status()["cached_blobs"] == 0)
    with opened(home) as there:
        assert wait_until(lambda: not there.store.cached())


def test_nothing_but_signed_blobs_is_answered_and_nonsense_is_counted(
    server: Server, radio: Radio, models: dict[str, Path]
) -> None:
    topic = TOPICS.request(DEVICE)
    radio.say(topic, ChunkRequest(blob=digest_of(b"secret"), first=0, wanted="gA=="))
    radio.say(topic, ChunkRequest(blob=digest_of(models["1"].read_bytes()), first=0, wanted="?"))
    radio.say(topic, ChunkRequest(blob=digest_of(models["1"].read_bytes()), first=1 << 50, wanted="gA=="))
    for payload in (
        b"",
        b"{",
        b"\xff" * 70_000,
        b'{"type":"keys"}',
        b'{"v":2,"type":"metadata","root_version":1}',
    ):
        radio.say(topic, payload)
    radio.say(TOPICS.report(DEVICE), b"[]")
    radio.say(TOPICS.link(DEVICE), Link(online=True))
    assert wait_until(lambda: server.status()["devices_online"] == 1)
    counters = server.counters()
    assert counters["messages_invalid"] == 5
    assert counters["chunks_answered"] == 0
    assert _ask(radio, digest_of(models["1"].read_bytes()), [0])


def test_a_request_that_is_repeated_while_it_waits_is_answered_once(
    server: Server, radio: Radio, models: dict[str, Path]
) -> None:
    name = digest_of(models["1"].read_bytes())
    transport = server._transport
    assert transport is not None
    with transport._condition:  # nothing is sent while this is held
        for _ in range(50):
            transport.answer_chunks(DEVICE, name, [0, 1])
    assert wait_until(lambda: len(radio.chunks) >= 2)
    _ask(radio, name, [2])
    assert server.counters()["chunks_answered"] == 3


def test_many_devices_that_ask_at_once_are_all_answered(server: Server, models: dict[str, Path]) -> None:
    name = digest_of(models["1"].read_bytes())
    radios = [Radio(server.broker_port, DeviceId(f"pi-{number}")) for number in range(8)]
    try:
        for radio in radios:
            radio.say(
                TOPICS.request(radio.device),
                ChunkRequest(blob=name, first=0, wanted=encode_window([0, 1, 2], 0)),
            )
        assert wait_until(lambda: all(len(radio.chunks) == 3 for radio in radios))
    finally:
        for radio in radios:
            radio.close()


def _until(check: Callable[[], object]) -> None:
    assert wait_until(check, 30)


def test_a_broker_that_is_lost_is_named_and_one_that_comes_back_gets_everything_again(tmp_path: Path) -> None:
    home = tmp_path / "server"
    models = publish_models(tmp_path, {"1": 1, "2": 2})
    with EmbeddedBroker() as first:
        port = first.port
        server = _serving(home, port)
        server.start()
        radio = Radio(port)
        radio.report(1, "1", models["1"])
        operations.start_rollout(home, "digits", "2")
        _until(radio.desired)
        radio.close()
    try:
        _until(lambda: str(port) in server.broker_error)
        assert not server.status()["is_connected"]
        with EmbeddedBroker(port=port):
            radio = Radio(port)
            _until(radio.desired)
            _until(lambda: _verified(home, radio))
            assert server.counters()["connections"] == 2
            radio.close()
    finally:
        server.stop()


def test_an_embedded_broker_that_lost_its_memory_is_filled_again_after_a_restart(tmp_path: Path) -> None:
    home = tmp_path / "server"
    models = publish_models(tmp_path, {"1": 1, "2": 2})
    for attempt in range(2):
        with Server(read_config(home), seed=attempt) as server:
            server.wait_connected(10)
            radio = Radio(server.broker_port)
            if attempt == 0:
                radio.report(1, "1", models["1"])
                operations.start_rollout(home, "digits", "2")
            _until(radio.desired)
            _until(partial(_verified, home, radio))
            verified = _verified(home, radio)
            assert verified is not None
            old, new = (digest_of(models[version].read_bytes()) for version in ("1", "2"))
            radio.listen(TOPICS.chunk_group(verified.targets[delta_target(old, new)].digest, 0))
            _until(partial(getattr, radio, "chunks"))
            radio.close()
            assert server.failure is None


def test_a_server_that_was_killed_goes_on_where_it_was(tmp_path: Path, broker: Address) -> None:
    home = tmp_path / "server"
    models = publish_models(tmp_path, {"1": 1, "2": 2})
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        "--dir",
        str(home),
        "--broker",
        f"127.0.0.1:{broker.port}",
    ]
    radio = Radio(broker.port)
    radio.report(1, "1", models["1"])
    asked = []
    rollout = operations.start_rollout(home, "digits", "2")
    for _ in range(2):
        radio.last.clear()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as serving:
            try:
                _until(radio.desired)
                asked.append(radio.desired())
            finally:
                serving.kill()
    assert asked[0] == asked[1]
    assert not operations.is_served(home)
    with _serving(home, broker.port):
        update = UpdateReport(rollout=rollout.id, sequence=1, version="2", outcome="committed")
        radio.report(2, "2", models["2"], update)
        _until(lambda: operations.rollout_status(home, rollout.id).rollout.state == "finished")
    radio.close()


def test_a_large_blob_is_retained_at_once_and_in_bounded_memory(tmp_path: Path) -> None:
    home = tmp_path / "server"
    models = publish_models(tmp_path, {"1": 1}, side=1600)
    length = models["1"].stat().st_size
    assert length > 10_000_000
    with Server(read_config(home), seed=1) as server:
        server.wait_connected(10)
        radio = Radio(server.broker_port)
        radio.say(
            TOPICS.report(DEVICE),
            Report(device=DEVICE, sequence=1, state="idle", family="digits"),
            retain=True,
        )
        operations.start_rollout(home, "digits", "1")
        _until(radio.desired)
        radio.close()
        assert server.broker is not None
        assert server.broker.statistics().retained_payload_bytes > length
        assert server.counters()["chunks_cached"] == -(-length // 65_496) + 2
        assert server.broker.statistics().dropped == 0


def test_a_release_that_is_published_while_the_server_runs_is_noticed(tmp_path: Path) -> None:
    home = tmp_path / "server"
    publish_models(tmp_path, {"1": 1})
    with Server(read_config(home), seed=1) as server:
        server.wait_connected(10)
        radio = Radio(server.broker_port)
        _until(lambda: _verified(home, radio))
        health = tmp_path / "health.json"
        model = tmp_path / "digits-1.onnx"
        operations.add_release(home, "digits", "1b", [model], runtime="onnx", health=health)
        operations.publish_release(home, "digits", "1b")

        def versions() -> set[str]:
            targets = json.loads(radio.last[TOPICS.metadata(ROLES[0])])["signed"]["targets"]
            return {path.split("/")[2] for path in targets if path.startswith("releases/")}

        _until(lambda: versions() == {"1.json", "1b.json"})
        radio.close()


class _Calendar:
    """A clock that only goes on when it is told to."""

    def __init__(self, now_ms: int) -> None:
        self.at_ms = now_ms

    def now_ms(self) -> int:
        return self.at_ms


def test_a_delta_that_nobody_needs_leaves_metadata_and_disk_after_its_time_of_grace(
    models: dict[str, Path], tmp_path: Path
) -> None:
    home = tmp_path / "server"
    calendar = _Calendar(SystemClock().now_ms())
    old, new = (digest_of(models[version].read_bytes()) for version in ("1", "2"))
    config = msgspec.structs.replace(read_config(home), delta_grace_hours=24)

    def signed() -> Target | None:
        with opened(home) as there:
            repository = there.store.repository()
            assert repository is not None
            return (
                there.publisher().checked(repository, calendar.now_ms()).targets.get(delta_target(old, new))
            )

    with Server(config, seed=1, clock=calendar) as server:
        server.wait_connected(10)
        radio = Radio(server.broker_port)
        radio.report(1, "1", models["1"])
        _until(lambda: server.status()["devices"] == 1)
        rollout = operations.start_rollout(home, "digits", "2")
        _until(lambda: radio.desired() is not None)
        delta = signed()
        assert delta is not None
        path = home / "blobs" / delta.digest[:2] / delta.digest
        calendar.at_ms += 48 * 3_600_000
        # The device was asked and has not answered, however long ago that was.
        _until(lambda: operations.rollout_status(home, rollout.id).rollout.state == "stopped")
        assert signed() is not None
        sequence = radio.desired()
        assert sequence is not None
        update = UpdateReport(
            rollout=rollout.id, sequence=sequence.sequence, version="2", outcome="committed"
        )
        radio.report(2, "2", models["2"], update)
        _until(lambda: server.status()["versions"] == {"digits 2": 1})
        calendar.at_ms += 3_600_000
        _until(lambda: _idle(home) == [delta_target(old, new)])
        calendar.at_ms += 23 * 3_600_000
        assert signed() is not None
        assert path.exists()
        calendar.at_ms += 3_600_000
        _until(lambda: signed() is None)
        _until(lambda: not path.exists())
        _until(lambda: _idle(home) == [])
        assert server.counters()["deltas_retired"] == 1
        radio.close()
    for digest in (old, new):
        assert (home / "blobs" / digest[:2] / digest).exists()


def _idle(home: Path) -> list[str]:
    with opened(home) as there:
        return [idle.path for idle in there.store.idle_deltas()]


def test_waiting_for_a_broker_that_is_not_there_ends_with_an_error(tmp_path: Path) -> None:
    home = tmp_path / "server"
    publish_models(tmp_path, {"1": 1})
    with running_broker("embedded", tmp_path) as gone:
        port = gone.port
    with _serving(home, port) as server, pytest.raises(TransportError, match=str(port)):
        server.wait_connected(0.5)
