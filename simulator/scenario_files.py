"""Scenarios as files: found by name or path, read as TOML or JSON, changed field by field, checked by one schema.

Every mistake is a `RequestError` that names the file, the field and, where there is one, the line.
"""

import argparse
import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from protocol.errors import RequestError
from simulator.scenario import Faults, Scenario

FILE_BYTES_MAX: Final = 1 << 20
"""A scenario is a page of text; a trace of a link may make it longer."""

DEFAULT: Final = "release"

_SUFFIX: Final = ".toml"
_WHERE: Final = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_UNKNOWN: Final = re.compile(r"unknown field `(?P<name>[^`]*)`")
_TABLE: Final = re.compile(r"^\s*(?P<open>\[\[?)\s*(?P<name>[\w.\-]+)\s*\]")

Words = Annotated[str, Meta(max_length=1_000)]


class ScenarioFile(Scenario, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A scenario, and what it is for."""

    title: Words = ""
    asks: Words = ""
    expects: Words = ""

    @property
    def scenario(self) -> Scenario:
        """Only what a run depends on."""
        return Scenario(**{name: getattr(self, name) for name in Scenario.__struct_fields__})


def add_scenario_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--scenario` and `--set`, which give `scenario` and `changes`."""
    parser.add_argument(
        "--scenario",
        default=default,
        metavar="NAME|FILE",
        help="see `whimbrel-sim scenarios`" + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="set a field otherwise, as faults.drop=0.1 or population.0.link.loss=0.05; may be repeated",
    )


def scenario_names() -> list[str]:
    """The scenarios that are shipped, sorted."""
    return sorted(
        entry.name.removesuffix(_SUFFIX) for entry in _folder().iterdir() if entry.name.endswith(_SUFFIX)
    )


def scenario_text(name: str) -> str:
    """The TOML of a shipped scenario.

    Raises:
        RequestError: There is none of that name.
    """
    if name not in scenario_names():
        near = difflib.get_close_matches(name, scenario_names(), 1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise RequestError(
            f"there is no scenario {name!r}",
            hint=f"{guess}there are {', '.join(scenario_names())}, or give a file that ends in .toml or .json",
        )
    return (_folder() / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def load_scenario(name_or_path: str, changes: Iterable[str] = ()) -> ScenarioFile:
    """Read a scenario.

    Args:
        name_or_path: Of a shipped scenario, or a file; what ends in `.toml` or `.json` or has a separator is a file.
        changes: Fields that are set otherwise, as `faults.drop=0.1`; entries of a list by number or all by `*`.

    Raises:
        RequestError: There is no such scenario, or it says something that cannot be.
    """
    path = Path(name_or_path)
    if path.suffix in {_SUFFIX, ".json"} or len(path.parts) > 1:
        source, text = name_or_path, _read(path)
        name = path.stem
    else:
        source, text = f"scenario {name_or_path}", scenario_text(name_or_path)
        name = name_or_path
    document = _parse(source, text, is_json=path.suffix == ".json")
    document.setdefault("name", name)
    _convert(
        document, source, text
    )  # the file by itself first, so that its mistakes are not taken for changes
    for change in changes:
        _change(document, change)
        file = _convert(document, f"--set {change}", "")
    file = _convert(document, source, text)
    _check_faults(file.faults, source)
    return file


def scenario_schema() -> dict[str, Any]:
    """The JSON schema of a scenario file."""
    return msgspec.json.schema(ScenarioFile)


def split_change(change: str) -> tuple[str, str]:
    """The field and the value of a change.

    Raises:
        RequestError: It is none.
    """
    field, equals, value = change.partition("=")
    if not equals or not field:
        raise RequestError(f"{change!r} sets nothing", hint="write FIELD=VALUE, as faults.drop=0.1")
    return field, value


def _folder() -> Traversable:
    return files("simulator") / "scenarios"


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise RequestError(f"{path} is longer than {FILE_BYTES_MAX} bytes", hint="give a scenario file")
        return data.decode()
    except OSError as error:
        raise RequestError(
            f"{path}: {error.strerror}", hint="give a scenario file, or the name of one"
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: byte {error.start} is not UTF-8", hint="give a text file") from error


def _parse(source: str, text: str, *, is_json: bool) -> dict[str, Any]:
    try:
        document = json.loads(text) if is_json else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise RequestError(
            f"{source}: {error}", hint=f"correct the {'JSON' if is_json else 'TOML'}"
        ) from error
    except RecursionError as error:
        raise RequestError(f"{source} is nested too deeply", hint="give a scenario file") from error
    if not isinstance(document, dict):
        raise RequestError(f"{source} is no table of fields", hint="see whimbrel-sim scenarios --schema")
    return document


def _convert(document: dict[str, Any], source: str, text: str) -> ScenarioFile:
    try:
        return msgspec.convert(document, ScenarioFile)
    except msgspec.ValidationError as error:
        match = _WHERE.match(str(error))
        assert match is not None
        what, path = match["what"], (match["path"] or "").removeprefix(".")
        unknown = _UNKNOWN.search(what)
        if unknown is not None:
            path = f"{path}.{unknown['name']}".removeprefix(".")
        line = _line_of(text, path)
        place = f"{source}, line {line}" if line else source
        hint = _near_field(unknown["name"], path) if unknown else "see whimbrel-sim scenarios --schema"
        raise RequestError(f"{place}: {path or 'the document'}: {what}", hint=hint) from error


def _near_field(name: str, path: str) -> str:
    """What fields there are in the place of one that there is not."""
    kind: Any = msgspec.inspect.type_info(ScenarioFile)
    for step in re.findall(r"\w+", path)[:-1]:
        fields = {field.encode_name: field.type for field in getattr(kind, "fields", ())}
        kind = fields.get(step, kind)
        kind = getattr(kind, "item_type", kind)
    names = sorted(field.encode_name for field in getattr(kind, "fields", ()))
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"


def _line_of(text: str, path: str) -> int:
    """The line of a TOML text where a field is set, or the table that lacks it begins; 0 where neither is found."""
    steps = re.findall(r"[\w\-]+", path)
    tables: dict[str, int] = {}
    prefix: list[str] = []
    best, best_depth = 0, 0
    for number, line in enumerate(text.splitlines(), start=1):
        table = _TABLE.match(line)
        if table is not None:
            prefix = _place(table["name"].split("."), tables, is_array=table["open"] == "[[")
            found = prefix
        else:
            found = [*prefix, *re.split(r"\s*\.\s*", line.partition("=")[0].strip())] if "=" in line else []
        if found and len(found) > best_depth and steps[: len(found)] == found:
            best, best_depth = number, len(found)
    return best


def _place(names: Sequence[str], tables: dict[str, int], *, is_array: bool) -> list[str]:
    """The path of a table: entries of arrays with their numbers, as msgspec counts them."""
    place: list[str] = []
    for depth, name in enumerate(names):
        place.append(name)
        key = ".".join(place)
        if is_array and depth == len(names) - 1:
            tables[key] = tables.get(key, -1) + 1
        if key in tables:
            place.append(str(tables[key]))
    return place


def _change(document: dict[str, Any], change: str) -> None:
    field, text = split_change(change)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a word without quotes
    *steps, last = field.split(".")
    parents: list[Any] = [document]
    for depth, step in enumerate(steps):
        following = (*steps, last)[depth + 1]
        parents = [child for parent in parents for child in _children(parent, step, following, change)]
    for parent in parents:
        if isinstance(parent, dict):
            parent[last] = value
        else:
            for index in _indices(parent, last, change):
                parent[index] = value


def _children(parent: Any, step: str, following: str, change: str) -> list[Any]:
    """What is at a step; a table or a list that the file leaves out stands for one with nothing set."""
    if isinstance(parent, dict):
        is_list = following == "*" or following.isdecimal()
        return [parent.setdefault(step, [{}] if is_list else {})]
    return [parent[index] for index in _indices(parent, step, change)]


def _indices(parent: Any, step: str, change: str) -> list[int]:
    if not isinstance(parent, list):
        raise RequestError(f"--set {change}: there is nothing below a value at {step!r}", hint="see --schema")
    if step == "*":
        return list(range(len(parent)))
    if not step.isdecimal() or int(step) >= len(parent):
        raise RequestError(
            f"--set {change}: {step!r} is no entry", hint=f"choose 0 to {len(parent) - 1}, or * for all"
        )
    return [int(step)]


def _check_faults(faults: Faults, source: str) -> None:
    """A fault without an end of faults would never be injected, and nobody would notice."""
    nothing = Faults()
    given = [name for name in faults.__struct_fields__ if getattr(faults, name) != getattr(nothing, name)]
    if given and not faults.end_s:
        raise RequestError(
            f"{source}: faults.{given[0]} does nothing, since faults.end_s is 0",
            hint="set faults.end_s, as 1800",
        )
