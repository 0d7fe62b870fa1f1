"""The statement about a file that `whimbrel requantize` chose, made from the record beside it (SPEC section 7.2, ADR 45). Pure."""

from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from protocol.errors import ReleaseError
from protocol.ids import digest_of
from protocol.release import Release
from server.releases.provenance import (
    CHOICE_BUILD_TYPE,
    DEFAULT_BUILDER,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    BuildDefinition,
    Builder,
    Provenance,
    Resource,
    RunDetails,
    Statement,
    check_statement,
    decode_statement,
    encode_statement,
)
from server.requantize.record import Record

RECORD_NAME: Final = "requantized"
"""Of the byproduct that is the record itself."""

EMBEDDED_BYTES_MAX: Final = 128 << 10
"""A longer record is named by its digest alone: in base64 it would take two thirds of what a statement may have."""

JUDGED_PARAMETER: Final = "guards"


def check_record(record: Record, release: Release, source: str) -> None:
    """Check that a record is about the one file of a release.

    Raises:
        ReleaseError: The file has other bytes, or there are more files, which the record does not explain.
    """
    file = release.files[0]
    if len(release.files) != 1:
        raise ReleaseError(
            f"{source} explains {file.name} alone, the release has {len(release.files)} files",
            hint="say where all of them come from with --provenance",
        )
    if record.sources.result != file.sha256:
        raise ReleaseError(
            f"{source} is the record of a file with the digest {record.sources.result}, {file.name} has {file.sha256}",
            hint="give the file that was chosen; if it was made in another way since, remove the record",
        )


def make_choice_statement(
    release: Release, record: Record, data: bytes, builder: str, versions: Mapping[str, str]
) -> bytes:
    """Return the statement about the chosen file of a release, as JSON.

    Args:
        release: It has the file that the record is about.
        record: How that was chosen.
        data: Bytes of the record.
        builder: URI of who chose it, "" for nobody in particular.
        versions: Of the software that took part, by name.
    """
    card = release.scorecard_sha256
    byproducts = [_record_resource(data)]
    if card is not None:
        byproducts.append(Resource(name="scorecard", digest={"sha256": card}))
    statement = Statement(
        type=STATEMENT_TYPE,
        subject=[Resource(name=file.name, digest={"sha256": file.sha256}) for file in release.files],
        predicate_type=PREDICATE_TYPE,
        predicate=Provenance(
            build_definition=BuildDefinition(
                build_type=CHOICE_BUILD_TYPE,
                external_parameters=_asked(release, record),
                internal_parameters=_found(record),
                resolved_dependencies=list(_dependencies(record)),
            ),
            run_details=RunDetails(
                builder=Builder(id=builder or DEFAULT_BUILDER, version=dict(versions)), byproducts=byproducts
            ),
        ),
    )
    encoded = encode_statement(statement)
    check_statement(decode_statement(encoded, "provenance"), release, "provenance")
    return encoded


def _asked(release: Release, record: Record) -> dict[str, Any]:
    """What somebody decided."""
    parameters: dict[str, Any] = {
        "family": release.family,
        "version": release.version,
        "runtime": release.runtime,
        "requantized": record.asked,
    }
    sources = record.sources
    if sources.calibration_tokens is not None:
        calibration: dict[str, Any] = {"tokens_sha256": sources.calibration_tokens}
        if sources.calibration_runs is not None:
            calibration["runs"], calibration["run_tokens"] = sources.calibration_runs
        parameters["calibration"] = calibration
    elif sources.samples is not None:
        parameters["calibration"] = {"samples_sha256": sources.samples}
    return parameters


def _found(record: Record) -> dict[str, Any]:
    """What the choice decided, and how it was judged."""
    found: dict[str, Any] = {"price": record.price, "delta_bytes": record.delta_bytes}
    if record.guards is None:
        found[JUDGED_PARAMETER] = "none: written without being judged"
    else:
        counts = Counter(guard.status for guard in record.guards)
        found[JUDGED_PARAMETER] = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return found


def _dependencies(record: Record) -> Iterator[Resource]:
    sources = record.sources
    named = {
        "new model": sources.new,
        "installed file": sources.installed,
        "installed version in floats": sources.before,
        "file whose codes it began with": sources.start,
    }
    if sources.calibration_model != sources.new:
        named["calibrated model"] = sources.calibration_model
    for other in record.sent[1:]:
        yield Resource(
            name=f"installed file of {other.share:.3g} of the fleet", digest={"sha256": other.sha256}
        )
    for name, digest in named.items():
        if digest is not None:
            yield Resource(name=name, digest={"sha256": digest})


def _record_resource(data: bytes) -> Resource:
    content = b64encode(data).decode() if len(data) <= EMBEDDED_BYTES_MAX else ""
    return Resource(
        name=RECORD_NAME,
        digest={"sha256": digest_of(data)},
        media_type="application/json",
        content=content,
    )
