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
from server.releases.delta_garbage import is_absent
from server.requantize.portions import PORTIONS_MAX, Portion


@contextmanager
def running(
    folder: Path, family: str, report: Callable[[str], None]
) -> Iterator[tuple[Path, tuple[Portion, ...]]]:
    """The files under the names of their versions, the one that most devices run first.

    Devices that have been absent for long do not count. Beyond `PORTIONS_MAX` files those that few devices run are left out; shares
    are of the devices that are weighed.

    Args:
        folder: The server's.
        family: Of the models.
        report: Takes lines that say which versions are weighed.

    Raises:
        RequestError: No device of the family has reported a version that the server has, or a version is not one file.
        StorageError: The server's folder cannot be read.
    """
    with opened(folder) as home:
        releases = {
            each.release.version: each.release
            for each in home.store.releases()
            if each.release.family == parse_family(family)
        }
        now_ms = home.clock.now_ms()
        reports = Counter(
            each.version
            for each in home.store.devices()
            if each.family == family and each.version and not is_absent(each, now_ms)
        )
        files: dict[Path, str] = {}  # with the version that most devices have it by
        counts: Counter[Path] = Counter()
        for version, count in reports.most_common():
            if version in releases:
                path = _file(home, releases[version])
                files.setdefault(path, version)
                counts[path] += count
    weighed = counts.most_common(PORTIONS_MAX)
    if not weighed:
        raise RequestError(
            f"no device has reported a version of {family} that this server has",
            hint="see `whimbrel devices`, or give the file with --installed",
        )
    total = sum(count for _, count in weighed)
    for path, count in weighed:
        report(f"{family} {files[path]}: {count:,} device(s), {100 * count / total:.3g} %")
    if total < reports.total():
        report(f"{reports.total() - total:,} device(s) with other files are not weighed")
    with tempfile.TemporaryDirectory(prefix="whimbrel-") as name:
        portions = []
        for path, count in weighed:
            link = Path(name) / f"{files[path]}.gguf"
            with storage_errors(link):
                link.symlink_to(path.resolve())
            portions.append(Portion(link, count / total))
        yield portions[0].path, tuple(portions[1:])


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
