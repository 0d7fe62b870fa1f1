"""The real models of the demo, built once."""

from pathlib import Path

import pytest

from simulator.live.models import build_digits


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    build_digits(folder, 1, lambda _line: None)
    return folder
