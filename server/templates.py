"""Reports as pages of their own: one file, nothing from outside, light and dark. The only importer of jinja2 in the server."""

from functools import lru_cache
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

_FOLDER: Final = Path(__file__).parent


def template(name: str) -> Template:
    """A template by its path in this package; what is filled in is escaped, and what is not there is an error."""
    return _environment().get_template(name)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(_FOLDER))
