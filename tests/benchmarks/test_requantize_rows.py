"""What `make bench-requantize` has to show, from files whose readings are made up."""

import msgspec
import pytest

from benchmarks.facts import FACTS, facts, facts_suite, facts_text
from benchmarks.requantize_rows import (
    GOOD,
    HELD_OUT,
    INDEPENDENT,
    NEAREST,
    Cell,
    Measured,
    Results,
    guard_lines,
    json_lines,
    lines,
    series_lines,
    table_rows,
)
from benchmarks.requantize_series import FACTS_CHOICES, Answers, Chain, Cost, Divergence, Facts, chosen_name
from benchmarks.requantize_sources import ForWhom, source_lines
from benchmarks.texts import development_text, held_out_manuals, held_out_sources, training_text
from server.requantize.rows import FROZEN, NOTHING, PLAIN, TRAP
from tests.server.requantize.readings import reading

BYTES = 90_000_000
RTN, WELL = Cell("large", NEAREST, "q4_0"), Cell("large", GOOD, "q4_0")


def measured(seed: int, share: float, nll: float, kl: float, flips: float = 0.2) -> Measured:
    readings = {text: reading(seed, nll, kl, flips) for text in HELD_OUT}
    return Measured(delta_bytes=int(share * BYTES), file_bytes=BYTES, readings=readings)


def results() -> Results:
    found = Results()
    found.files[RTN] = {
        NOTHING: measured(1, 0, 3.0, 0.4, 0.3),
        PLAIN: measured(2, 0.044, 2.7, 0.22),
        TRAP: measured(3, 0.005, 2.69, 0.1),  # good, but no choice
        "chosen, 0.1 %": measured(4, 0.001, 2.8, 0.15),  # keeps 67 %
        "chosen, 0.2 %": measured(5, 0.002, 2.71, 0.3),  # is farther from the float model
        "chosen, 0.4 %": measured(6, 0.004, 2.71, 0.15),
        "chosen, 0.7 %": measured(7, 0.007, 2.6, 0.1),
    }
    found.files[WELL] = {
        NOTHING: measured(1, 0, 3.0, 0.4, 0.3),
        PLAIN: measured(2, 0.06, 2.9, 0.22),
        INDEPENDENT: measured(8, 0.06, 2.7, 0.06),
        "chosen, 0.5 %": measured(9, 0.0049, 2.75, 0.1),
        "chosen, 1.5 %": measured(10, 0.0149, 2.74, 0.1),
    }
    return found


def test_the_requirements_are_met_by_the_smallest_file_that_keeps_enough_and_is_no_worse() -> None:
    found = lines(results())
    fewest, half, at_budget, good = found[:4]
    assert fewest.figure == pytest.approx(0.4)
    assert (fewest.at, fewest.status) == ("chosen, 0.4 %", "ok")
    assert half.figure == pytest.approx(0.7)
    assert half.at == "chosen, 0.7 %"
    assert at_budget.figure == pytest.approx(100 * 0.25 / 0.3, abs=1)
    assert at_budget.status == "ok"
    assert good.figure is None
    assert good.at == "none of 2 files reaches it"
    assert {line.status for line in found[4:]} == {"not run"}


def test_it_is_said_which_guard_a_chosen_file_did_not_pass() -> None:
    found = guard_lines(results(), RTN)
    farther = [line for line in found if line.startswith("chosen, 0.2 %: ")]
    assert [line.split(" failed")[0] for line in farther if "divergence" in line] == [
        f"chosen, 0.2 %: {text}: divergence" for text in HELD_OUT
    ]
    assert not any(PLAIN in line.split(":")[0] or TRAP in line.split(":")[0] for line in found)
    assert not any("divergence" in line for line in found if line.startswith("chosen, 0.4 %"))
    alone = results()
    del alone.files[RTN][PLAIN]
    assert guard_lines(alone, RTN) == []


