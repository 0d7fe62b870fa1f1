"""One server per folder: an advisory lock that ends with the process, however it ends."""

import fcntl
import os
import time
from pathlib import Path
from typing import Final

from protocol.errors import RequestError
from server.adapters.blobs import storage_errors

_ATTEMPTS: Final = 4
_WAIT_S: Final = 0.05
"""`is_locked` of another process holds the lock for an instant."""


class FolderLock:
    """Held from construction to `release`.

    Args:
        path: The lock file; made when it is not there, never removed.

    Raises:
        RequestError: Another process, or another object of this one, holds it.
    """

    def __init__(self, path: Path) -> None:
        with storage_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if attempt + 1 < _ATTEMPTS:
                    time.sleep(_WAIT_S)
                    continue
                os.close(self._descriptor)
                raise RequestError(
                    f"another server runs on {path.parent}", hint="stop it first, or use another folder"
                ) from error
            break

    def release(self) -> None:
        """Let others have it."""
        os.close(self._descriptor)


def is_locked(path: Path) -> bool:
    """Whether someone holds the lock."""
    if not path.exists():
        return False
    try:
        FolderLock(path).release()
    except RequestError:
        return True
    return False
