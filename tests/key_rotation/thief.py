"""Somebody who took a copy of everything on the server: online keys, the certificate for the broker, blobs, documents."""

import shutil
import ssl
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from protocol.chunks import chunk_count, encode_chunk
from protocol.ids import DeviceId, Digest, Family, Version
from protocol.messages import Desired
from protocol.release import ARTIFACTS_ROLE, delta_target, file_target, release_target, releases_role
from server.adapters.blobs import FolderBlobs
from server.adapters.clock import SystemClock
from server.home import BLOBS_FOLDER, KEYS_FOLDER, opened
from server.ports import StoredBlob
from server.releases.catalog import blob_target, target_blobs
from server.releases.metadata import Draft, expires, sign, snapshot_of, timestamp_of
from server.releases.publisher import Publisher
from server.releases.signers import make_key, signer_of
from tests.key_rotation.fleet import FAMILY, TOPICS, WAIT_S
from tests.server.brokers import Address, SecuredBroker

HIGHEST: Final = (1 << 63) - 1
"""A version: nothing that is honest would ever be newer."""

LAST_NUMBER: Final = (1 << 53) - 1
"""The highest number that a wish can have."""

ONLINE: Final = ("timestamp", "snapshot", "artifacts", "director")


class Thief:
    """A client of the broker that passes for the server.

    Args:
        home: The server's folder at the moment of the theft.
        stolen: Where the copy of it goes.
        broker: Where devices listen.
    """

    def __init__(self, home: Path, stolen: Path, broker: Address) -> None:
        shutil.copytree(home, stolen)
        self._blobs = FolderBlobs(stolen / BLOBS_FOLDER)
        self._keys = {
            role: signer_of(role, (stolen / KEYS_FOLDER / f"{role}.pem").read_bytes()) for role in ONLINE
        }
        with opened(stolen) as copy:
            repository = copy.store.repository()
            releases = copy.store.releases()
        assert repository is not None, "the server has signed"
        self._repository = repository
        self._releases = {record.release.version: record.release for record in releases}
        self._stolen = stolen
        self._broker = broker
        self._client: mqtt.Client | None = None
        self._is_accepted, self._is_gone = threading.Event(), threading.Event()

    # The broker

    def connect(self) -> bool:
        """Get onto the broker; tells whether it let him in."""
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="server", reconnect_on_failure=False)
        client.on_connect = lambda *_: self._is_accepted.set()
        client.on_disconnect = lambda *_: self._is_gone.set()
        if isinstance(self._broker, SecuredBroker):
            context = ssl.create_default_context(cafile=self._stolen / "ca/devices.pem")
            context.load_cert_chain(self._stolen / "tls/server.pem", self._stolen / "tls/server.key")
            client.tls_set_context(context)
        self._is_accepted.clear()
        self._is_gone.clear()
        client.connect(self._broker.host, self._broker.port)
        client.loop_start()
        self._client = client
        # TLS 1.3 lets a client in before its certificate was looked at: what counts is that the broker answers.
        while not (self._is_accepted.wait(0.01) or self._is_gone.is_set()):
            continue
        return self._is_accepted.is_set()

    def close(self) -> None:
        """Leave the broker."""
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None

    def say(self, topic: str, payload: bytes) -> None:
        """Retain a message; returns once the broker has it, whatever it makes of it."""
        assert self._client is not None, "connect first"
        self._client.publish(topic, payload, 1, retain=True).wait_for_publish(WAIT_S)

    # What he can do

    def cannot_sign(self) -> list[str]:
        """Roles for which his keys do not do."""
        publisher = Publisher(self._keys)
        draft = Draft(self._repository, {})
        return [role for role in draft.roles() if not publisher.can_sign(draft, role)]

    def publish_forged(self, version: str, evil: bytes, *, as_delta: bool = False) -> None:
        """Say, with the keys that he has and the highest versions that there are, that what people approved is made of other bytes."""
        draft, release = Draft(self._repository, {}), self._releases[version]
        blob = self._retain(evil)
        for file in release.files:
            if as_delta:
                for before in self._releases.values():
                    for base in before.files:
                        draft.put(
                            blob_target(delta_target(Digest(base.sha256), Digest(file.sha256)), blob, 1 << 20)
                        )
            else:
                draft.put(blob_target(file_target(Digest(file.sha256)), blob))
        description = draft.digest(release_target(Family(FAMILY), Version(version)))
        assert description is not None, "people have signed it"
        self._retain_blob(self._blobs.describe(Digest(description)))
        self._publish(draft, {})

    def publish_own_release(self, version: str, evil: bytes) -> None:
        """A release of his own: the keys of the family are not on the server, so it has to be one of his."""
        role = releases_role(Family(FAMILY))
        draft = Draft(self._repository, {})
        draft.put(blob_target(release_target(Family(FAMILY), Version(version)), self._retain(evil)))
        document = draft.documents[role]
        document.version += 1
        private, _ = make_key(None)
        self._publish(draft, {role: sign(role, document, [signer_of("his", private)])})

    def ask(self, devices: Iterable[str], version: str, sequence: int) -> None:
        """Tell devices to run a version, with the director's key."""
        director = Publisher(self._keys).director(self._repository)
        for name in devices:
            desired = Desired(sequence=sequence, rollout="thief", family=FAMILY, version=version)
            topic = TOPICS.desired(DeviceId(name))
            self.say(topic, director.seal(topic, desired, SystemClock().now_ms()))

    def _publish(self, draft: Draft, forged: dict[str, bytes]) -> None:
        now_ms = SystemClock().now_ms()
        artifacts = draft.documents[ARTIFACTS_ROLE]
        artifacts.version, artifacts.expires = HIGHEST, expires(ARTIFACTS_ROLE, now_ms)
        signed = sign(ARTIFACTS_ROLE, artifacts, [self._keys[ARTIFACTS_ROLE]])
        below = {**dict(self._repository.documents.delegated), **forged, ARTIFACTS_ROLE: signed}
        below["targets"] = self._repository.documents.targets
        snapshot = sign("snapshot", snapshot_of(HIGHEST, below, now_ms), [self._keys["snapshot"]])
        timestamp = sign("timestamp", timestamp_of(HIGHEST, snapshot, now_ms), [self._keys["timestamp"]])
        for role, data in {**below, "snapshot": snapshot, "timestamp": timestamp}.items():
            self.say(TOPICS.metadata(role), data)

    def _retain(self, data: bytes) -> StoredBlob:
        blob = self._blobs.put(data)
        self._retain_blob(blob)
        return blob

    def _retain_blob(self, blob: StoredBlob) -> None:
        """Fill the broker's cache with a blob and its index."""
        for name, length in target_blobs(blob_target("", blob)):
            for index in range(chunk_count(length)):
                payload = self._blobs.read_chunk(name, index)
                self.say(TOPICS.chunk(name, index), encode_chunk(name, index, payload))
