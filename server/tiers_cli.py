"""`whimbrel tiers list | show | check`: kinds of devices, and which releases they have room for."""

import argparse
from collections.abc import Iterator
from typing import Any

import msgspec

from protocol.errors import RequestError
from server import operations
from server.config import read_config
from server.display import Printer, table
from server.home import opened
from server.tiers.files import TIERS_FOLDER, Tier, read_tiers
from server.tiers.fit import Fit
from server.tiers.judging import judge_release


def add_parser(commands: Any, common: argparse.ArgumentParser, show: Printer) -> None:
    """Register `tiers` with its actions.

    Args:
        commands: Of the `whimbrel` command.
        common: Options of the commands that work on a server's folder.
        show: Prints a value or lines.
    """
    tiers = commands.add_parser("tiers", help="show hardware tiers, and whether a release fits them")
    actions = tiers.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", parents=[common], help="list the tiers of this server")
    listing.set_defaults(run=lambda arguments: _list(arguments, show))
    one = actions.add_parser("show", parents=[common], help="show one tier")
    one.add_argument("tier", metavar="TIER")
    one.set_defaults(run=lambda arguments: _show(arguments, show))
    check = actions.add_parser(
        "check", parents=[common], help="say which tiers a release fits, and what would fit"
    )
    check.add_argument("family", metavar="FAMILY")
    check.add_argument("version", metavar="VERSION", help="of a draft or a published release")
    check.set_defaults(run=lambda arguments: _check(arguments, show))


def fit_lines(fits: list[Fit]) -> Iterator[str]:
    """Every tier with its numbers; what breaks, and what would fit."""
    rows = [
        [
            each.tier,
            "fits" if each.is_good else "refused",
            f"{_megabytes(each.model_bytes)} {each.source}",
            _megabytes(each.swap_bytes),
            _megabytes(each.disk_bytes),
            "-" if each.token_ms is None else f"{each.token_ms:.1f} ms",
        ]
        for each in fits
    ]
    yield from table(["TIER", "", "MODEL", "IN THE SWAP", "DISK", "A TOKEN"], rows)
    yield from refusal_lines(fits)


def refusal_lines(fits: list[Fit]) -> Iterator[str]:
    """What breaks in the tiers that a release is refused for, and what would fit."""
    for each in fits:
        for broken in each.broken:
            yield f"Refused for {each.tier}: {broken.detail}"
        if each.would_fit:
            yield f"  would fit: {'; '.join(each.would_fit)}"


def added_lines(arguments: argparse.Namespace, tiers: list[str]) -> Iterator[str]:
    """What became of the tiers of a release that was just added."""
    fits = _fits(arguments)
    wanted = [
        each for each in fits if each.tier in tiers or not arguments.tier or each.tier in arguments.tier
    ]
    if fits:
        yield f"For tier {', '.join(tiers)}"
        yield from refusal_lines([each for each in wanted if not each.is_good])


def _list(arguments: argparse.Namespace, show: Printer) -> int:
    tiers = read_tiers(read_config(arguments.dir).folder)
    rows = [
        [name, tier.runtime, f"{tier.memory_mb} MB", f"{tier.disk_mb} MB", _speed(tier), _objective(tier)]
        for name, tier in tiers.items()
    ]
    lines = table(["TIER", "RUNTIME", "MEMORY", "DISK", "COMPUTE", "OBJECTIVE"], rows)
    nothing = f"No tier yet: write {arguments.dir / TIERS_FOLDER}/NAME.toml (docs/tiers.md)"
    show(arguments, msgspec.to_builtins(tiers), lines or [nothing])
    return 0


def _show(arguments: argparse.Namespace, show: Printer) -> int:
    tiers = read_tiers(read_config(arguments.dir).folder)
    tier = tiers.get(arguments.tier)
    if tier is None:
        known = (
            f"known are {', '.join(tiers)[:200]}"
            if tiers
            else f"write {arguments.dir / TIERS_FOLDER}/NAME.toml"
        )
        raise RequestError(f"there is no tier {arguments.tier[:64]!r}", hint=known)
    value = msgspec.to_builtins(tier)
    lines = [f"{name:<16} {each}" for name, each in value.items() if name != "measured" and each is not None]
    lines += [
        f"{'measured':<16} {each.sha256[:16]}: "
        + ", ".join(
            part
            for part in (
                f"{each.memory_mb} MB" if each.memory_mb else "",
                f"{each.tokens_per_s:g} tokens/s" if each.tokens_per_s else "",
            )
            if part
        )
        for each in tier.measured
    ]
    show(arguments, value, lines)
    return 0


def _check(arguments: argparse.Namespace, show: Printer) -> int:
    fits = _fits(arguments)
    value = [{**msgspec.to_builtins(each), "fits": each.is_good} for each in fits]
    nothing = f"No tier of this runtime: write {arguments.dir / TIERS_FOLDER}/NAME.toml (docs/tiers.md)"
    show(arguments, value, list(fit_lines(fits)) or [nothing])
    return 0


def _fits(arguments: argparse.Namespace) -> list[Fit]:
    release = operations.show_release(arguments.dir, arguments.family, arguments.version).record.release
    with opened(arguments.dir) as home:
        return judge_release(home, release)


def _megabytes(count: int) -> str:
    """As tiers have them: 2**20 bytes."""
    return f"{count / (1 << 20):.1f} MB"


def _speed(tier: Tier) -> str:
    measured = f"{len(tier.measured)} measured" if tier.measured else ""
    modelled = f"{tier.memory_gb_per_s:g} GB/s" if tier.memory_gb_per_s else ""
    return ", ".join(part for part in (modelled, measured) if part) or "-"


def _objective(tier: Tier) -> str:
    return f"{tier.token_ms_max:g} ms a token" if tier.token_ms_max else "-"
