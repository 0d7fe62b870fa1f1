"""How large deltas would be that nobody has built yet: built once, measured, thrown away; the sizes are kept as files."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import StorageError
from protocol.ids import Digest
from protocol.release import DeltaName, Release
from server.adapters.blobs import FolderBlobs, storage_errors, write_file
from server.ports import DeltaSize

SIZES_FOLDER: Final = "tradeoffs"
"""In the folder of a server; whatever is removed is built again."""

_NAME: Final = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64})\.json")

Progress = Callable[[int, int, str], None]


def read_sizes(folder: Path) -> dict[tuple[Digest, Digest], DeltaSize]:
    """Sizes that are known, by base and result.

    Args:
        folder: Of the server.

    Raises:
        StorageError: A file cannot be read, or is none of ours.
    """
    found = {}
    place = folder / SIZES_FOLDER
    with storage_errors(place):
        for path in sorted(place.glob("*.json")):
            name = _NAME.fullmatch(path.name)
            try:
                if name is not None:
                    size = msgspec.json.decode(path.read_bytes(), type=DeltaSize)
                    found[Digest(name[1]), Digest(name[2])] = size
            except msgspec.MsgspecError as error:
                raise StorageError(f"{path} is damaged", hint="remove it; it is made again") from error
    return found


def measure_deltas(
    blobs: FolderBlobs,
    folder: Path,
    names: Iterable[DeltaName],
    releases: Iterable[Release],
    progress: Progress,
) -> None:
    """Build deltas and keep their sizes; those of one that was built before are there already.

    Args:
        blobs: Have the files.
        folder: Of the server.
        names: Base and result.
        releases: That have these files; the files beside them may describe their tensors.
        progress: Told how it goes.

    Raises:
        StorageError: A file is missing, or there is no room.
    """
    # Loads the coder and numpy, which takes longer than the rest of the command.
    from server.releases.builders import measure_delta  # noqa: PLC0415

    beside = {
        Digest(file.sha256): {each.name: Digest(each.sha256) for each in release.files}
        for release in releases
        for file in release.files
    }
    wanted = list(dict.fromkeys(names))
    place = folder / SIZES_FOLDER
    with storage_errors(place):
        place.mkdir(exist_ok=True)
    for number, name in enumerate(wanted):
        progress(number, len(wanted), "deltas")
        size = measure_delta(blobs, name, beside[name.base], beside[name.result])
        write_file(place / f"{name.base}-{name.result}.json", msgspec.json.encode(size))
    progress(len(wanted), len(wanted), "deltas")
