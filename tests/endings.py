"""How the commands under tests/ end that let real agents and servers live in a folder of their own, such as `python -m tests.kill`."""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from protocol.errors import WhimbrelError

_Outcome = TypeVar("_Outcome")


def run_in_folder(
    name: str,
    work: Callable[[Path], _Outcome],
    is_good: Callable[[_Outcome], bool],
    text: Callable[[_Outcome], str],
) -> int:
    """Do the work in a new folder and print what came of it. The folder is removed if all was well, and else named on the error output.

    Args:
        name: Of the command, as its errors begin.
        work: Gets the folder.
        is_good: Whether nothing was wrong.
        text: What is printed.

    Returns:
        The exit code: 1 when something was wrong, or the work could not be done.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"whimbrel-{name.replace(' ', '-')}-"))
    is_kept = True
    try:
        outcome = work(folder)
        is_kept = not is_good(outcome)
    except WhimbrelError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 1
    finally:
        if is_kept:
            sys.stderr.write(f"what was left behind is in {folder}\n")
        else:
            shutil.rmtree(folder)
    sys.stdout.write(text(outcome))
    return 1 if is_kept else 0
