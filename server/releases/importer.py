"""From a model file on disk to the draft of a release: everything that can be refused is refused here."""

from pathlib import Path
from typing import Final

from msgspec import UNSET

from protocol.chunks import build_tree
from protocol.errors import ReleaseError, RequestError
from protocol.ids import digest_of, parse_family, parse_version
from protocol.release import (
    FILES_MAX,
    ClassPrompt,
    HealthPlan,
    Release,
    ReleaseFile,
    Resources,
    RuntimeName,
    TextPrompt,
    decode_health_plan,
    decode_release,
    description_version,
    encode_release,
    version_tuple,
)
from server.ports import BlobStore, StoredBlob
from server.releases.model_files import check_model_files

RUNTIME_VERSION_MIN: Final[dict[RuntimeName, str]] = {"onnx": "1.17", "llama": "0.3"}
"""Oldest runtimes that the engines on devices are made for; a release may ask for more."""

ADAPTER_VERSION_MIN: Final = "0.3.36"
"""Oldest llama-cpp-python with the call by which devices add an adapter."""

PROMPT_KINDS: Final[dict[RuntimeName, type[ClassPrompt | TextPrompt]]] = {
    "onnx": ClassPrompt,
    "llama": TextPrompt,
}

EXPORTED_NAMES: Final = frozenset({"release.json", "root.json", "provenance.json", "scorecard.json"})
"""What stands beside the files of a release when it is written into a folder."""

_NOTHING: Final = StoredBlob(digest=digest_of(b""), length=0, tree=build_tree(())[0])


def import_release(
    blobs: BlobStore,
    *,
    family: str,
    version: str,
    files: list[Path],
    runtime: RuntimeName,
    health: Path,
    adapter: Path | None = None,
    memory_bytes: int = 0,
    tiers: list[str] | None = None,
    runtime_version_min: str = "",
) -> Release:
    """Check the files of a release to be, and copy them into the blob store.

    Args:
        blobs: Takes the files.
        family: Model family.
        version: A new version of it.
        files: The model first, then what belongs to it, for example external ONNX tensors.
        runtime: Which engine loads the first file.
        health: JSON file with the health plan.
        adapter: GGUF file with a low-rank adapter, which the runtime adds to the weights of the first file; it is a file of the release, too.
        memory_bytes: What a device needs to run the model; 0 for no statement.
        tiers: Hardware tiers that may take it; none for all.
        runtime_version_min: Oldest version of the runtime that loads it.

    Raises:
        RequestError: A file cannot be read, or there are too many.
        ModelFileError: The model is damaged or not of that runtime's kind, a file of external tensors is not what it says, or an adapter is
            for another model.
        ReleaseError: The health plan or the description is malformed.
        TopicError: The family or version is no name.
        StorageError: The blob store cannot be written.
    """
    parse_family(family)
    parse_version(version)
    if adapter is not None:
        _check_adapter_wish(adapter, runtime, runtime_version_min)
        files = [*files, adapter]
    if not 1 <= len(files) <= FILES_MAX:
        raise RequestError(f"{len(files)} files, allowed are 1 to {FILES_MAX}")
    if taken := sorted(EXPORTED_NAMES & {path.name for path in files}):
        raise ReleaseError(f"no file of a release may be called {taken[0]}", hint="give it another name")
    plan = decode_health_plan(_read(health), str(health))
    _check_prompts(plan, runtime, health)

    oldest = RUNTIME_VERSION_MIN[runtime] if adapter is None else ADAPTER_VERSION_MIN

    def described(blobs_of_files: list[StoredBlob]) -> Release:
        named = [
            ReleaseFile(
                name=path.name,
                length=blob.length,
                sha256=blob.digest,
                role="adapter" if path is adapter else UNSET,
            )
            for path, blob in zip(files, blobs_of_files, strict=True)
        ]
        release = Release(
            v=description_version(named),
            family=family,
            version=version,
            runtime=runtime,
            runtime_version_min=runtime_version_min or oldest,
            files=named,
            resources=Resources(memory_bytes=memory_bytes, tiers=tiers or []),
            health=plan,
        )
        return decode_release(encode_release(release))  # names and bounds, as devices will check them

    described([_NOTHING] * len(files))  # before anything large is copied
    check_model_files(files, runtime, adapter)
    return described([blobs.put_file(path) for path in files])


def _check_adapter_wish(adapter: Path, runtime: RuntimeName, runtime_version_min: str) -> None:
    if runtime != "llama":
        raise ReleaseError(
            f"{adapter}: the runtime {runtime} has no adapters", hint="merge it into the model instead"
        )
    if runtime_version_min and version_tuple(runtime_version_min) < version_tuple(ADAPTER_VERSION_MIN):
        raise ReleaseError(
            f"adapters need llama-cpp-python {ADAPTER_VERSION_MIN} or later, {runtime_version_min} is older",
            hint="leave --runtime-version-min out",
        )


def _check_prompts(plan: HealthPlan, runtime: RuntimeName, source: Path) -> None:
    """A runtime can answer prompts of one kind only; on a device the others would look like a bad model."""
    kind = PROMPT_KINDS[runtime]
    for prompt in plan.prompts:
        if not isinstance(prompt, kind):
            raise ReleaseError(
                f"{source}: prompt {prompt.name!r} is not of the kind that {runtime} models answer",
                hint='use kind "class" for onnx and "text" for llama',
            )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a JSON file that can be read") from error
