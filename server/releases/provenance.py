"""Where a model comes from: an in-toto statement with a SLSA provenance predicate, read, compared and made.

Pure. Formats: in-toto attestation framework, Statement v1; SLSA v1, "Build: Provenance". Unknown fields are passed over, as both ask
for. Nobody's signature on a statement is looked at: what binds it is its digest in the signed description of a release (ADR 27).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from protocol.errors import ReleaseError, RequestError
from protocol.ids import Digest
from protocol.release import Release

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"

BUILD_TYPE: Final = "urn:whimbrel:quantization:1"
"""Build type of statements that are made here; SPEC section 7.2 says what its parameters are."""

CHOICE_BUILD_TYPE: Final = "urn:whimbrel:requantization:1"
"""Likewise, of a file that `whimbrel requantize` chose."""

DEFAULT_BUILDER: Final = "urn:whimbrel:release-add"
"""Builder of a statement whose author names none: whoever added the release, by hand."""

PROVENANCE_BYTES_MAX: Final = 256 << 10
"""A statement of a build system has some 4 KB; one with every file of a data set is kept beside it, by its digest."""

SETTINGS_MAX: Final = 64

_Text = Annotated[str, Meta(max_length=4096)]
_Uri = Annotated[str, Meta(min_length=1, max_length=4096)]
_Digests = Annotated[dict[_Text, _Text], Meta(max_length=16)]
_Texts = Annotated[dict[_Text, _Text], Meta(max_length=256)]
_Values = Annotated[dict[_Text, Any], Meta(max_length=256)]


class Resource(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A ResourceDescriptor: something that went in, or came out."""

    name: _Text = ""
    uri: _Text = ""
    digest: _Digests = {}
    media_type: _Text = msgspec.field(name="mediaType", default="")
    content: Annotated[str, Meta(max_length=PROVENANCE_BYTES_MAX)] = ""  # base64


