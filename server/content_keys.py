"""Artifacts that only enrolled devices can read: encrypting them, and giving their keys to devices (SPEC section 5.5)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from protocol.encryption import ContentCipher, content_key_name, make_content_key, wrap_key
from protocol.errors import (
    KeyRefusedError,
    KeysUnavailableError,
    MissingKeyError,
    NotCertifiedError,
    StorageError,
    WhimbrelError,
)
from protocol.identity import PublicKey, key_digest
from protocol.ids import DeviceId, Digest, FleetId
from protocol.messages import KeyAnswer, WrappedKey
from protocol.release import Encryption
from server.adapters.blobs import FolderBlobs
from server.adapters.store import SqlStore
from server.adapters.vault import Vault
from server.ports import ContentKeyRecord, EncryptedBlob, StoredBlob
from server.releases.catalog import blob_target, target_blobs

WARNED_MAX: Final = 1_000
"""Devices of which is remembered what was logged; of more nothing is."""

_LOG: Final = logging.getLogger(__name__)


class ContentKeys:
    """Content keys of one server.

    Args:
        keys: Folder of the key that they are stored under.
        store: Where they are.
        blobs: Where artifacts are.
    """

    def __init__(self, keys: Path, store: SqlStore, blobs: FolderBlobs) -> None:
        self._vault = Vault(keys)
        self._store = store
        self._blobs = blobs
        self._warned: dict[str, str] = {}

    def encrypt(self, digest: Digest) -> EncryptedBlob:
        """Store what a blob is under a new key. The key is durable before anybody can be told of the artifact.

        Raises:
            StorageError: The blob is not there, or there is no room.
            MissingKeyError: The key that content keys are stored under is damaged.
        """
        self._vault.prepare(may_create=not self._store.has_content_keys())
        key = make_content_key()
        blob = self._blobs.put_changed(digest, ContentCipher(key))
        self._store.save([ContentKeyRecord(blob=blob.digest, locked=self._vault.lock(blob.digest, key))])
        return EncryptedBlob(blob=blob, encryption=Encryption(key=content_key_name(key)))

    def encrypt_delta(self, delta: StoredBlob) -> EncryptedBlob:
        """As `encrypt`, of a delta that nobody needs as it is."""
        encrypted = self.encrypt(delta.digest)
        for name, _ in target_blobs(blob_target("", delta)):
            self._blobs.remove(name)
        return encrypted

    def answer(
        self, fleet: FleetId, device: DeviceId, blobs: Sequence[Digest], recipients: Sequence[PublicKey]
    ) -> KeyAnswer:
        """What a device is told that asked for keys.

        Args:
            fleet: The fleet.
            device: Which.
            blobs: Artifacts whose keys it may have; none if it may not have those that it asked for.
            recipients: Public keys of its valid certificates.
        """
        try:
            keys = self._wrapped(fleet, device, blobs, recipients)
        except WhimbrelError as error:
            self._warn(device, error)
            return KeyAnswer(code=error.code, detail=str(error))
        self._warned.pop(device, None)
        return KeyAnswer(keys=keys)

    def _wrapped(
        self, fleet: FleetId, device: DeviceId, blobs: Sequence[Digest], recipients: Sequence[PublicKey]
    ) -> tuple[WrappedKey, ...]:
        if not recipients:
            raise NotCertifiedError("this device has no valid certificate of the server")
        if not blobs:
            raise KeyRefusedError("this device was not asked to run what these artifacts lead to")
        try:
            keys = {blob: self._key(blob) for blob in blobs}
        except (MissingKeyError, StorageError) as error:
            _LOG.error("content keys cannot be read: %s", error)
            raise KeysUnavailableError("the server cannot read its content keys now") from error
        return tuple(
            WrappedKey(
                blob=blob,
                recipient=key_digest(recipient),
                wrapped=wrap_key(key, recipient, fleet, device, blob),
            )
            for blob, key in keys.items()
            for recipient in recipients
        )

    def _key(self, blob: Digest) -> bytes:
        record = self._store.content_key(blob)
        if record is None:
            raise MissingKeyError(f"the content key of {blob[:12]} is not in the database")
        return self._vault.unlock(blob, record.locked)

    def _warn(self, device: DeviceId, error: WhimbrelError) -> None:
        """Say something once, until it is something else."""
        if self._warned.get(device) != error.code and (
            device in self._warned or len(self._warned) < WARNED_MAX
        ):
            self._warned[device] = error.code
            _LOG.warning("%s: gets no content keys: %s", device, error)
