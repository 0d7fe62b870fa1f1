"""`whimbrel release add` and `show`: saying where a model comes from, and reading it."""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from msgspec import UNSET

from protocol.errors import RequestError, TopicError
from protocol.ids import Digest, parse_digest
from server.display import bytes_text, table
from server.operations import ReleaseDetails
from server.releases.provenance import Origin, Statement, scorecard_digests
from server.releases.requantized import RECORD_NAME
from server.statements import ChoiceRecord, Said, record_beside

_VALUE_CHARS_MAX: Final = 200


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a model comes from."""
    group = parser.add_argument_group(
        "where the model comes from, which is signed with the release",
        "A record of `whimbrel requantize` beside the file (….requantized.json) is taken up unless --provenance or --source says something else.",
    )
    group.add_argument(
        "--provenance",
        metavar="FILE",
        type=Path,
        help="in-toto statement with a SLSA provenance v1 predicate, as a build system makes it; or instead:",
    )
    group.add_argument("--source", metavar="FILE|URI", help="what was quantized; a file here is measured")
    group.add_argument(
        "--source-sha256", metavar="HEX", default="", help="digest of a source that is not here"
    )
    group.add_argument("--quantizer", metavar="TEXT", default="", help='for example "llama-quantize b6700"')
    group.add_argument(
        "--setting",
        metavar="NAME=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="of the quantizer, for example type=Q4_0; repeatable",
    )
    group.add_argument("--builder", metavar="URI", default="", help="who, or what machine, quantized it")


def provenance_of(arguments: argparse.Namespace) -> Said | None:
    """What the options say, or the record beside a file that was chosen; or nothing.

    Raises:
        RequestError: They contradict each other, or a source is not there and has no digest.
    """
    said = [arguments.source_sha256, arguments.quantizer, arguments.setting, arguments.builder]
    if arguments.provenance is not None:
        if arguments.source is not None or any(said):
            raise RequestError("--provenance says everything itself", hint="leave the other options out")
        path: Path = arguments.provenance
        return path
    record = record_beside(arguments.files[0])
    is_alone = len(arguments.files) == 1 and arguments.adapter is None
    if arguments.source is None and record is not None and is_alone:
        if any(said[:-1]):
            raise RequestError(
                f"{record} says how {arguments.files[0].name} was made",
                hint="leave out all options but --builder, or say something else with --source",
            )
        return ChoiceRecord(record, arguments.builder)
    if arguments.source is None:
        if any(said):
            raise RequestError("the source of the model is missing", hint="name it with --source")
        return None
    return Origin(
        source=_source_uri(arguments.source),
        source_sha256=_source_digest(arguments.source, arguments.source_sha256),
        quantizer=arguments.quantizer,
        settings=dict(arguments.setting),
        builder=arguments.builder,
    )


def added_lines(arguments: argparse.Namespace, said: Said | None) -> Iterator[str]:
    """What became of the records beside the files of a new release."""
    if isinstance(said, ChoiceRecord):
        yield f"How it was chosen is signed with it, from {said.path}"
        return
    for record in filter(None, map(record_beside, arguments.files)):
        reason = "--provenance or --source says something else"
        if said is None:
            reason = (
                f"the release has {len(arguments.files)} files; --provenance says where all of them come from"
            )
        yield f"{record} is not taken up: {reason}"


def details_lines(details: ReleaseDetails, state: str) -> list[str]:
    """A release for people."""
    release = details.record.release
    files = [
        [
            file.name if file.role is UNSET else f"{file.name} ({file.role})",
            bytes_text(file.length),
            file.sha256,
        ]
        for file in release.files
    ]
    needs = [f"{release.runtime} from {release.runtime_version_min} on"]
    if release.resources.memory_bytes:
        needs.append(f"{bytes_text(release.resources.memory_bytes)} of memory")
    if release.resources.tiers:
        needs.append(f"tier {' or '.join(release.resources.tiers)}")
    health = release.health
    trial = (
        f"{len(health.prompts)} prompts, p99 within {health.latency_p99_ms_max:g} ms,"
        f" at most {bytes_text(health.memory_peak_bytes_max)} of memory"
    )
    return [
        f"{release.family} {release.version}: {state}",
        f"Description: sha256 {details.digest}",
        f"Needs: {', '.join(needs)}",
        f"Trial: {trial}",
        *table(["FILE", "SIZE", "SHA256"], files),
        *_scorecard_lines(details),
        *_provenance_lines(details),
    ]


def _scorecard_lines(details: ReleaseDetails) -> Iterator[str]:
    if details.scorecard is None:
        yield "Scorecard: none; `whimbrel score` makes one"
    else:
        yield f"Scorecard: {details.scorecard.verdict}, sha256 {details.record.release.scorecard_sha256}"


def _provenance_lines(details: ReleaseDetails) -> Iterator[str]:
    if details.provenance is None:
        yield "Provenance: none was given with `release add`"
        return
    yield f"Provenance: sha256 {details.record.release.provenance_sha256}"
    for name, value in _provenance_rows(details.provenance):
        yield f"  {name:<12} {value}"


def _provenance_rows(statement: Statement) -> Iterator[tuple[str, str]]:
    build, run = statement.predicate.build_definition, statement.predicate.run_details
    for source in build.resolved_dependencies:
        yield "source", _line(f"{source.uri or source.name} {_digests_text(source.digest)}")
    for name, value in _flat(build.external_parameters):
        yield name, value
    for name, value in _flat(build.internal_parameters):
        yield name, value
    versions = ", ".join(f"{name} {version}" for name, version in run.builder.version.items())
    yield "builder", _line(run.builder.id + (f" ({versions})" if versions else ""))
    yield "build type", _line(build.build_type)
    for name, value in (("run", run.metadata.invocation_id), ("finished", run.metadata.finished_on)):
        if value:
            yield name, _line(value)
    for byproduct in run.byproducts:
        if byproduct.name == RECORD_NAME:
            where = "in the statement" if byproduct.content else "not in the statement, for its length"
            yield "record", _line(f"{_digests_text(byproduct.digest)}, {where}")
    for digest in sorted(scorecard_digests(statement)):
        yield "scorecard", f"sha256 {_line(digest)}"


def _flat(parameters: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in parameters.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key}={_value_text(inner)}" for key, inner in value.items())
        else:
            text = _value_text(value)
        yield _line(name), _line(text)


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _digests_text(digests: dict[str, str]) -> str:
    return " ".join(f"{name} {digest}" for name, digest in digests.items())


def _line(text: str) -> str:
    """Whoever wrote a statement does not get to move the cursor of whoever reads it."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return plain if len(plain) <= _VALUE_CHARS_MAX else plain[: _VALUE_CHARS_MAX - 1] + "…"


def _source_uri(source: str) -> str:
    """A file is known by its name: where it lay is nobody's business."""
    return Path(source).name if Path(source).is_file() else source


def _source_digest(source: str, said: str) -> Digest:
    measured = ""
    try:
        if Path(source).is_file():
            with Path(source).open("rb") as file:
                measured = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"{source}: {error.strerror}", hint="give a source that can be read") from error
    if measured and said and measured != said:
        raise RequestError(
            f"{source} has the digest {measured}, and not {said}", hint="look for the right file"
        )
    if not measured and not said:
        raise RequestError(f"source {source} is no file here, and has no digest", hint="add --source-sha256")
    try:
        return parse_digest(measured or said)
    except TopicError as error:
        raise RequestError(f"--source-sha256: {error.message}", hint="64 hexadecimal digits") from error


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not NAME=VALUE")
    return name, value