class BuildDefinition(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What was asked for."""

    build_type: _Uri
    external_parameters: _Values
    internal_parameters: _Values = {}
    resolved_dependencies: Annotated[list[Resource], Meta(max_length=1024)] = []


class Builder(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who did it."""

    id: _Uri
    version: _Texts = {}


class RunMetadata(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """When, and which run it was."""

    invocation_id: _Text = ""
    started_on: _Text = ""
    finished_on: _Text = ""


class RunDetails(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How it went."""

    builder: Builder
    metadata: RunMetadata = RunMetadata()
    byproducts: Annotated[list[Resource], Meta(max_length=1024)] = []


class Provenance(Struct, frozen=True, kw_only=True, rename="camel"):
    """The predicate."""

    build_definition: BuildDefinition
    run_details: RunDetails


class Statement(Struct, frozen=True, kw_only=True, rename="camel"):
    """Says of its subjects, the files of a release, how they came to be."""

    type: _Text = msgspec.field(name="_type")
    subject: Annotated[list[Resource], Meta(min_length=1, max_length=1024)]
    predicate_type: _Text
    predicate: Provenance


class _Kind(Struct):
    """As much of a JSON document as tells what it is."""

    type: str = msgspec.field(name="_type", default="")
    predicate_type: str = msgspec.field(name="predicateType", default="")
    payload_type: str = msgspec.field(name="payloadType", default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a person says about a model that no build system made.

    Attributes:
        source: URI of what was quantized, or its file name.
        source_sha256: Digest of its bytes.
        quantizer: Program and version.
        settings: Of the quantizer.
        builder: URI of who ran it, "" for nobody in particular.
        versions: Of the software that took part, by name.
    """

    source: str
    source_sha256: Digest
    quantizer: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    builder: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


_kind_decoder = msgspec.json.Decoder(_Kind)
_decoder = msgspec.json.Decoder(Statement)
_encoder = msgspec.json.Encoder(order="deterministic")


def decode_statement(data: bytes, source: str) -> Statement:
    """Read a statement.

    Args:
        data: Its bytes.
        source: Names it in errors.

    Raises:
        ReleaseError: Too long, malformed, or another kind of statement.
    """
    if len(data) > PROVENANCE_BYTES_MAX:
        raise ReleaseError(f"{source} has {len(data)} bytes, allowed are {PROVENANCE_BYTES_MAX}")
    try:
        kind = _kind_decoder.decode(data)
        if kind.payload_type:
            raise ReleaseError(
                f"{source} is a signed envelope (DSSE)",
                hint="verify it, and give the statement inside: jq -r .payload FILE | base64 -d",
            )
        if kind.type != STATEMENT_TYPE:
            raise ReleaseError(f"{source}: _type is {kind.type[:80]!r}, expected {STATEMENT_TYPE!r}")
        if kind.predicate_type != PREDICATE_TYPE:
            raise ReleaseError(
                f"{source}: predicateType is {kind.predicate_type[:80]!r}, expected {PREDICATE_TYPE!r}"
            )
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReleaseError(f"{source}: {error}") from error


def check_statement(statement: Statement, release: Release, source: str) -> None:
    """Check that a statement is about the files of a release, all of them and nothing else.

    Raises:
        ReleaseError: It is not; names the file. Or it speaks of another scorecard.
    """
    said = {subject.digest.get("sha256", ""): subject.name for subject in statement.subject}
    for file in release.files:
        if file.sha256 not in said:
            named = [digest for digest, name in said.items() if name == file.name]
            found = (
                f"says that {file.name} has the digest {named[0] or 'of none'}"
                if named
                else "does not name it"
            )
            raise ReleaseError(
                f"{source}: {file.name} has the digest {file.sha256}, the statement {found}",
                hint="give the statement of the build that made these very files",
            )
    strangers = set(said) - {file.sha256 for file in release.files}
    if strangers:
        stranger = min(strangers)
        raise ReleaseError(
            f"{source}: subject {said[stranger] or stranger!r} is no file of the release",
            hint="give a statement about the files of the release alone",
        )
    scorecards = scorecard_digests(statement)
    if release.scorecard_sha256 is not None and scorecards != {release.scorecard_sha256}:
        raise ReleaseError(
            f"{source}: the release has the scorecard {release.scorecard_sha256}, the statement "
            + (f"names {', '.join(sorted(scorecards))}" if scorecards else "names none")
        )


def scorecard_digests(statement: Statement) -> set[str]:
    """Digests of the byproducts called `scorecard`."""
    return {
        byproduct.digest.get("sha256", "")
        for byproduct in statement.predicate.run_details.byproducts
        if byproduct.name == "scorecard"
    }


def encode_statement(statement: Statement) -> bytes:
    """Canonical JSON of a statement that is made here."""
    return _encoder.encode(statement)


def make_statement(release: Release, origin: Origin) -> bytes:
    """Return the statement of a person about the files of a release, as JSON.

    Raises:
        RequestError: The source carries a password, or there are too many settings.
    """
    if _has_password(origin.source):
        raise RequestError(
            "the source has a password in its address, which everybody could read", hint="leave it out"
        )
    if len(origin.settings) > SETTINGS_MAX:
        raise RequestError(f"{len(origin.settings)} settings, allowed are {SETTINGS_MAX}")
    parameters: dict[str, Any] = {
        "family": release.family,
        "version": release.version,
        "runtime": release.runtime,
    }
    if origin.quantizer:
        parameters["quantizer"] = origin.quantizer
    if origin.settings:
        parameters["settings"] = dict(origin.settings)
    card = release.scorecard_sha256
    statement = Statement(
        type=STATEMENT_TYPE,
        subject=[Resource(name=file.name, digest={"sha256": file.sha256}) for file in release.files],
        predicate_type=PREDICATE_TYPE,
        predicate=Provenance(
            build_definition=BuildDefinition(
                build_type=BUILD_TYPE,
                external_parameters=parameters,
                resolved_dependencies=[Resource(uri=origin.source, digest={"sha256": origin.source_sha256})],
            ),
            run_details=RunDetails(
                builder=Builder(id=origin.builder or DEFAULT_BUILDER, version=dict(origin.versions)),
                byproducts=[Resource(name="scorecard", digest={"sha256": card})] if card else [],
            ),
        ),
    )
    data = encode_statement(statement)
    check_statement(decode_statement(data, "provenance"), release, "provenance")
    return data


def with_scorecard(statement: Statement, release: Release) -> bytes:
    """A statement that was made here, with the scorecard of the release in place of the one that it named.

    Raises:
        ReleaseError: A build system made it, which alone can say something else.
    """
    digest = release.scorecard_sha256
    assert digest is not None, "a scorecard to be named"
    if statement.predicate.build_definition.build_type not in {BUILD_TYPE, CHOICE_BUILD_TYPE}:
        raise ReleaseError(
            "its provenance is the statement of a build system, and does not name this scorecard",
            hint=f"have it list the byproduct scorecard with the sha256 {digest}, and add the release again",
        )
    run = statement.predicate.run_details
    others = [each for each in run.byproducts if each.name != "scorecard"]
    named = Resource(name="scorecard", digest={"sha256": digest})
    run = msgspec.structs.replace(run, byproducts=[*others, named])
    predicate = msgspec.structs.replace(statement.predicate, run_details=run)
    data = encode_statement(msgspec.structs.replace(statement, predicate=predicate))
    check_statement(decode_statement(data, "provenance"), release, "provenance")
    return data


def _has_password(uri: str) -> bool:
    try:
        return urlsplit(uri).password is not None
    except ValueError:
        return False
