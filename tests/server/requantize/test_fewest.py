"""The fewest bytes, on curves whose answer is known."""

import pytest

from server.requantize.fewest import RATIO, Trial, fewest_bytes

LOW, HIGH = 20_000, 4_000_000


class Curve:
    """Files that are good enough from some bytes on, by extrapolation; a file uses a part of its budget."""

    def __init__(self, needed: dict[float, int], used: float = 0.98) -> None:
        self.needed = needed
        self.used = used
        self.tried: list[tuple[int, float]] = []

    def __call__(self, budget: int, extrapolation: float) -> Trial:
        assert LOW <= budget <= HIGH
        self.tried.append((budget, extrapolation))
        size = int(budget * self.used)
        return Trial(budget, extrapolation, size, is_enough=size >= self.needed[extrapolation])


@pytest.mark.parametrize("needed", [25_000, 70_001, 186_000, 667_000, 3_000_000])
def test_the_search_ends_near_the_fewest_bytes_that_are_enough(needed: int) -> None:
    curve = Curve({0.0: needed})
    found = fewest_bytes(curve, LOW, HIGH)
    assert found is not None
    assert found.is_enough
    assert needed <= found.delta_bytes <= needed * RATIO * 1.1
    assert len(curve.tried) <= 9


def test_where_not_even_the_largest_budget_is_enough_there_is_nothing() -> None:
    curve = Curve({0.0: HIGH * 2})
    assert fewest_bytes(curve, LOW, HIGH) is None
    assert curve.tried[-1][0] == HIGH  # it was tried


def test_the_largest_budget_is_found_where_only_that_is_enough() -> None:
    found = fewest_bytes(Curve({0.0: int(HIGH * 0.97)}), LOW, HIGH)
    assert found is not None
    assert found.budget_bytes == HIGH


def test_a_better_setting_is_taken_and_a_worse_one_costs_one_trial() -> None:
    better = Curve({0.0: 400_000, 0.5: 100_000, 1.0: 350_000})
    found = fewest_bytes(better, LOW, HIGH, (0.0, 0.5, 1.0))
    assert found is not None
    assert found.extrapolation == 0.5
    assert 100_000 <= found.delta_bytes <= 100_000 * RATIO * 1.1
    assert [extrapolation for _, extrapolation in better.tried].count(1.0) == 1


def test_a_setting_may_be_enough_where_the_first_one_never_is() -> None:
    found = fewest_bytes(Curve({0.0: HIGH * 2, 1.0: 300_000}), LOW, HIGH, (0.0, 1.0))
    assert found is not None
    assert found.extrapolation == 1.0
    assert found.delta_bytes <= 300_000 * RATIO * 1.1
