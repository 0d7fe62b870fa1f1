"""Which quantized files a fleet has, each on a part of it, where it has several: after a rollout that was interrupted, say.

One file is chosen for all of them. What it costs is then the mean over the devices: what each file's delta weighs, times the share that has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.errors import ModelFileError, RequestError
from server.requantize.model import ModelFile, opened_gguf, sha256_of

PORTIONS_MAX: Final = 8
"""Files of one fleet: each is read beside the others, and gets a delta of its own in every round."""

_SHARE_MIN: Final = 1e-6
"""Left for the first file: below it is what adding shares has rounded."""

_HINT: Final = "devices with such a file need an update of their own: leave it out here"


@dataclass(frozen=True, slots=True)
class Portion:
    """A part of the fleet.

    Attributes:
        path: The quantized file that its devices have, GGUF.
        share: Of the fleet, above 0 and below 1.
    """

    path: Path
    share: float


def all_portions(installed: Path, also: Sequence[Portion]) -> tuple[Portion, ...]:
    """The whole fleet: the first file has what the others leave of it."""
    return Portion(installed, 1.0 - sum(each.share for each in also)), *also


def shares_of(also: Sequence[Portion]) -> tuple[float, ...]:
    """Of all files, the first one's before the others'; none where there is only one."""
    return (1.0 - sum(each.share for each in also), *(each.share for each in also)) if also else ()


def names_of(installed: Path, also: Sequence[Portion]) -> tuple[str, ...]:
    """What people call the files: their names, and where two have the same one their paths."""
    paths = [installed, *(each.path for each in also)]
    names = [path.name for path in paths]
    return tuple(
        str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)
    )


def mean_bytes(sizes: Sequence[int], also: Sequence[Portion]) -> int:
    """What a device fetches on average, of one size for each file."""
    return round(sum(share * size for share, size in zip(shares_of(also) or (1.0,), sizes, strict=True)))


def check_fleet(installed: Path, also: Sequence[Portion]) -> None:
    """Refuse shares that are none, files that are given twice, and files whose codes cannot be compared one by one.

    Raises:
        RequestError: A share is none, or a file is there twice.
        ModelFileError: Names, shapes or types of tensors differ.
        StorageError: A file cannot be read.
    """
    if not also:
        return
    _check_shares(installed, also)
    with opened_gguf(installed) as first:
        for each in also:
            with opened_gguf(each.path) as other:
                _check_alike(first, other)
    seen: dict[str, Path] = {}
    for path in (installed, *(each.path for each in also)):
        digest = sha256_of(path)
        if digest in seen:
            raise RequestError(
                f"{path}: is the same file as {seen[digest]}", hint="add the two shares, and give it once"
            )
        seen[digest] = path


def _check_shares(installed: Path, also: Sequence[Portion]) -> None:
    if len(also) >= PORTIONS_MAX:
        raise RequestError(
            f"{len(also) + 1} installed files, at most {PORTIONS_MAX} are weighed",
            hint="leave out those that few devices have",
        )
    for each in also:
        if not 0 < each.share < 1:
            raise RequestError(
                f"{each.path}: a share of {each.share:g} is not between 0 and 1",
                hint="give the share of the devices that have this file, such as 0.3",
            )
    total = sum(each.share for each in also)
    if total >= 1 - _SHARE_MIN:
        raise RequestError(
            f"the shares of the other files come to {total:g}, which leaves nothing for {installed}",
            hint="--installed has what the files given with --also leave of 1",
        )


def main_first(installed: Path, also: Sequence[Portion]) -> tuple[Path, tuple[Portion, ...]]:
    """The same fleet with the file that most devices have before the others, as `choose` takes it; of equal shares the order stays."""
    ranked = sorted(all_portions(installed, also), key=lambda each: -each.share)
    return ranked[0].path, tuple(ranked[1:])


def _check_alike(installed: ModelFile, other: ModelFile) -> None:
    for name, region in installed.tensors.items():
        if name not in other.tensors:
            raise ModelFileError(
                f"{other.path}: there is no tensor {name}, which {installed.path} has", hint=_HINT
            )
        own = other.tensors[name]
        if own.dims != region.dims:
            raise ModelFileError(
                f"{other.path}: {name} has the shape {own.dims}, {region.dims} in {installed.path}",
                hint=_HINT,
            )
        if own.layout is not region.layout:
            raise ModelFileError(
                f"{other.path}: {name} is {own.layout.value}, {region.layout.value} in {installed.path}",
                hint=_HINT,
            )
    unknown = next((name for name in other.tensors if name not in installed.tensors), None)
    if unknown is not None:
        raise ModelFileError(f"{other.path}: {installed.path} has no tensor {unknown}", hint=_HINT)
