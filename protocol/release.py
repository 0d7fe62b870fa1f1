"""What a release is: the signed description that a device judges before it fetches a byte (SPEC section 7)."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from protocol.constants import BLOB_BYTES_MAX, PROTOCOL_VERSION, RELEASE_BYTES_MAX
from protocol.delta.format import REACH_BYTES_MAX, Profile
from protocol.errors import ReleaseError, TopicError
from protocol.ids import Digest, Family, Version, digest_of, parse_digest, parse_family, parse_version

_Name = Annotated[str, Meta(min_length=1, max_length=64)]
_Text = Annotated[str, Meta(max_length=8192)]
_FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
_DigestText = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Length = Annotated[int, Meta(ge=0, le=BLOB_BYTES_MAX)]
_Milliseconds = Annotated[int, Meta(ge=0, le=86_400_000)]
_Share = Annotated[float, Meta(ge=0, le=1)]

FILES_MAX: Final = 8
PROMPTS_MAX: Final = 256

RuntimeName = Literal["onnx", "llama"]
FileRole = Literal["adapter"]

ROLES_VERSION: Final = 2
"""Of the description of a release whose files have roles. Agents that do not know roles would run the first file alone; they refuse this."""

ARTIFACTS_ROLE: Final = "artifacts"
"""Name of the TUF role that lists whole files and deltas: how devices get to what a release names, never what they may run."""

DIRECTOR_ROLE: Final = "director"
"""Name of the TUF role whose keys say which of the listed releases a device should run. It lists nothing itself."""

_PROFILE_SUFFIXES: Final = {Profile.SMALL: "", Profile.FAST: "/fast"}

_ENCRYPTED_SUFFIX: Final = ".encrypted"
"""After the digest of the file that an artifact leads to. Agents that cannot decrypt do not know such a path, and take no such artifact for another."""


class ClassPrompt(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="class"
):
    """One input of a classifier and the class that it really belongs to."""

    name: _Name
    input: Annotated[list[float], Meta(min_length=1, max_length=65_536)]  # flat, for the first input
    label: Annotated[int, Meta(ge=0, lt=1_000_000)]


class TextPrompt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="text"):
    """One prompt of a text model and the completion that it is judged by."""

    name: _Name
    prompt: _Text
    completion: Annotated[str, Meta(min_length=1, max_length=8192)]
    logprob_mean_min: float  # natural logarithm, mean over the tokens of `completion`, teacher-forced
    exact: bool = False  # the greedy continuation must begin with `completion`


Prompt = ClassPrompt | TextPrompt


class HealthPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the new model must show on a device before it is committed. All of it is required."""

    prompts: Annotated[list[Prompt], Meta(min_length=1, max_length=PROMPTS_MAX)]
    class_accuracy_min: _Share = 1.0  # share of the class prompts that must be answered with their label
    latency_p99_ms_max: Annotated[float, Meta(gt=0)]  # of one inference
    memory_peak_bytes_max: Annotated[int, Meta(gt=0)]  # resident set of the trial process
    load_timeout_ms: _Milliseconds = 60_000
    prompt_timeout_ms: _Milliseconds = 30_000
    soak_ms: _Milliseconds = 0  # keeps answering prompts for at least this long


class ReleaseFile(Struct, frozen=True, kw_only=True):
    """One file of a release; the first is the one that the runtime loads."""

    name: _FileName
    length: _Length
    sha256: _DigestText
    # What the runtime does with it beside the first. Left out for a file that the first one itself speaks of.
    role: FileRole | UnsetType = UNSET


class Resources(Struct, frozen=True, kw_only=True):
    """What a device must have. Zero means: no statement."""

    memory_bytes: Annotated[int, Meta(ge=0)] = 0  # to run the model: weights, caches, runtime
    tiers: Annotated[list[_Name], Meta(max_length=64)] = []  # empty: every tier


class Release(Struct, frozen=True, kw_only=True):
    """A version of a model family. Its canonical bytes are a TUF target."""

    v: int = PROTOCOL_VERSION
    family: str
    version: str
    runtime: RuntimeName
    runtime_version_min: Annotated[str, Meta(pattern=r"^\d{1,4}(\.\d{1,4}){0,3}$")]
    files: Annotated[list[ReleaseFile], Meta(min_length=1, max_length=FILES_MAX)]
    resources: Resources
    health: HealthPlan
    scorecard_sha256: _DigestText | None = None
    # Of the statement about where the files come from. Left out where there is none: the bytes of older releases stay as they are.
    provenance_sha256: _DigestText | UnsetType = UNSET

    @property
    def bytes_total(self) -> int:
        """Length of all files."""
        return sum(file.length for file in self.files)

    @property
    def adapter(self) -> ReleaseFile | None:
        """The low-rank adapter that the runtime adds to the weights of the first file; None where there is none."""
        return next((file for file in self.files if file.role == "adapter"), None)


