"""Documents that wait for signatures: one file each in the folder `pending`, in the format in which they will be published.

People sign the files where they are, or carry them to where their key is and back.
"""

from pathlib import Path
from typing import Final

from protocol.constants import metadata_bytes_max
from protocol.errors import RequestError
from server.adapters.blobs import storage_errors, write_file

PENDING_FOLDER: Final = "pending"
_SUFFIX: Final = ".json"


class PendingFolder:
    """Documents by role.

    Args:
        folder: Of the server.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / PENDING_FOLDER

    def read(self) -> dict[str, bytes]:
        """What waits.

        Raises:
            RequestError: A file is longer than a document of its role can be.
            StorageError: The folder cannot be read.
        """
        with storage_errors(self._folder):
            return {path.name.removesuffix(_SUFFIX): read_document(path) for path in self._paths()}

    def roles(self) -> list[str]:
        """Whose documents wait, whatever they hold."""
        return [path.name.removesuffix(_SUFFIX) for path in self._paths()]

    def write(self, documents: dict[str, bytes]) -> None:
        """Let these wait, and nothing else.

        Raises:
            StorageError: The folder cannot be written.
        """
        if not documents and not self._folder.exists():
            return
        with storage_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
            for role, data in documents.items():
                write_file(self.path(role), data)
            for path in self._paths():
                if path.name.removesuffix(_SUFFIX) not in documents:
                    path.unlink()

    def _paths(self) -> list[Path]:
        found = self._folder.glob(f"*{_SUFFIX}") if self._folder.is_dir() else ()
        return sorted(path for path in found if not path.name.startswith("."))

    def path(self, role: str) -> Path:
        """Of one document."""
        return self._folder / f"{role}{_SUFFIX}"


def read_document(path: Path) -> bytes:
    """A document in a file that is named after its role.

    Raises:
        RequestError: It is not there, or longer than a document of its role can be.
        StorageError: It cannot be read.
    """
    bytes_max = metadata_bytes_max(path.name.removesuffix(_SUFFIX))
    with storage_errors(path):
        try:
            with path.open("rb") as file:
                data = file.read(bytes_max + 1)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise RequestError(f"{path}: {error.strerror}") from error
    if len(data) > bytes_max:
        raise RequestError(f"{path} has more than {bytes_max} bytes, which no document of that role has")
    return data
