"""The commands of docs/keys.md, by section, and what runs them: each test that follows the runbook reads it from here."""

import os
import re
import shlex
from pathlib import Path
from typing import Final

from server.cli import main

RUNBOOK: Final = Path(__file__).parents[2] / "docs/keys.md"


def sections() -> dict[str, list[str]]:
    """Command lines by the heading that they stand under, in the order of the page."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", RUNBOOK.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```sh\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines() if line]
        if lines:
            found[part.partition("\n")[0]] = lines
    return found


def run_line(line: str) -> None:
    """Do what a line says, in the working folder, as the shell of an operator would.

    Raises:
        AssertionError: The command ended with another code than 0, or the page has one that is not known here.
    """
    program, *words = shlex.split(line)
    match program:
        case "whimbrel":
            assert main(words) == 0, line
        case "export":
            name, _, value = words[0].partition("=")
            os.environ[name] = value
        case "rm":
            for name in words:
                Path(name).unlink()
        case _:
            raise AssertionError(f"{RUNBOOK} runs {program}")
