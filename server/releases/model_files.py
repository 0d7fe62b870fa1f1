"""Whether the files of a release are a model of its runtime, and nothing else: whatever can be refused is, before a byte is copied.

The layouts themselves are checked in `protocol/tensors`; here is what no parser sees: links, folders, and files that do not belong together.
"""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from protocol.errors import ModelFileError, ReleaseError, RequestError
from protocol.release import FILES_MAX, RuntimeName
from protocol.tensors import Region, map_external, parse_gguf, parse_onnx, parse_safetensors
from protocol.tensors.gguf import GgufFile
from server.adapters.blobs import FileSource
from server.releases.adapter_files import check_adapter, is_adapter

_GGUF, _ONNX, _SAFETENSORS = ".gguf", ".onnx", ".safetensors"
MODEL_ENDINGS: Final[dict[RuntimeName, str]] = {"llama": _GGUF, "onnx": _ONNX}
"""What the first file is, whatever it is called."""

_EXPORT_AGAIN: Final = "give the file that was exported with this model"


def check_model_files(files: Sequence[Path], runtime: RuntimeName, adapter: Path | None = None) -> None:
    """Check the model, the files that belong to it, and every other file that says by its name to be a model.

    Args:
        files: The model first. Their names differ.
        runtime: Which engine loads the model.
        adapter: Which of the files it adds to the weights.

    Raises:
        RequestError: A file cannot be read, or is no plain file.
        ModelFileError: One is damaged or not of its kind, or a file of external tensors is not what it says, or an adapter is for another model.
        ReleaseError: A file that the model needs is missing.
    """
    external: dict[str, tuple[Region, ...]] = {}
    shards: dict[str, GgufFile] = {}
    for path in files:
        is_model = path is files[0]
        is_loaded = is_model or path is adapter
        ending = MODEL_ENDINGS[runtime] if is_loaded else path.suffix.lower()
        with (
            _opened(path, may_be_link=is_model) as source,
            _named(path, runtime if is_loaded else ending[1:]),
        ):
            if is_model and source.length == 0:
                raise ModelFileError("the file is empty")
            if ending == _GGUF:
                shards[path.name] = parse_gguf(source)
            elif ending == _SAFETENSORS:
                parse_safetensors(source)
            elif ending == _ONNX:
                for location, tensors in parse_onnx(source).external.items():
                    external[location] = external.get(location, ()) + tensors
    if runtime == "llama":
        _check_llama(files[0], shards, adapter)
    _check_external(files[0], {path.name: path for path in files[1:]}, external)


@contextmanager
def _opened(path: Path, *, may_be_link: bool) -> Iterator[FileSource]:
    """Open a plain file.

    A model must parse before anything of it is copied; the files beside it may be of any kind. One that is a second name of some
    other file of this machine would carry that to the whole fleet (CVE-2026-34446), so these are never links.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if may_be_link else os.O_NOFOLLOW)
    link = RequestError(
        f"{path} is a link to a file elsewhere, which may not be meant for the fleet",
        hint="copy it: cp --dereference",
    )
    try:
        if not may_be_link and path.is_symlink():
            raise link
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise RequestError(f"{path} is no plain file", hint="give a file that can be read")
            if not may_be_link and found.st_nlink != 1:
                raise link
            yield FileSource(file)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a file that can be read") from error


@contextmanager
def _named(path: Path, kind: str) -> Iterator[None]:
    """Say of which file an error is."""
    try:
        yield
    except ModelFileError as error:
        hint = error.hint or f"give a model for the runtime {kind}"
        raise ModelFileError(f"{path}: {error.message}", hint=hint) from error


def _check_external(
    model: Path, others: Mapping[str, Path], external: Mapping[str, tuple[Region, ...]]
) -> None:
    missing = sorted(external.keys() - others.keys())
    if missing:
        hint = "name them behind the model, with these file names"
        if any("/" in location for location in missing):
            hint = "a release has no folders: export the model with its tensors in a file beside it"
        raise ReleaseError(f"{model} keeps tensors in other files: {', '.join(missing)[:200]}", hint=hint)
    for location, tensors in external.items():
        path = others[location]
        # Models of one release may share tensors, as those of a split model do.
        shared = {(tensor.offset, tensor.length): tensor for tensor in tensors}
        try:
            map_external(tuple(shared[key] for key in sorted(shared)), path.stat().st_size)
        except ModelFileError as error:
            raise ModelFileError(
                f"{path}: not the tensors that {model.name} describes: {error.message}", hint=_EXPORT_AGAIN
            ) from error


def _check_llama(model: Path, files: Mapping[str, GgufFile], adapter: Path | None) -> None:
    if is_adapter(files[model.name]):
        raise ModelFileError(
            f"{model} is an adapter, and no model by itself",
            hint="give its model, and the adapter with --adapter",
        )
    names = _check_shards(model, files)
    if adapter is not None:
        check_adapter(adapter, files[adapter.name], model.name, [files[name] for name in names])


def _check_shards(model: Path, shards: Mapping[str, GgufFile]) -> list[str]:
    """A model that is split into several GGUF files must be whole: llama.cpp finds the others by the name of the first.

    Names and keys: llama.cpp `llama_split_path` and `gguf-split`.

    Returns:
        The names of the parts, in order; that of the model where it is whole.
    """
    count = _number(shards[model.name], "split.count")
    if count <= 1:
        return [model.name]
    if count > FILES_MAX:
        raise ReleaseError(
            f"{model} is split into {count} parts, a release has at most {FILES_MAX} files",
            hint="merge them: llama-gguf-split --merge",
        )
    ending = f"-{1:05}-of-{count:05}.gguf"
    if not model.name.endswith(ending):
        raise ReleaseError(
            f"{model} is a part of {count}, and not the first by its name, which would end with {ending}",
            hint="give the first part first, under its own name",
        )
    names = [
        f"{model.name.removesuffix(ending)}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)
    ]
    missing = sorted(set(names) - shards.keys())
    if missing:
        raise ReleaseError(
            f"{model} is split, and parts are missing: {', '.join(missing)[:200]}",
            hint="name them behind the first part",
        )
    seen: set[str] = set()
    for number, name in enumerate(names):
        shard = shards[name]
        if (_number(shard, "split.no"), _number(shard, "split.count")) != (number, count):
            raise ModelFileError(
                f"{name} is not part {number + 1} of {count} by its metadata", hint=_EXPORT_AGAIN
            )
        tensors = {tensor.name for tensor in shard.tensors}
        if seen & tensors:
            raise ModelFileError(f"{name} has tensor {min(seen & tensors)!r}, which another part has, too")
        seen |= tensors
    said = _number(shards[model.name], "split.tensors.count")
    if said != len(seen):
        raise ModelFileError(
            f"{model} says that its parts have {said} tensors, they have {len(seen)}", hint=_EXPORT_AGAIN
        )
    return names


def _number(file: GgufFile, key: str) -> int:
    value = file.metadata.get(key, 0)
    return value if isinstance(value, int) else 0