class ChunkTree(Struct, frozen=True, kw_only=True):
    """Root of the digests of a blob's chunks; see `chunks.py`."""

    root: _DigestText
    levels: Annotated[int, Meta(ge=0, le=4)]


class InPlaceNeeds(Struct, frozen=True, kw_only=True):
    """What a delta takes that is applied to its base itself (SPEC section 6.12), so that a device knows before it fetches it."""

    base_bytes: _Length
    reach_bytes: Annotated[int, Meta(ge=0, le=REACH_BYTES_MAX)]  # the larger of `behind` and `ahead`
    inverse_bytes: _Length  # length of the inverse, about


class Encryption(Struct, frozen=True, kw_only=True):
    """How an artifact is encrypted (SPEC section 5.5). Length and digests of its target are those of what travels."""

    cipher: _Name = (
        "aes-256-ctr"  # another one leads nowhere, and is no reason to believe nothing else that was signed
    )
    key: _DigestText  # name of the content key, see `encryption.py`

    @property
    def is_understood(self) -> bool:
        """Whether this version can decrypt it."""
        return self.cipher == "aes-256-ctr"


class ArtifactCustom(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a TUF target of ours says beside length and digest."""

    chunks: ChunkTree
    memory_bytes: Annotated[int, Meta(ge=0)] = 0  # a delta's declared decoder memory
    in_place: InPlaceNeeds | None = None  # of a delta that was made for application in place
    encryption: Encryption | None = None  # of an artifact that only devices with its key can read


_encoder = msgspec.json.Encoder(order="deterministic")
_release_decoder = msgspec.json.Decoder(Release)
_health_decoder = msgspec.json.Decoder(HealthPlan)


def encode_release(release: Release) -> bytes:
    """Canonical bytes: the same release always gives the same bytes."""
    return _encoder.encode(release)


def decode_release(data: bytes) -> Release:
    """Read a release description.

    Raises:
        ReleaseError: Too long, malformed, another protocol version, or contradicting itself.
    """
    if len(data) > RELEASE_BYTES_MAX:
        raise ReleaseError(f"release description of {len(data)} bytes, allowed are {RELEASE_BYTES_MAX}")
    release = _decoded(_release_decoder, data, "release description")
    assert isinstance(release, Release)
    check_release(release)
    return release


def decode_health_plan(data: bytes, source: str) -> HealthPlan:
    """Read the health plan of a release to be.

    Raises:
        ReleaseError: Malformed; names `source` and the field.
    """
    if len(data) > RELEASE_BYTES_MAX:
        raise ReleaseError(f"{source} has {len(data)} bytes, allowed are {RELEASE_BYTES_MAX}")
    plan = _decoded(_health_decoder, data, source)
    assert isinstance(plan, HealthPlan)
    _check_health(plan)
    return plan


def check_release(release: Release) -> None:
    """Check what the types cannot say.

    Raises:
        ReleaseError: Names the field.
    """
    _check_version(release)
    try:
        parse_family(release.family)
        parse_version(release.version)
    except TopicError as error:
        raise ReleaseError(f"release description: {error}") from error
    names = [file.name for file in release.files]
    if len(set(names)) != len(names):
        raise ReleaseError("release description: two files have one name")
    if release.bytes_total > BLOB_BYTES_MAX:
        raise ReleaseError(
            f"release description: {release.bytes_total} bytes in all, allowed are {BLOB_BYTES_MAX}"
        )
    _check_adapter(release)
    _check_health(release.health)


def description_version(files: Sequence[ReleaseFile]) -> int:
    """The version that the description of a release with these files has: the lowest that can say it."""
    return PROTOCOL_VERSION if all(file.role is UNSET for file in files) else ROLES_VERSION


def releases_role(family: Family) -> str:
    """Name of the TUF role whose keys say which versions of a family may run (SPEC section 8.1)."""
    return f"releases.{family}"


def role_paths(role: str) -> tuple[str, ...]:
    """Path patterns that are delegated to a role of ours, so that no family can speak for another.

    Raises:
        ReleaseError: Nothing is delegated to a role of this name.
    """
    kind, _, family = role.partition(".")
    if role == ARTIFACTS_ROLE:
        return ("files/*", "deltas/*/*", "deltas/*/*/fast")
    if role == DIRECTOR_ROLE:
        return ("director/*",)
    try:
        if kind == "releases":
            return (f"releases/{parse_family(family)}/*",)
    except TopicError as error:
        raise ReleaseError(f"role {role[:80]}: {error}") from error
    raise ReleaseError(
        f"nothing is delegated to a role {role[:80]!r}", hint="use artifacts, director or releases.FAMILY"
    )


def release_target(family: Family, version: Version) -> str:
    """Path of the TUF target that describes a release."""
    return f"releases/{family}/{version}.json"


def file_target(digest: Digest, *, is_encrypted: bool = False) -> str:
    """Path of the TUF target of a whole file; `digest` is that of the file itself."""
    return f"files/{digest}{_ENCRYPTED_SUFFIX if is_encrypted else ''}"


class FileName(NamedTuple):
    """A whole file."""

    digest: Digest
    is_encrypted: bool


def parse_file_target(path: str) -> FileName | None:
    """Which whole file a TUF target is; None for every other target."""
    folder, _, name = path.partition("/")
    if folder != "files":
        return None
    try:
        digest = parse_digest(name.removesuffix(_ENCRYPTED_SUFFIX))
    except TopicError:
        return None
    return FileName(digest, is_encrypted=name != digest)


class DeltaName(NamedTuple):
    """A delta between two files: there may be one of each profile. It is encrypted if one of the files is a secret."""

    base: Digest
    result: Digest
    profile: Profile = Profile.SMALL
    is_encrypted: bool = False


def delta_target(
    base: Digest,
    result: Digest,
    profile: Profile = Profile.SMALL,
    is_encrypted: bool = False,  # noqa: FBT001, FBT002 - a `DeltaName`, taken apart
) -> str:
    """Path of the TUF target of the delta between two files."""
    return f"deltas/{base}/{result}{_ENCRYPTED_SUFFIX if is_encrypted else ''}{_PROFILE_SUFFIXES[profile]}"


def parse_delta_target(path: str) -> DeltaName | None:
    """Which delta a TUF target is; None for every other target."""
    parts = path.split("/")
    if len(parts) not in {3, 4} or parts[0] != "deltas":
        return None
    try:
        base, result = parse_digest(parts[1]), parse_digest(parts[2].removesuffix(_ENCRYPTED_SUFFIX))
    except TopicError:
        return None
    for profile in Profile:
        name = DeltaName(base, result, profile, is_encrypted=parts[2] != result)
        if path == delta_target(*name):
            return name
    return None


def release_digest(release: Release) -> Digest:
    """Digest of the canonical bytes: identifies a release, for quarantine among others."""
    return digest_of(encode_release(release))


def version_tuple(text: str) -> tuple[int, ...]:
    """Numbers of a dotted runtime version, for comparison; what is not numeric ends it."""
    numbers: list[int] = []
    for part in text.split("."):
        if not (part.isascii() and part.isdigit()):
            break
        numbers.append(int(part))
    return tuple(numbers)


def _check_version(release: Release) -> None:
    if release.v not in {PROTOCOL_VERSION, ROLES_VERSION}:
        raise ReleaseError(
            f"release description of version {release.v}, understood are {PROTOCOL_VERSION} and {ROLES_VERSION}"
        )
    needed = description_version(release.files)
    if release.v != needed:
        raise ReleaseError(f"release description of version {release.v}, its files need {needed}")


def _check_adapter(release: Release) -> None:
    adapters = [file.name for file in release.files if file.role == "adapter"]
    if not adapters:
        return
    if release.runtime != "llama":
        raise ReleaseError(f"release description: the runtime {release.runtime} has no adapters")
    if len(adapters) > 1 or release.files[0].role == "adapter":
        raise ReleaseError("release description: one adapter is allowed, behind the model")


def _check_health(plan: HealthPlan) -> None:
    names = [prompt.name for prompt in plan.prompts]
    if len(set(names)) != len(names):
        raise ReleaseError(
            "health plan: two prompts have one name", hint="each prompt is reported by its name"
        )


def _decoded(decoder: msgspec.json.Decoder[Any], data: bytes, source: str) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReleaseError(f"{source}: {error}") from error
