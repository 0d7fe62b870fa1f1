"""The search for a price, on curves that deltas might follow."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from protocol.errors import RequestError
from server.requantize.search import ROUNDS_MAX, price_of_budget


def _curve(exponent: float, floor: int) -> tuple[list[float], Callable[[float], int]]:
    asked: list[float] = []

    def bytes_at(price: float) -> int:
        asked.append(price)
        return floor + int(min(1e8, 300.0 * price**exponent))

    return asked, bytes_at


@pytest.mark.parametrize("exponent", [-0.4, -0.8, -1.3])
@pytest.mark.parametrize("budget", [30_000, 458_000, 5_000_000])
@pytest.mark.parametrize("first", [1e-12, 1e-8, 1e-4])
def test_a_price_is_found_within_a_few_files(exponent: float, budget: int, first: float) -> None:
    asked, bytes_at = _curve(exponent, 20_000)
    price = price_of_budget(budget, 20_000, first, bytes_at)
    assert len(asked) <= ROUNDS_MAX
    assert 0.9 * budget < bytes_at(price) <= budget


def test_the_first_price_that_fits_is_taken() -> None:
    asked, bytes_at = _curve(-0.8, 0)
    price = price_of_budget(bytes_at(1e-6) + 10, 0, 1e-6, bytes_at)
    assert price == 1e-6
    assert asked == [1e-6, 1e-6]


def test_a_budget_below_what_cannot_be_left_out_is_refused() -> None:
    _, bytes_at = _curve(-0.8, 20_000)
    with pytest.raises(RequestError, match=r"takes 20,000 bytes, the budget is 10,000 \(allow more\)"):
        price_of_budget(10_000, 20_000, 1e-8, bytes_at)


def test_steps_in_the_curve_do_not_loop() -> None:
    """Bytes that jump over the budget: the longest file below it is taken."""
    price = price_of_budget(1000, 0, 1e-8, lambda price: 2000 if price < 1e-7 else 500)
    assert price >= 1e-7


@pytest.mark.parametrize("first", [5.4e-5, 1e-8, 2.6e-12])
@pytest.mark.parametrize("budget", [230_000, 1_000_000])
def test_a_cliff_is_found(first: float, budget: int) -> None:
    """Gains that are all alike, as errors of plain weights are: nearly every code changes, or none does."""
    floor = 19_112

    def bytes_at(price: float) -> int:
        return floor + int(3.5e6 * max(0.0, 1 - price / 1e-9))

    price = price_of_budget(budget, floor, first, bytes_at)
    assert 0.6 * budget < bytes_at(price) <= budget


def test_a_file_that_nearly_fits_is_followed_by_one_that_does() -> None:
    """Bytes of a real file (Q4_0, a narrow fine-tune): the third is 91 bytes too long, and the bracket around it still wide."""
    known = {1.7e-6: 72_073, 3.28e-8: 621_659, 5.07e-8: 458_725, 2.93e-7: 148_731}
    prices = sorted(known)
    asked: list[float] = []

    def bytes_at(price: float) -> int:
        asked.append(price)
        found = np.interp(math.log(price), np.log(prices), np.log([known[each] for each in prices]))
        return round(math.exp(found))

    assert 0.96 * 458_634 < bytes_at(price_of_budget(458_634, 19_112, 1.7e-6, bytes_at)) <= 458_634
    assert len(asked) <= 5
