"""Every state under every fault, cell by cell, and the table of it in the documents."""

from pathlib import Path

import pytest

from device.conclusion import Conclusion
from device.states import State
from device.update import Update
from tests.device.fault_matrix import ROWS, BrokenError, Fault, Row, cell, rendered, run

DOCUMENT = Path(__file__).parents[2] / "docs" / "durability.md"


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_device_lives_through_any_fault_in_any_state(row: Row, fault: Fault) -> None:
    assert cell(row, fault)


def test_every_state_is_in_the_table() -> None:
    assert {row.state for row in ROWS if not row.in_place} == set(State)


def test_the_table_in_the_document_is_what_devices_do() -> None:
    document = DOCUMENT.read_text()
    assert rendered(document) == document, "`make fault-matrix` brings it up to date"


def test_a_release_that_is_blamed_for_a_failing_disk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    swap_failed = Conclusion.swap_failed
    monkeypatch.setattr(Conclusion, "swap_failed", lambda own, _code: swap_failed(own, "engine.failed"))
    with pytest.raises(BrokenError, match="quarantined"):
        run(Row(State.COMMITTING), Fault.FAILING)


def test_a_device_that_lets_go_of_its_model_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Update, "_ask_measurement", lambda update: update._serving.let_go())
    with pytest.raises(BrokenError, match="nothing answers in state verifying"):
        run(Row(State.INSTALLING), Fault.KILL)
