"""`whimbrel verify FILE`: why a file may run on devices, or why not: every signature from its digest up to the root."""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from server import operations
from server.display import bytes_text
from server.releases.chain import Chain
from server.releases.metadata import KeyInfo, Standing


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `verify` to the commands of `whimbrel`."""
    verify = commands.add_parser(
        "verify",
        parents=[common],
        help="show every signature between a file and the root; 1 if it may not run",
    )
    verify.add_argument("file", metavar="FILE", type=Path, help="for example a model")
    verify.add_argument(
        "--root", type=Path, metavar="ROOT", help="what devices start from (default: the first root)"
    )
    verify.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    chain = operations.explain_file(arguments.dir, arguments.file, arguments.root)
    value = msgspec.to_builtins(chain) | {"may_run": chain.may_run}
    lines = [str(arguments.file), *_lines(chain)]
    print(json.dumps(value) if arguments.json else "\n".join(lines))  # noqa: T201 - a command line prints
    return 0 if chain.may_run else 1


def _lines(chain: Chain) -> list[str]:
    lines = [f"  SHA-256 {chain.sha256}, {bytes_text(chain.length)}", ""]
    lines += [f"  {listing.what}: {listing.path}, listed by {listing.role}" for listing in chain.listings]
    if chain.listings:
        lines.append("")
    for step in chain.steps:
        lines += _step_lines(step.standing, f"role of {step.delegated_by}")
    for standing in chain.roots:
        words = "devices start here" if standing.version == chain.start else "follows the one before"
        if standing.version < chain.start:
            words = "before devices start"
        lines += _step_lines(standing, words)
    verdict = "A device that starts from root"
    if chain.may_run:
        return [*lines, "", f"{verdict} {chain.start} runs this file."]
    return [*lines, "", f"{verdict} {chain.start} does not run this file: {chain.refusal}."]


def _step_lines(standing: Standing, words: str) -> list[str]:
    until = datetime.fromtimestamp(standing.expires_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    lacks = f", LACKS {standing.missing}" if standing.missing else ""
    return [
        f"  {standing.role} version {standing.version}, until {until}, {words}",
        f"    signed by {_names(standing.signed)}; {standing.threshold} needed{lacks}"
        + (f"; not by {_names(standing.unsigned)}" if standing.unsigned else ""),
    ]


def _names(keys: tuple[KeyInfo, ...]) -> str:
    return ", ".join(f"{key.name} ({key.keyid[:8]})" for key in keys) or "nobody"