def test_series_and_peers_fill_their_lines() -> None:
    found = results()
    cell = Cell("large", NEAREST, "q8_0")
    found.files[cell] = found.files[RTN]
    found.peers[cell] = 3_600_000
    found.chain = Chain(
        last=Divergence(kl={"sources": 0.12, "manuals": 0.11}),
        fresh=Divergence(kl={"sources": 0.1, "manuals": 0.1}),
        plain=Divergence(kl={"sources": 0.25, "manuals": 0.2}),
        delta_bytes=(400_000, 390_000),
        file_bytes=91_000_000,
    )
    files = [(NOTHING, 0, 0, 0), (PLAIN, 5_000_000, 80, 80), (FROZEN, 2_000_000, 70, 69)]
    files += [(chosen_name(*choice), 400_000, 82, 78) for choice in FACTS_CHOICES]
    found.facts = Facts(
        count=100,
        reference=98,
        files=tuple(
            Answers(name=name, delta_bytes=size, right=right, kept=kept) for name, size, right, kept in files
        ),
        file_bytes=100_000_000,
    )
    found.cost = Cost(wall_s=600.0, cpu_s=900.0, peak_bytes=1_500_000_000)
    by_name = {line.what.strip(): line for line in lines(found)}
    assert by_name["nearest, Q8_0: of the best peer's bytes"].figure == pytest.approx(0.1)
    assert by_name["ten updates: divergence, of a fresh file's"].figure == pytest.approx(1.15)
    assert by_name["narrow task: answers kept, % of plain's"].figure == pytest.approx(97.5)
    assert by_name["narrow task: answers kept, % of plain's"].status == "ok"
    assert by_name["whole command, min"].figure == 10
    assert by_name["its memory, GB"].status == "aim"
    said = "\n".join(series_lines(found))
    assert "400,000, 390,000; of a file 91,000,000" in said
    assert "last file on manuals: 0.1100; of a fresh one 0.1000, of plain 0.2000" in said
    assert "plain, embedding frozen 2,000,000 2.000 70 69" in " ".join(said.split())
    assert "the new model in floats: 98 right" in said


def test_tables_and_lines_hold_every_file_and_say_what_it_is_beside_plain() -> None:
    found = results()
    names = [each.name for each in table_rows(found, WELL)]
    assert names == [NOTHING, PLAIN, INDEPENDENT, "chosen, 0.5 %", "chosen, 1.5 %"]
    written = [msgspec.json.decode(msgspec.json.encode(line)) for line in json_lines(found)]
    assert len(written) == sum(len(files) for files in found.files.values())
    trap = next(line for line in written if line["name"] == TRAP)
    assert trap["beside_plain"]["sources"]["kl"]["high"] < 0


def test_texts_share_nothing_with_what_is_trained_on() -> None:
    trained = training_text()
    parts = [development_text(), held_out_sources(), held_out_manuals()]
    for number, part in enumerate(parts):
        assert len(part) > 50_000
        for other in (trained, *parts[:number]):
            lines_in_common = {line for line in part.splitlines() if len(line) > 100} & set(
                other.splitlines()
            )
            assert not lines_in_common


def test_made_up_facts_are_all_different_and_all_in_the_text() -> None:
    known = facts()
    text = facts_text()
    assert len({completion.split()[-1] for _, completion in known}) == FACTS
    assert all(prompt + completion in text for prompt, completion in known)
    suite = facts_suite()
    assert len(suite.items) == len({item.name for item in suite.items}) == FACTS
    assert suite.items[0].is_exact


def test_a_file_for_two_versions_stands_beside_those_for_one() -> None:
    found = {
        ("b", "a"): (
            ForWhom(chosen_for=(), sizes=(3000, 4000)),
            ForWhom(chosen_for=("b", "a"), sizes=(1000, 2000), objective=0.125),
        )
    }
    lines = "\n".join(source_lines(found)).splitlines()
    assert lines[1].split("  ")[0] == "new v2_large"
    assert "to b, 70 %, bytes" in lines[1]
    assert lines[2].split() == ["plain", "3,000", "4,000", "3,300", "-"]
    assert lines[3].split() == ["chosen", "for", "b", "and", "a", "1,000", "2,000", "1,300", "0.1250"]
    assert source_lines({}) == []
