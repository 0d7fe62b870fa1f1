"""Leases of a model: who uses one keeps it, and it is closed once, after its last user."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from device.leases import Leases, NoModelError
from protocol.errors import EngineError
from protocol.release import ClassPrompt, Prompt

SWAPS = 400
USERS = 4
PROMPT = ClassPrompt(name="p", input=[0.0], label=0)


class Counted:
    """A model that knows how often it was closed, and does not answer after that."""

    def __init__(self) -> None:
        self.closes = 0

    def answer(self, prompt: Prompt) -> str:
        del prompt
        if self.closes:
            raise EngineError("the model is closed")
        return "0"

    def close(self) -> None:
        self.closes += 1


def test_a_model_that_nobody_uses_goes_at_once() -> None:
    leases, first, second = Leases(), Counted(), Counted()
    assert not leases.swap(first, "1")
    assert not leases.swap(second, "2")
    assert (first.closes, second.closes, leases.model, leases.version) == (1, 0, second, "2")


def test_a_request_ends_on_the_version_on_which_it_began() -> None:
    leases, first, second = Leases(), Counted(), Counted()
    leases.swap(first, "1")
    with leases.lease() as one:
        with leases.lease():
            assert leases.swap(second, "2")
        with leases.lease() as other:
            assert (other.model, other.version) == (second, "2")
        assert (one.model, one.version, first.closes) == (first, "1", 0)
    assert (first.closes, second.closes) == (1, 0)


def test_a_request_that_fails_gives_the_model_back() -> None:
    leases, first = Leases(), Counted()
    leases.swap(first, "1")
    with suppress(ZeroDivisionError), leases.lease():
        leases.swap(Counted(), "2")
        raise ZeroDivisionError
    assert first.closes == 1


def test_without_a_model_there_is_no_lease() -> None:
    leases = Leases()
    with pytest.raises(NoModelError, match="no model answers now"):
        leases.lease()
    model = Counted()
    leases.swap(model, "1")
    leases.let_go()
    leases.let_go()
    assert (model.closes, leases.model, leases.version) == (1, None, "")
    with pytest.raises(NoModelError):
        leases.lease()


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_letting_go_waits_for_a_request_that_ends_in_time() -> None:
    leases, model = Leases(), Counted()
    leases.swap(model, "1")
    lease = leases.lease()
    thread = in_thread(lambda: leases.let_go(30.0))
    while leases.model is not None:
        time.sleep(0.001)
    assert (model.closes, lease.is_revoked) == (0, False)
    with lease:
        pass
    thread.join(30.0)
    assert not thread.is_alive()
    assert (model.closes, lease.is_revoked) == (1, False)


def test_letting_go_takes_the_model_away_from_a_request_that_goes_on() -> None:
    leases, model = Leases(), Counted()
    leases.swap(model, "1")
    with leases.lease() as lease:
        leases.let_go(0.01)
        assert (model.closes, lease.is_revoked) == (1, True)
    assert model.closes == 1


@pytest.mark.parametrize("is_let_go", [False, True], ids=["swaps", "swaps and letting go"])
def test_no_race_closes_a_model_in_use_or_one_twice_or_one_never(is_let_go: bool) -> None:
    leases = Leases()
    models = [Counted() for _ in range(SWAPS)]
    leases.swap(models[0], "0")
    is_over = threading.Event()
    uses = [0] * USERS

    def use(user: int) -> None:
        while not is_over.is_set():
            try:
                lease = leases.lease()
            except NoModelError:
                continue
            with lease:
                model = lease.model
                assert isinstance(model, Counted)
                assert models[int(lease.version)] is model
                time.sleep(0)  # another thread's turn
                try:
                    assert model.answer(PROMPT) == "0"
                except EngineError:
                    assert lease.is_revoked
                assert not model.closes or lease.is_revoked
                uses[user] += 1

    with ThreadPoolExecutor(USERS) as pool:
        users = [pool.submit(use, user) for user in range(USERS)]
        for number, model in enumerate(models[1:], start=1):
            if is_let_go and number % 7 == 0:
                leases.let_go(0.0 if number % 2 else 1.0)
            leases.swap(model, str(number))
            time.sleep(0)
        is_over.set()
        for each in users:
            each.result(60.0)
    assert min(uses) > 0
    assert [model.closes for model in models] == [1] * (SWAPS - 1) + [0]
