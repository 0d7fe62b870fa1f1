"""Two runs beside each other: what differs in what matters, by how much, and whether the second is worse."""

from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from protocol.errors import RequestError
from simulator.figures import Figures, figures_of
from simulator.fleet import run_fleet
from simulator.results import FleetResult
from simulator.scenario_files import load_scenario

RESULT_BYTES_MAX: Final = 1 << 30
"""A million devices take some tens of megabytes."""

MORE_IS_BETTER: Final = frozenset({"committed"})
NEUTRAL: Final = frozenset({"virtual_s", "faults", "events", "trace_digest"})
"""Figures that are neither good nor bad by themselves."""


class Difference(Struct, frozen=True, kw_only=True):
    """One figure of two runs."""

    figure: str
    before: float | str | None
    after: float | str | None
    ratio: float | None  # after / before, where both are numbers and the first is not 0
    is_worse: bool


def load_figures(name_or_path: str) -> Figures:
    """The figures of a result that was printed with `--json`, or of a scenario, which is run now.

    Raises:
        RequestError: It is neither.
    """
    path = Path(name_or_path)
    if path.suffix == ".json":
        result = _result_in(path)
        if result is not None:
            return figures_of(result)
    return figures_of(run_fleet(load_scenario(name_or_path).scenario))


def compare(before: Figures, after: Figures, tolerance: float) -> list[Difference]:
    """Compare figure by figure.

    Args:
        before: What is compared with.
        after: What is compared.
        tolerance: A figure is worse if it is so by more than this part.
    """
    old, new = asdict(before), asdict(after)
    return [_difference(name, old[name], new[name], tolerance) for name in old]


def _difference(
    name: str, before: float | str | None, after: float | str | None, tolerance: float
) -> Difference:
    ratio = None
    if isinstance(before, float | int) and isinstance(after, float | int):
        ratio = after / before if before else None
        low, high = (after, before) if name in MORE_IS_BETTER else (before, after)
        is_worse = high > low * (1 + tolerance)
    else:  # a failure that was none before, or a share of the fleet that is not reached any more
        is_worse = (after != "" and before == "") or (after is None and before is not None)
    return Difference(
        figure=name, before=before, after=after, ratio=ratio, is_worse=is_worse and name not in NEUTRAL
    )


def _result_in(path: Path) -> FleetResult | None:
    """The result that a file holds; None if it holds something else, as a scenario."""
    try:
        if path.stat().st_size > RESULT_BYTES_MAX:
            raise RequestError(f"{path} is longer than {RESULT_BYTES_MAX} bytes", hint="give a result")
        data = path.read_bytes()
        if "trace_digest" not in msgspec.json.decode(data, type=dict[str, msgspec.Raw]):
            return None
        return msgspec.json.decode(data, type=FleetResult)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}", hint="give a result or a scenario") from error
    except msgspec.ValidationError as error:
        raise RequestError(f"{path}: {error}", hint="print the result anew with this version") from error
    except msgspec.DecodeError as error:
        raise RequestError(
            f"{path}: {error}", hint="give a result printed with --json, or a scenario"
        ) from error
