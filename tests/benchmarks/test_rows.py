import json

from benchmarks.acceptance import lines, report
from benchmarks.rows import Cost, Estimate, Results, Row, json_line, parse_line, table


def row(
    method: str, length: int | None, pair: str = "large.q4_0", cpu_s: float = 2.0, peak: int = 10**8
) -> Row:
    cost = Cost(cpu_s, cpu_s + 0.1, 2 * cpu_s, peak) if length is not None else None
    error = "" if length is not None else "not installed: pip install it"
    return Row(pair, method, "1.0", "b" * 64, "n" * 64, 10**7, length, cost, cost, error)


def results(*rows: Row) -> Results:
    return Results(list(rows), {"large.q4_0": Estimate(400_000, 250_000)})


def test_the_best_peer_is_the_smallest_that_is_not_ours() -> None:
    found = results(row("small", 300), row("fast", 350), row("bsdiff4", 600), row("xz", 900))
    best = found.best_peer("large.q4_0")
    assert best is not None
    assert best.method == "bsdiff4"
    assert found.ratio_to_best_peer(found.rows[0]) == 0.5


def test_without_a_peer_there_is_no_ratio() -> None:
    found = results(row("small", 300), row("bsdiff4", None))
    assert found.ratio_to_best_peer(found.rows[0]) is None


def test_a_json_line_holds_the_row_and_what_follows_from_it() -> None:
    found = results(row("small", 300_000), row("bsdiff4", 600_000))
    line = json.loads(json_line(found, found.rows[0]))
    assert line["patch_bytes"] == 300_000
    assert line["share"] == 0.03
    assert line["ratio_to_best_peer"] == 0.5
    assert line["floor_bytes"] == 250_000
    assert line["apply_mb_s"] == 5.0


def test_a_row_comes_back_from_its_line() -> None:
    for each in (row("small", 300), row("xz", None)):
        found = results(each)
        assert parse_line(json_line(found, each)) == (each, found.estimates[each.pair])


def test_the_table_names_a_peer_that_is_not_installed() -> None:
    text = table(results(row("small", 300_000), row("hdiffpatch", None)))
    assert "hdiffpatch  not installed: pip install it" in text
    small = next(line for line in text.splitlines() if "small" in line)
    assert "300,000" in small
    assert "1.200" in small  # of the floor


def test_a_requirement_is_judged_by_the_worst_of_its_pairs() -> None:
    found = Results([row("small", 520), row("bsdiff4", 1000), row("small", 560, "large.q4_k_m")])
    found.rows.append(row("bsdiff4", 1000, "large.q4_k_m"))
    line = lines(found)[0]
    assert (line.figure, line.at, line.status) == (0.56, "large.q4_k_m", "short")


def test_a_requirement_says_which_bound_it_reaches() -> None:
    for length, status in ((500, "aim"), (540, "ok"), (551, "short")):
        line = lines(results(row("small", length), row("bsdiff4", 1000)))[0]
        assert line.status == status
        assert "without 1 of 2 pairs" in line.at


def test_a_speed_must_be_reached_from_above() -> None:
    for cpu_s, status in ((0.5, "aim"), (1.5, "ok"), (2.0, "short")):
        found = results(row("small", 500, cpu_s=cpu_s))
        line = next(line for line in lines(found) if line.what == "small, apply of full fine-tune Q4_0")
        assert line.status == status


def test_a_requirement_without_a_figure_was_not_run() -> None:
    assert {line.status for line in lines(Results())} == {"not run"}
    assert "not run" in report(Results())
