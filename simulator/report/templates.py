"""The templates of the pages; the only importer of jinja2 in the simulator."""

from functools import lru_cache
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_FOLDER: Final = Path(__file__).parent


def render(name: str, **values: object) -> str:
    """The text of a template; every value is escaped unless it is `Markup`."""
    return _environment().get_template(name).render(values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(_FOLDER))
