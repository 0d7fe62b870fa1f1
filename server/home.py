"""The folder of a server, opened: settings, database, blobs and keys; and the signed documents as files in it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.errors import WhimbrelError
from server.actors import current_actor
from server.adapters.blobs import FolderBlobs, write_file
from server.adapters.clock import SystemClock
from server.adapters.keys import KeyFolder
from server.adapters.lock import is_locked
from server.adapters.store import SqlStore
from server.audit import DONE, Act, new_act
from server.config import (
    ServerConfig,
    read_config,
)
from server.content_keys import ContentKeys
from server.ports import Clock, Repository
from server.releases.publisher import Publisher

KEYS_FOLDER: Final = "keys"
METADATA_FOLDER: Final = "metadata"
BLOBS_FOLDER: Final = "blobs"
LOCK_FILE: Final = "serve.lock"


@dataclass(frozen=True, slots=True)
class Home:
    """An open folder of a server."""

    config: ServerConfig
    store: SqlStore
    blobs: FolderBlobs
    clock: Clock

    def publisher(self) -> Publisher:
        """Signs with the keys that are there."""
        return Publisher(KeyFolder(self.config.folder / KEYS_FOLDER).load())

    def content_keys(self) -> ContentKeys:
        """Encrypts artifacts, and keeps their keys."""
        return ContentKeys(self.config.folder / KEYS_FOLDER, self.store, self.blobs)

    def act(self, what: str, on: str, text: str = "", **details: str | float) -> Act:
        """What is done here and now, by whoever does it, to be saved with it."""
        return new_act(current_actor(), self.clock.now_ms(), what, on, text, outcome=DONE, **details)

    @contextmanager
    def attempting(self, what: str, on: str) -> Iterator[None]:
        """Note in the audit trail if what happens within is refused."""
        try:
            yield
        except WhimbrelError as error:
            act = new_act(current_actor(), self.clock.now_ms(), what, on, error.message, outcome=error.code)
            with suppress(WhimbrelError):  # what was in the way may be in the way of the note as well
                self.store.save([act])
            raise

    @property
    def is_served(self) -> bool:
        """Whether a server runs on this folder, and will notice what changes."""
        return is_locked(self.config.folder / LOCK_FILE)


@contextmanager
def opened(folder: Path, config: ServerConfig | None = None, clock: Clock | None = None) -> Iterator[Home]:
    """Open a folder that `init_repository` made.

    Raises:
        RequestError: There is no repository, or not one that this version understands.
    """
    config = config or read_config(folder)
    store = SqlStore(config.database_url)
    try:
        store.check()
        yield Home(config, store, FolderBlobs(folder / BLOBS_FOLDER), clock or SystemClock())
    finally:
        store.close()


def write_metadata(folder: Path, repository: Repository) -> None:
    """Copy the signed documents into the folder, for people and installers; the database is what counts."""
    metadata = folder / METADATA_FOLDER
    for version, root in enumerate(repository.roots, start=1):
        path = metadata / f"{version}.root.json"
        if not path.exists():
            write_file(path, root)
    documents = repository.documents
    for role, data in documents.delegated:
        write_file(metadata / f"{role}.json", data)
    write_file(metadata / "targets.json", documents.targets)
    write_file(metadata / "snapshot.json", documents.snapshot)
    write_file(metadata / "timestamp.json", documents.timestamp)
