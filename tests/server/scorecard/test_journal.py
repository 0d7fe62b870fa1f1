from pathlib import Path

import pytest

from protocol.errors import RequestError
from protocol.ids import digest_of
from server.scorecard.items import Reply
from server.scorecard.journal import Journal, journal

NAME = digest_of(b"a model")


def _reply(label: int) -> Reply:
    return Reply(label=label, scores=(0.1 + label, float("-inf")) if label == 99 else (0.1 + label,))


def _written(folder: Path, count: int) -> Path:
    with journal(folder, NAME, {"files": []}) as kept:
        for number in range(count):
            kept.put(f"reply:{number}", _reply(number))
    return folder / f"{NAME}.jsonl"


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    _written(tmp_path, 3)
    with journal(tmp_path, NAME, {}) as kept:
        assert [kept.get(f"reply:{number}", Reply) for number in range(4)] == [*map(_reply, range(3)), None]


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_line_that_a_kill_has_torn_is_measured_again_and_no_other(tmp_path: Path, cut: int) -> None:
    path = _written(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-cut])
    torn = Journal(path, {})
    assert torn.get("reply:1", Reply) == _reply(1)
    assert torn.get("reply:2", Reply) is None or cut == 1
    torn.put("reply:2", _reply(2))
    torn.close()
    again = Journal(path, {})
    assert [again.get(f"reply:{number}", Reply) for number in range(3)] == list(map(_reply, range(3)))
    again.close()


def test_a_line_with_another_answer_than_was_written_is_not_believed(tmp_path: Path) -> None:
    path = _written(tmp_path, 3)
    data = path.read_bytes()
    assert data.count(b'"label":1') == 1
    path.write_bytes(data.replace(b'"label":1', b'"label":2'))
    with journal(tmp_path, NAME, {}) as kept:
        assert kept.get("reply:1", Reply) is None
        assert kept.get("reply:2", Reply) == _reply(2)


def test_two_processes_do_not_measure_the_same(tmp_path: Path) -> None:
    with (
        journal(tmp_path, NAME, {}),
        pytest.raises(RequestError, match="another `whimbrel score`"),
        journal(tmp_path, NAME, {}),
    ):
        pass
