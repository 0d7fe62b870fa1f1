"""What beats what: only what the intervals say for certain, and never everything at once."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.scorecard.statistics import Interval, paired, wilson
from server.tradeoffs.dominance import Contender, beaten, compare, known_axes
from server.tradeoffs.records import Axis, Candidate, Drift, Figure, Margins, Suite
from server.tradeoffs.standing import flips_between

AXES: list[Axis] = ["accuracy", "drift", "latency", "memory", "bytes"]
QUESTIONS = 2_000


def suite(right: int, gained: int, lost: int, count: int = QUESTIONS, **changes: Any) -> Suite:
    fields = {
        "name": "mmlu",
        "kind": "mmlu",
        "count": count,
        "right": right,
        "accuracy": wilson(right, count),
        "change": paired(gained, lost, count),
        "question_set": "q",
    }
    return Suite(**{**fields, **changes})


def candidate(version: str, suites: list[Suite], kl: tuple[float, float] | None, **changes: Any) -> Candidate:
    fields = {"is_reference": False, "standing": "scored", "reason": "", "remedy": "", "verdict": "passed"}
    drift = None
    if kl is not None:
        mean = Interval(value=sum(kl) / 2, low=kl[0], high=kl[1])
        drift = Drift(mean=mean, same_choice=0.9, positions=100)
    return Candidate(
        version=version,
        scorecard_sha256="",
        size_bytes=1,
        suites=suites,
        drift=drift,
        **{**fields, **changes},
    )


def contender(
    version: str, gained: int = 0, lost: int = 0, kl: tuple[float, float] = (0.1, 0.1), **figures: Any
) -> Contender:
    """One whose memory and bytes are 10 each, if nothing else is said."""
    known: dict[Axis, Figure] = {
        "memory": Figure.exact(figures.get("memory", 10.0), "modelled"),
        "bytes": Figure.exact(figures.get("bytes", 10.0), "air"),
    }
    if "latency" in figures:
        known["latency"] = figures["latency"]
    return Contender(
        candidate=candidate(version, [suite(1000 + gained - lost, gained, lost)], kl), figures=known
    )


def beats(one: Contender, other: Contender, **margins: float) -> bool:
    axes = known_axes([one, other], AXES)
    return bool(beaten([one, other], axes, Margins(**margins))[1].surely)


def test_what_is_smaller_and_no_worse_beats() -> None:
    assert beats(contender("a", memory=9.0), contender("b"))
    assert not beats(contender("b"), contender("a", memory=9.0))
    assert not beats(contender("a", memory=9.0, bytes=11.0), contender("b"))
    assert not beats(contender("a"), contender("b"))


def test_a_difference_in_answers_counts_only_where_the_whole_interval_is_beyond_the_margin() -> None:
    # Of 2,000 questions: 50 gained for 20 lost are 1.5 points, 0.7 to 2.3; 66 for 64 are chance.
    more, as_many, reference = contender("a", 50, 20), contender("b", 66, 64), contender("r")
    assert beats(more, reference, accuracy=0.005)
    assert not beats(more, reference, accuracy=0.01)
    assert not beats(as_many, reference, accuracy=0)
    found = [compare("accuracy", more, reference, Margins(accuracy=margin)) for margin in (0.005, 0.01, 0.03)]
    assert found == ["better", "same", "same"]
    found = [compare("accuracy", reference, more, Margins(accuracy=margin)) for margin in (0.005, 0.01, 0.03)]
    assert found == ["worse", "undecided", "same"]


def test_what_the_questions_do_not_decide_keeps_a_version_among_the_best_and_is_named() -> None:
    few = [
        Contender(
            candidate=candidate(version, [suite(8, 0, 0, count=28)], (0.1, 0.1)),
            figures={"bytes": Figure.exact(size, "air")},
        )
        for version, size in (("small", 9.0), ("large", 10.0))
    ]
    small, large = beaten(few, ["accuracy", "drift", "bytes"], Margins())
    assert small.surely == small.perhaps == large.surely == []
    ((rival),) = large.perhaps
    assert (rival.version, rival.better, rival.undecided) == ("small", ["bytes"], ["accuracy"])


def test_drift_is_worse_only_where_the_intervals_do_not_touch() -> None:
    near, far = contender("near", kl=(0.003, 0.006)), contender("far", kl=(0.24, 0.36), bytes=9.0)
    assert compare("drift", near, far, Margins()) == "better"
    assert compare("drift", far, near, Margins()) == "worse"
    wide = contender("wide", kl=(0.004, 0.3))
    assert compare("drift", wide, near, Margins()) == "undecided"
    assert compare("drift", near, wide, Margins()) == "same"
    assert beats(contender("small", kl=(0.003, 0.006), memory=9.0), contender("reference", kl=(0.0, 0.0)))


def test_figures_of_different_origin_are_not_compared() -> None:
    measured = contender("m", latency=Figure.exact(30.0, "measured on pi"))
    modelled = contender("f", latency=Figure.exact(20.0, "modelled"))
    assert compare("latency", measured, modelled, Margins()) == "undecided"
    assert compare("latency", contender("n"), modelled, Margins()) == "undecided"


def test_a_measured_latency_has_a_margin_and_one_without_bounds_decides_nothing() -> None:
    def timed(low: float | None, value: float, high: float | None) -> Contender:
        return contender("t", latency=Figure(value=value, low=low, high=high, basis="here"))

    assert compare("latency", timed(19, 20, 21), timed(20, 21, 22), Margins()) == "same"
    assert compare("latency", timed(19, 20, 21), timed(18, 18.5, 19), Margins()) == "undecided"
    assert compare("latency", timed(30, 31, 32), timed(18, 18.5, 19), Margins()) == "worse"
    assert compare("latency", timed(19, 20, None), timed(30, 31, 32), Margins()) == "undecided"


def test_an_axis_of_which_nothing_is_known_is_left_out() -> None:
    assert known_axes([contender("a"), contender("b")], AXES) == ["accuracy", "drift", "memory", "bytes"]
    silent = Contender(candidate=candidate("s", [], None), figures={"bytes": Figure.exact(1.0, "air")})
    assert known_axes([silent], AXES) == ["bytes"]


def test_versions_that_beat_each_other_in_a_circle_all_stay() -> None:
    def timed(low: float, high: float) -> Figure:
        return Figure(value=(low + high) / 2, low=low, high=high, basis="here")

    # a drifts less than b, b answers better than c, c is faster than a; where each is behind the next one, it is within the margins.
    ring = [
        contender("a", 0, 0, kl=(0.0, 0.0), latency=timed(20.0, 20.0)),
        contender("b", 100, 0, kl=(0.02, 0.02), latency=timed(15.0, 15.2)),
        contender("c", 0, 100, kl=(0.01, 0.01), latency=timed(10.0, 10.2)),
    ]
    margins = Margins(accuracy=0.07, drift=0.015, latency=0.4)
    for one, other, axis in ((0, 1, "drift"), (1, 2, "accuracy"), (2, 0, "latency")):
        pair = beaten([ring[one], ring[other]], AXES, margins)
        assert [rival.better for rival in pair[1].surely] == [[axis]]
    assert all(not each.surely for each in beaten(ring, AXES, margins))


_ENDS = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda ends: (min(ends), max(ends)))


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 60), _ENDS, st.integers(1, 3), st.integers(1, 3)),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 0.2),
)
def test_something_is_always_left_and_what_is_out_was_beaten_by_what_beats_it(
    drawn: list[tuple[int, int, tuple[float, float], int, int]], margin: float
) -> None:
    contenders = [
        contender(str(index), gained, lost, kl, memory=float(memory), bytes=float(size))
        for index, (gained, lost, kl, memory, size) in enumerate(drawn)
    ]
    axes = known_axes(contenders, AXES)
    margins = Margins(accuracy=margin, drift=margin)
    found = beaten(contenders, axes, margins)
    assert not all(each.surely for each in found)
    for index, each in enumerate(found):
        for rival in each.surely:
            outcomes = [
                compare(axis, contenders[int(rival.version)], contenders[index], margins) for axis in axes
            ]
            assert set(outcomes) <= {"better", "same"}
            assert "better" in outcomes


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_flips_by_way_of_the_reference_bound_those_between_two_versions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, one, other = (rng.random(200) < 0.5 for _ in range(3))

    def against(answers: Any, version: str) -> Candidate:
        gained, lost = int((answers & ~reference).sum()), int((reference & ~answers).sum())
        return candidate(version, [suite(int(answers.sum()), gained, lost, count=200)], None)

    found = flips_between(against(one, "one"), against(other, "other"))["mmlu"]
    truth = paired(int((one & ~other).sum()), int((other & ~one).sum()), 200)
    assert found.difference.value == truth.difference.value
    assert (found.gained, found.lost) >= (truth.gained, truth.lost)
    assert found.difference.low <= truth.difference.low
    assert found.difference.high >= truth.difference.high
    assert found.p_value >= truth.p_value - 1e-9
    base = candidate("r", [suite(int(reference.sum()), 0, 0, count=200)], None, is_reference=True)
    direct = flips_between(against(one, "one"), base)["mmlu"]
    assert (direct.gained, direct.lost) == (int((one & ~reference).sum()), int((reference & ~one).sum()))


def test_other_questions_and_prompts_are_not_compared() -> None:
    one = candidate("one", [suite(1000, 5, 5)], None)
    assert flips_between(one, candidate("two", [suite(1000, 5, 5, question_set="other")], None)) == {}
    assert flips_between(one, candidate("two", [suite(1000, 5, 5, change=None)], None)) == {}
    golden = candidate("g", [suite(10, 0, 0, count=12, kind="golden")], None)
    assert flips_between(golden, golden) == {}


def test_with_exact_figures_alone_the_set_is_that_of_pareto() -> None:
    sizes = (1.0, 2.0, 3.0)
    grid = [contender(f"{memory} {size}", memory=memory, bytes=size) for memory in sizes for size in sizes]
    found = beaten(grid, ["memory", "bytes"], Margins())
    assert [each.candidate.version for each, by in zip(grid, found, strict=True) if not by.surely] == [
        "1.0 1.0"
    ]
    falling = [contender(f"{size}", memory=4 - size, bytes=size) for size in sizes]
    assert all(not each.surely for each in beaten(falling, ["memory", "bytes"], Margins()))
