"""Where pages are written."""

from pathlib import Path

from protocol.errors import StorageError

_HINT = "choose another --report"


def check_writable(path: Path) -> None:
    """Find out before a run that its page can be written.

    Raises:
        StorageError: There is no such folder, or it is one.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise StorageError(f"{path} cannot be written", hint=_HINT)


def write_page(path: Path, text: str) -> None:
    """Write a page.

    Raises:
        StorageError: The file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", hint=_HINT) from error
