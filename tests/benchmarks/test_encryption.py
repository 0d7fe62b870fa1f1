from pathlib import Path

from benchmarks.encryption import measured


def test_every_figure_is_there_both_ways(tmp_path: Path) -> None:
    rows = measured(tmp_path, 1 << 20, 1)
    assert len(rows) == 5
    assert all(secret > 0 for _, secret in rows.values())
    assert sum(plain > 0 for plain, _ in rows.values()) == 3  # of keys there is no other way
