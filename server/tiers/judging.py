"""Which tiers a release may go to: the tiers of a server against its files, before anything is signed."""

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from protocol.errors import RequestError
from protocol.ids import Digest, Family, Version
from protocol.release import Release, RuntimeName, release_target
from protocol.tensors import parse_gguf
from server.adapters.blobs import FileSource, storage_errors
from server.home import Home
from server.signing import signed_paths
from server.tiers.files import Tier, read_tiers
from server.tiers.fit import Fit, Subject, fit
from server.tiers.needs import ModelNeeds, llama_needs, onnx_needs


class Judge:
    """Judges releases by what devices may run at one moment; files are read once.

    Args:
        home: The server's folder.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._subjects: dict[str, Subject] = {}
        signed = signed_paths(home)
        self._published = [
            record.release
            for record in home.store.releases()
            if record.published_ms is not None
            and release_target(Family(record.release.family), Version(record.release.version)) in signed
        ]

    def fit(self, release: Release, name: str, tier: Tier) -> Fit:
        """How a release whose files are in the blob store fits a tier.

        Raises:
            StorageError: A file of the release cannot be read.
        """
        before = [
            self._subject(each)
            for each in self._published
            if (each.family, each.version != release.version) == (release.family, True)
            and (not each.resources.tiers or name in each.resources.tiers)
        ]
        return fit(self._subject(release), name, tier, before)

    def _subject(self, release: Release) -> Subject:
        key = f"{release.family} {release.version}"
        found = self._subjects.get(key)
        if found is None:
            first = release.files[0]
            path = self._home.blobs.path(Digest(first.sha256))
            found = self._subjects[key] = Subject(
                runtime=release.runtime,
                needs=_needs(path, release.runtime, release.bytes_total),
                stated_bytes=release.resources.memory_bytes,
                sha256=first.sha256,
            )
        return found


def judge_release(home: Home, release: Release, names: Sequence[str] = ()) -> list[Fit]:
    """How a release whose files are in the blob store fits tiers; nothing where a server has none.

    Args:
        home: The server's folder.
        release: A draft, or a published one.
        names: Tiers to look at; all of its runtime, if none are named.

    Raises:
        RequestError: A tier file is malformed, or there is no tier of a name.
        StorageError: A file of the release cannot be read.
    """
    tiers = read_named(home, names)
    chosen = {name: tier for name, tier in tiers.items() if names or tier.runtime == release.runtime}
    if not chosen:
        return []
    judge = Judge(home)
    return [judge.fit(release, name, tier) for name, tier in chosen.items()]


def read_named(home: Home, names: Sequence[str]) -> dict[str, Tier]:
    """The tiers of these names, or all of them if none are named; nothing where a server has none.

    Raises:
        RequestError: A tier file is malformed, or there is no tier of a name.
    """
    tiers = read_tiers(home.config.folder)
    if tiers and (unknown := sorted(set(names) - set(tiers))):
        raise RequestError(f"there is no tier {unknown[0][:64]}", hint=f"known are {', '.join(tiers)[:200]}")
    return {name: tier for name, tier in tiers.items() if name in names or not names}


def for_tiers(home: Home, release: Release) -> Release:
    """The release, for the tiers that it fits among those that it names, or among all of its runtime; as it is where there are no tiers.

    Raises:
        RequestError: It fits none; says what broke and what would fit. Or as `judge_release`.
    """
    fits = judge_release(home, release, release.resources.tiers)
    if not fits:
        return release
    good = [each.tier for each in fits if each.is_good]
    if not good:
        first = fits[0]
        others = "".join(f"; {each.tier}: {each.broken[0].detail}" for each in fits[1:3])
        raise RequestError(
            f"{release.family} {release.version} fits no tier; {first.tier}: {first.broken[0].detail}{others}",
            hint=f"would fit: {'; '.join(first.would_fit)}"
            if first.would_fit
            else "give another model, or another tier",
        )
    return replace(release, resources=replace(release.resources, tiers=good))


def check_still_fits(home: Home, release: Release) -> None:
    """Check a draft once more before it is signed: tiers may have changed, and so may what devices run.

    Raises:
        RequestError: It does not fit a tier that it is for.
    """
    known = read_tiers(home.config.folder)
    named = [name for name in release.resources.tiers if name in known]
    for each in judge_release(home, release, named) if named else ():
        if not each.is_good:
            name = f"{release.family} {release.version}"
            raise RequestError(
                f"{name} does not fit tier {each.tier}: {each.broken[0].detail}",
                hint=f"add {name} again: it will be for the tiers that it fits",
            )


def _needs(path: Path, runtime: RuntimeName, weights_bytes: int) -> ModelNeeds:
    if runtime == "onnx":
        return onnx_needs(weights_bytes)
    with storage_errors(path), path.open("rb") as file:
        return llama_needs(parse_gguf(FileSource(file)), weights_bytes)
