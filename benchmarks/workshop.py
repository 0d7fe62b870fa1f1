"""Makes files by rules, once: what a pair is made of is kept, and a run that was stopped goes on where it was."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from protocol.errors import RequestError, StorageError

Rule = Callable[["Workshop", re.Match[str], Path], None]


class Workshop:
    """Makes files in a folder by rules, and first what they are made of.

    Args:
        cache: The folder; made when it is missing.
        rules: Patterns of whole names, and what makes such a file: it gets the workshop, for what the file is made of,
            the match, and the path to write.
        report: Takes lines about the progress.
    """

    def __init__(self, cache: Path, rules: Sequence[tuple[str, Rule]], report: Callable[[str], None]) -> None:
        self._cache = cache
        self._rules = rules
        self.report = report

    def file(self, name: str) -> Path:
        """The path of a file, which is made when it is missing.

        Raises:
            RequestError: No rule makes such a file.
            StorageError: The folder cannot be written.
        """
        path = self._cache / name
        if path.is_file():
            return path
        for pattern, rule in self._rules:
            if match := re.fullmatch(pattern, name):
                self._make(rule, match, path)
                return path
        raise RequestError(f"{name} is no file of a pair")

    def _make(self, rule: Rule, match: re.Match[str], path: Path) -> None:
        started = time.monotonic()
        # Beside the target, so that the last step is a rename: a killed run leaves no half file behind.
        part = path.with_name(f".part-{path.name}")
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            rule(self, match, part)
            part.replace(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}", hint="see --cache") from error
        finally:
            part.unlink(missing_ok=True)
        self.report(f"{path.name}: {path.stat().st_size:,} bytes, {time.monotonic() - started:.0f} s")
