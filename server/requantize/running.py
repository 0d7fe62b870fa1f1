"""Which quantized files a server's devices run, and how many run each, by what they report."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import RequestError
from protocol.ids import Digest, parse_family
from protocol.release import Release
from server.adapters.blobs import storage_errors
from server.home import Home, opened
from server.requantize.portions import PORTIONS_MAX, Portion


@contextmanager
def running(
    folder: Path, family: str, report: Callable[[str], None]
) -> Iterator[tuple[Path, tuple[Portion, ...]]]:
    """The files under the names of their versions, the one that most devices run first.

    Versions that few devices run are left out beyond `PORTIONS_MAX`; shares are of those that are not.

    Args:
        folder: The server's.
        family: Of the models.
        report: Takes lines that say which versions are weighed.

    Raises:
        RequestError: No device of the family has reported a version that the server has, or a version is not one GGUF file.
        StorageError: The server's folder cannot be read.
    """
    with opened(folder) as home:
        reports = Counter(
            each.version
            for each in home.store.devices()
            if each.family == parse_family(family) and each.version
        )
        releases = {
            each.release.version: each.release
            for each in home.store.releases()
            if each.release.family == family
        }
        known = [(version, count) for version, count in reports.most_common() if version in releases]
        weighed = known[:PORTIONS_MAX]
        if not weighed:
            raise RequestError(
                f"no device has reported a version of {family} that this server has",
                hint="see `whimbrel devices`, or give the file with --installed",
            )
        files = {version: _file(home, releases[version]) for version, _ in weighed}
    total = sum(count for _, count in weighed)
    for version, count in weighed:
        report(f"{family} {version}: on {count:,} devices, {100 * count / total:.3g} %")
    if total < reports.total():
        report(f"{reports.total() - total:,} devices run other versions, which are not weighed")
    with tempfile.TemporaryDirectory(prefix="whimbrel-") as name, storage_errors(Path(name)):
        links = [Path(name) / f"{version}.gguf" for version, _ in weighed]
        for link, file in zip(links, files.values(), strict=True):
            link.symlink_to(file.resolve())
        yield (
            links[0],
            tuple(
                Portion(link, count / total) for link, (_, count) in zip(links[1:], weighed[1:], strict=True)
            ),
        )


def _file(home: Home, release: Release) -> Path:
    if len(release.files) != 1:
        raise RequestError(
            f"{release.family} {release.version} has {len(release.files)} files, one GGUF file is needed",
            hint="give the files that devices have with --installed and --also",
        )
    path = home.blobs.path(Digest(release.files[0].sha256))
    if not path.is_file():
        raise RequestError(
            f"{path}: the file of {release.family} {release.version} is not there",
            hint="add the release again",
        )
    return path
