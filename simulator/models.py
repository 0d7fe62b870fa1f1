"""What is published: real bytes, real signatures, real deltas, made once at the start and shared by all devices."""

import hashlib
import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from protocol.chunks import build_tree, index_name
from protocol.constants import CHUNK_BYTES
from protocol.delta.format import Profile
from protocol.delta.needs import in_place_needs
from protocol.delta.writer import make_delta
from protocol.errors import RequestError, StorageError
from protocol.ids import Digest, digest_of
from protocol.release import (
    ClassPrompt,
    HealthPlan,
    InPlaceNeeds,
    Release,
    ReleaseFile,
    Resources,
    decode_health_plan,
)
from protocol.tensors import BytesSource
from server.ports import StoredBlob
from server.releases.publisher import ROLES, Publisher
from simulator.scenario import Model, Scenario
from simulator.streams import generator

FAMILY: Final = "digits"
FLEET: Final = "simulated"
FACTORY: Final = "v1"
FILE_NAME: Final = "model.onnx"
BLOCK_BYTES: Final = 4_096
"""A fine-tune changes whole blocks of a synthetic model."""

_RANDOM_BYTES: Final = 1 << 24

LATENCY_P99_MS_MAX: Final = 200.0
MEMORY_PEAK_BYTES_MAX: Final = 512 << 20


class MemoryBlobs:
    """Blobs by name: the twin of `server.adapters.blobs.FolderBlobs`, without files."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    def put(self, data: bytes) -> StoredBlob:
        """Store `data` and the index blobs of its chunk tree."""
        parts = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
        tree, indexes = build_tree(hashlib.sha256(part).digest() for part in parts)
        digest = digest_of(data)
        self._blobs[digest] = data
        for level, index in enumerate(indexes, start=1):
            self._blobs[index_name(tree, level)] = index
        return StoredBlob(digest=digest, length=len(data), tree=tree)

    def read(self, name: Digest) -> bytes:
        """A whole blob.

        Raises:
            StorageError: There is none of that name.
        """
        data = self._blobs.get(name)
        if data is None:
            raise StorageError(f"there is no blob {name[:16]}")
        return data

    def read_chunk(self, name: Digest, index: int) -> bytes:
        """As `BlobStore.read_chunk`."""
        payload = self.read(name)[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        if not payload:
            raise StorageError(f"blob {name[:16]} has no chunk {index}")
        return payload

    def remove(self, name: Digest) -> None:
        """As `BlobStore.remove`."""
        self._blobs.pop(name, None)


def publisher_of(seed: int) -> Publisher:
    """Keys from the seed: signatures are the same in every run."""
    keys = {
        role: Ed25519PrivateKey.from_private_bytes(
            hashlib.sha256(f"{seed}/key/{role}".encode()).digest()
        ).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        for role in ROLES
    }
    return Publisher(keys)


def contents_of(scenario: Scenario) -> dict[str, bytes]:
    """The model file of the factory's version and of every release, by version.

    Raises:
        RequestError: A file cannot be read, or there are not enough.
    """
    versions = [FACTORY, *(release.version for release in scenario.releases)]
    if len(set(versions)) != len(versions):
        raise RequestError(f"two releases have one version, or the factory's ({FACTORY})", hint="rename one")
    if scenario.model.files:
        return dict(zip(versions, _real(scenario.model, len(versions)), strict=True))
    contents = {FACTORY: _random_bytes(scenario.seed, scenario.model.bytes)}
    before = contents[FACTORY]
    for release in scenario.releases:
        before = contents[release.version] = _fine_tuned(
            before, release.changed_share, scenario.seed, release.version
        )
    return contents


def release_of(version: str, data: bytes, model: Model) -> Release:
    """The description of a release.

    Raises:
        RequestError: The health plan cannot be read.
        ReleaseError: It is malformed.
    """
    return Release(
        family=FAMILY,
        version=version,
        runtime="onnx",
        runtime_version_min="1.17",
        files=[ReleaseFile(name=FILE_NAME, length=len(data), sha256=digest_of(data))],
        resources=Resources(),
        health=_health_of(model),
    )


def _health_of(model: Model) -> HealthPlan:
    if model.health:
        (data,) = _read([model.health])
        return decode_health_plan(data, model.health)
    return HealthPlan(
        prompts=[ClassPrompt(name=f"p{label}", input=[0.0], label=label) for label in range(model.prompts)],
        latency_p99_ms_max=LATENCY_P99_MS_MAX,
        memory_peak_bytes_max=MEMORY_PEAK_BYTES_MAX,
    )


class SimulatedDelta(NamedTuple):
    """A delta, and what applying it takes."""

    content: bytes
    memory_bytes: int
    in_place: InPlaceNeeds | None


@lru_cache(maxsize=64)
def delta_between(base: bytes, result: bytes, profile: Profile) -> SimulatedDelta:
    """The delta between two files, as the server's builder makes it; built once for the same files."""
    sink, old, new = io.BytesIO(), BytesSource(base), BytesSource(result)
    statistics = make_delta(old, new, sink, profile=profile, in_place=None)
    content = sink.getvalue()
    needs = in_place_needs(old, new, BytesSource(content))
    return SimulatedDelta(content, statistics.header.decoder_memory_bytes, needs)


def _random_bytes(seed: int, length: int) -> bytes:
    """As `randbytes`, which gives at most 256 MiB at once."""
    chance = generator(seed, "model")
    pieces = range(0, length, _RANDOM_BYTES)
    return b"".join(chance.randbytes(min(_RANDOM_BYTES, length - at)) for at in pieces)


def _fine_tuned(before: bytes, share: float, seed: int, version: str) -> bytes:
    chance = generator(seed, "tuning", version)
    content = bytearray(before)
    blocks = range(0, len(before), BLOCK_BYTES)
    changed = [at for at in blocks if chance.random() < share] or [blocks[chance.randrange(len(blocks))]]
    for at in changed:
        content[at : at + BLOCK_BYTES] = chance.randbytes(min(BLOCK_BYTES, len(before) - at))
    return bytes(content)


def _real(model: Model, count: int) -> list[bytes]:
    if len(model.files) != count:
        raise RequestError(
            f"model.files names {len(model.files)} files, needed are {count}",
            hint="one for the factory's version and one for each release",
        )
    return _read(model.files)


def _read(names: Iterable[str]) -> list[bytes]:
    try:
        return [Path(name).read_bytes() for name in names]
    except OSError as error:
        raise RequestError(
            f"{error.filename}: {error.strerror}", hint="give files that can be read"
        ) from error
